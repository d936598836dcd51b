# shellcheck shell=bash
# Environment of every process that trains or serves: the one place for NCCL, CUDA, torch and OpenMP
# settings. Sourced by the other scripts; whatever is set already stays as it is. A process started
# without these scripts sets those that matter to itself (ENVIRONMENT in sapo_megatron/__main__.py).

# The interpreter that has sapo_megatron (in rollout_server.sh: the one that has vLLM).
export PYTHON="${PYTHON:-python3}"

# Threads a process: with one process a GPU, more would only fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Log lines appear when they are written, not when a buffer is full.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# One hardware queue: kernels start in the order in which Megatron issues them, which its overlap of
# communication with computation (tensor, sequence and context parallel) relies on up to Hopper.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Packed micro-batches differ in size from step to step; segments that can grow keep that from
# fragmenting GPU memory. The second name is the one that older releases of torch read.
allocator="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-$allocator}"
export PYTORCH_CUDA_ALLOC_CONF="$PYTORCH_ALLOC_CONF"

# Processes that torchrun starts again meet in a store of their own. By default torch 2.13 lends
# them the agents' store, in which those of the first start have left their addresses, and they
# wait for these until the timeout.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# NCCL says what is wrong, and nothing else; INFO shows rings, interfaces and transports.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# When a collective hangs until its timeout, each rank writes down what it was waiting for.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Not set here, since they depend on the cluster; put them into the job's environment:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the interface between nodes, where several are up
#   NCCL_IB_HCA                              the InfiniBand or RoCE adapters to use
#   NCCL_NVLS_ENABLE=0                       gives back the memory that NVLink SHARP takes
#   HF_HOME, HF_HUB_OFFLINE=1                a shared Hugging Face cache; nodes without internet
#   WANDB_API_KEY                            only ever in the environment, never on a command line
