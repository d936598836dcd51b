#!/usr/bin/env bash
# Train a recipe on several machines: run this on each of them, with the same settings.
#
#   launch/multi_node.sh RECIPE [OVERRIDE...]
#
#   MASTER_ADDR     a machine of the job, where the others meet (required)
#   MASTER_PORT     a free port there (default: 29500)
#   NNODES          number of machines, or MIN:MAX (required)
#   JOB_ID          the same on all machines, another for each job (required)
#   NPROC_PER_NODE  processes a machine (default: one a GPU)
#   MAX_RESTARTS    how often a failed process makes all of them start again (default: 3)
#   RUN_DIR         run folder that all machines share (default: runs/<recipe>/<job id>)
#   DRY_RUN=1       print the command and start nothing
#
# A restart, of the processes or of the whole job, goes on from the run folder's last checkpoint.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
source "$launch/env.sh"
# shellcheck source=launch/common.sh
source "$launch/common.sh"

(($# > 0)) || fail "usage: launch/multi_node.sh RECIPE [OVERRIDE...]"
[[ ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR: expected a machine of the job, got none; set it"
[[ ${NNODES:-} =~ ^[0-9]+(:[0-9]+)?$ ]] ||
    fail "NNODES: expected the number of machines, or MIN:MAX, got '${NNODES:-}'; set it"
[[ ${JOB_ID:-} ]] || fail "JOB_ID: expected a name that all machines share, got none; set it"
recipe=$1
shift
run_dir=$(run_folder "$recipe" "$JOB_ID")
processes=$(processes_here)

become "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "$JOB_ID" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    -m sapo_megatron train "$recipe" --resume auto "train.run_dir=$run_dir" "$@"
