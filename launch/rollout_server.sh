#!/usr/bin/env bash
# Serve a model with vLLM, for rollouts: one OpenAI-compatible server on all GPUs of this machine.
#
#   launch/rollout_server.sh MODEL [VLLM_OPTION...]
#
#   PYTHON        interpreter of the environment that has vLLM (default: python3)
#   ROLLOUT_HOST  address to listen on (default: 127.0.0.1, this machine only)
#   ROLLOUT_PORT  port to listen on (default: 8000)
#   ROLLOUT_TP    GPUs that hold the model together (default: all of this machine)
#   DRY_RUN=1     print the command and start nothing
#
# The server has no password, and the trainer may change its weights: let it listen on a network
# only where everyone on that network may do so, too.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
source "$launch/env.sh"
# shellcheck source=launch/common.sh
source "$launch/common.sh"
# For processes that train. vLLM's tensor parallelism dies of segments that can grow: its all-reduce
# asks CUDA for handles that such memory has not got (vllm issue 42609).
unset PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS

(($# > 0)) || fail "usage: launch/rollout_server.sh MODEL [VLLM_OPTION...]"
model=$1
shift
host=${ROLLOUT_HOST:-127.0.0.1} port=${ROLLOUT_PORT:-8000}
if [[ ${DRY_RUN:-0} != 1 ]] && (: >"/dev/tcp/$host/$port") 2>/dev/null; then
    fail "ROLLOUT_PORT: expected a free port, got $port, where a program listens; choose another"
fi
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
else
    # vLLM 0.32 on a CPU dies of a prompt with a seed that it takes in pieces.
    gpus=1
    set -- --no-enable-chunked-prefill "$@"
fi
# The endpoints through which the trainer puts new weights into the server.
export VLLM_SERVER_DEV_MODE="${VLLM_SERVER_DEV_MODE:-1}"
# The package, of which the server runs one file for the trainer.
export PYTHONPATH="${launch%/*}${PYTHONPATH:+:$PYTHONPATH}"

become "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$model" \
    --host "$host" --port "$port" \
    --tensor-parallel-size "${ROLLOUT_TP:-$gpus}" --generation-config vllm \
    --worker-extension-cls sapo_megatron.rollout.vllm.worker.Worker "$@"
