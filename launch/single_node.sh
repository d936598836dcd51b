#!/usr/bin/env bash
# Train a recipe on this machine, one process a GPU.
#
#   launch/single_node.sh RECIPE [OVERRIDE...]
#
#   NPROC_PER_NODE  processes (default: one a GPU)
#   RUN_DIR         run folder (default: runs/<recipe>/<job id>); one with a checkpoint goes on
#   JOB_ID          names the run folder (default: date, time and process id)
#   DRY_RUN=1       print the command and start nothing
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
source "$launch/env.sh"
# shellcheck source=launch/common.sh
source "$launch/common.sh"

(($# > 0)) || fail "usage: launch/single_node.sh RECIPE [OVERRIDE...]"
recipe=$1
shift
run_dir=$(run_folder "$recipe" "${JOB_ID:-$(date +%Y%m%d-%H%M%S)-$$}")
processes=$(processes_here)

if [[ $processes == gpu ]]; then
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --list-gpus | paste -sd,)}"
    processes=${#gpus[@]}
fi

become "$PYTHON" -m sapo_megatron.launcher "$processes" \
    sapo_megatron train "$recipe" --resume auto "train.run_dir=$run_dir" "$@"
