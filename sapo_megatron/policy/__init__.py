"""The trained model on megatron-core: layout, layers, weights, optimizer step, checkpoints."""

import logging
import warnings

from sapo_megatron.policy import cpu

# megatron-core says at import what it does without, and calls torch by names that are going away:
# nothing that a user of this package could act on.
for _message in (
    ".*Apex (is|are) not installed",
    "When using sequence parallelism it is recommended to set",
    "full scope is deprecated",
    ".*The .grad attribute of a Tensor that is not a leaf",
    ".*is deprecated. Please use `torch.distributed",
    ".*is experimental and still under active development",
    ".*`load_state_dict` is deprecated",
    ".*use DTensor instead",
    ".*we are deprecating ShardedTensor",
):
    warnings.filterwarnings("ignore", message=_message)
# The one warning of each, from 0.19 on: GPTModel is to give way to HybridModel; DDP works out the
# layout of its buffers itself.
for _module in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
    logging.getLogger(f"megatron.core.{_module}").setLevel(logging.ERROR)
# What a CUDA build of torch says where there is no GPU, or `plan` hides them.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
)

cpu.prepare_import()
