"""What lets megatron-core run without CUDA. The only file that patches it.

``enable()`` is called once, before any model is built, where ``torch.cuda`` has no device; with a
GPU nothing here runs. Patches are few and named; none of them costs anything per operation.
"""

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def prepare_import() -> None:
    """Import megatron-core, also where there is no triton, and no more with it than is used."""
    modules: dict[str, Any] = sys.modules
    if importlib.util.find_spec("triton") is None:
        # The one file that 0.19 imports without asking whether triton is there: GPU kernels that
        # move expert activations out of the way (`moe_paged_stash`), never launched on the CPU.
        kernels: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        kernels.GLOBAL_BLOCK_SIZE = kernels.paged_stash_copy_kernel = None
        kernels.paged_stash_pop_kernel = None
        modules.setdefault(kernels.__name__, kernels)
    if not torch.cuda.is_available():
        # It decorates small functions with torch.compile, which wants a C++ compiler, and seconds
        # for its own imports at the first of them.
        compiler: Any = torch
        compiler.compile = _as_it_is
    if "wandb" not in modules:
        # Its inference engine, which is not used, imports wandb where there is one.
        modules["wandb"] = None
        try:
            importlib.import_module("megatron.core")
        finally:
            del modules["wandb"]


def _as_it_is(model: Any = None, **_: Any) -> Any:
    """What ``torch.compile`` makes of a function, or as a decorator with options: the function."""
    return model or _as_it_is


@functools.cache
def enable() -> None:
    """Redirect what megatron-core asks of CUDA to the CPU. Idempotent."""
    assert not torch.cuda.is_available(), "the CPU patches are for machines without a GPU"
    _patch_torch_cuda()
    _patch_megatron()


class _Stream:
    """Stands for a CUDA stream or event: work on the CPU is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: object) -> None: ...

    def _done(self, *args: Any, **kwargs: Any) -> None: ...

    wait = wait_event = wait_stream = synchronize = record = _done

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or self


_STREAM = _Stream()


def _patch_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = torch.get_default_device  # the CPU, or what `with torch.device` says
    cuda.synchronize = lambda device=None: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = lambda device=None: _STREAM
    cuda.stream = lambda stream: _STREAM
    cuda.Stream = cuda.Event = _Stream
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    tensor: Any = Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, device=None: self

    # The distributed optimizer and gradient clipping recognise dtypes by their CUDA type names.
    # fp64 goes by the name of fp32: weights that are their own master copy.
    type_of = Tensor.type

    def type_named_as_on_cuda(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, *args, **kwargs)
        name = type_of(self).replace("torch.", "torch.cuda.", 1)
        return name.replace("DoubleTensor", "FloatTensor")

    tensor.type = type_named_as_on_cuda


class _TorchOnCpu(types.ModuleType):
    """``torch`` as one module sees it: factories that name the device "cuda" build on the CPU, and
    pin no memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def build(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return factory(*args, device=_CPU if device == "cuda" else device, **kwargs)

    return build


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The router's softmax, which asks for fp32 whatever it gets: fp64 stays fp64."""
    return torch.softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)


def _fp64_gradients(copy: Any) -> Any:
    """The optimizer's shards of fp64 weights take fp64 gradients, which upstream makes fp32."""

    @functools.wraps(copy)
    def copy_gradients(self: Any) -> None:
        if self.is_stub_optimizer or self.config.params_dtype != torch.float64:
            return copy(self)
        for weights, shards in zip(self.model_fp32_groups, self.shard_fp32_groups, strict=True):
            for weight, shard in zip(weights, shards, strict=True):
                place = self._get_model_param_range_map(weight)["param"]
                shard.grad = weight.main_grad.view(-1)[place.start : place.end]

    return copy_gradients


_torch_on_cpu: Any = _TorchOnCpu("torch")
for _name in ("tensor", "zeros", "ones", "empty", "full", "empty_like"):
    setattr(_torch_on_cpu, _name, _on_cpu(getattr(torch, _name)))
_torch_on_cpu.softmax = _softmax


def _patch_megatron() -> None:
    from megatron.core import utils
    from megatron.core.dist_checkpointing import exchange_utils
    from megatron.core.dist_checkpointing.strategies import state_dict_saver
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, grad_scaler, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    for module in (
        clip_grads,
        exchange_utils,
        grad_scaler,
        moe_utils,
        optimizer,
        rope_utils,
        schedules,
        state_dict_saver,
        utils,
    ):
        module.torch = _torch_on_cpu

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    distributed = distrib_optimizer.DistributedOptimizer
    distributed._copy_model_grads_to_main_grads = _fp64_gradients(
        distributed._copy_model_grads_to_main_grads
    )

    # The dispatcher wants its splits as numpy arrays; upstream converts only what was on a GPU.
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    token_dispatcher.maybe_move_tensor_to_cpu = to_host
