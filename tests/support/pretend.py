"""A GPU that is only pretended: tensors have a device, and what CUDA would refuse is seen.

A tensor is on the GPU where its storage says so; views share it. Nothing is moved and all values
are real, so whole runs go through. One mode answers Python's questions (``.device``, ``.to``,
``device="cuda"``), another sees every operator, also in the backward pass, and every collective.
Groups made for gloo carry tensors of the host, all others stand for nccl's. What is not seen:
types that kernels do not have, streams, memory, Transformer Engine, and whatever
``torch.cuda.is_available()`` turns on, which stays False.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sapo_megatron
from sapo_megatron.policy import cpu, parallel

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
OURS = str(Path(sapo_megatron.__file__).parent)
MEGATRON = str(Path(megatron.core.__file__).parent)
UPSTREAMS_MOVE = moe_utils.maybe_move_tensor_to_cpu  # before the CPU's patches stand for it


@dataclass
class Seen:
    """What a pretended GPU was asked to do."""

    problems: Counter[str] = field(default_factory=Counter)
    """By what CUDA or a process group would refuse, and the line that asked for it."""
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Times that the host waits for the device, by phase and function, of ours alone."""
    phase: str = ""
    gloo: set[str] = field(default_factory=set)
    """Names of the groups that carry tensors of the host."""
    making: bool = False
    """Whether it is Python that makes a tensor."""

    def problem(self, text: str) -> None:
        _, function, line = _caller()
        self.problems[f"{text} @ {function}, line {line}"] += 1

    def wait(self) -> None:
        ours, function, _ = _caller()
        if ours:
            self.waits[self.phase, function] += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


@contextmanager
def gpu() -> Iterator[Seen]:
    """Models, optimizers and runs of this rank are on a pretended GPU in the block.

    For a process without CUDA, which has joined a gloo world that stands for nccl's.
    """
    cpu.enable()
    seen = Seen()
    with ExitStack() as stack:
        for owner, name, stand_in in _stand_ins(seen):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(_Functions(seen))
        stack.enter_context(_Operators(seen))
        yield seen


def on_gpu(tensor: Tensor) -> bool:
    return _side(tensor) == "gpu"


def _side(tensor: Tensor) -> str:
    """``gpu``, ``host``, or ``either``: made by torch's own C++, on the side of its company."""
    try:
        return getattr(tensor.untyped_storage(), "side", "host")
    except (NotImplementedError, RuntimeError):  # a kind of tensor without a storage
        return "host"


def _put(tensor: Any, side: str) -> Any:
    tensor.untyped_storage().side = side
    return tensor


def _caller() -> tuple[bool, str, int]:
    """Who called torch last, ours or Megatron's: whether ours, the function, and its line."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith((OURS, MEGATRON)):
            ours = path.startswith(OURS)
            place = path.removeprefix(f"{OURS if ours else MEGATRON}/")
            return ours, f"{place} {frame.f_code.co_qualname}", frame.f_lineno
        frame = frame.f_back
    return False, "the test", 0


# What Python asks

_FACTORIES = {
    getattr(torch, name)
    for name in (
        *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full"),
        *("full_like", "linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn"),
        *("randn_like", "randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
    )
} | {
    getattr(Tensor, name)
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
}


class _Functions(TorchFunctionMode):
    """Answers for the device that tensors pretend to be on."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        tensor: Any = Tensor
        self._answers: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: lambda t, *_: GPU if on_gpu(t) else t.device,
            tensor.is_cuda.__get__: lambda t, *_: on_gpu(t),
            tensor.is_cpu.__get__: lambda t, *_: not on_gpu(t),
            tensor.cpu: lambda t, *_, **__: self._move(t, HOST),
            tensor.to: self._to,
            tensor.pin_memory: lambda t, *_: t.clone(),
            tensor.numpy: self._numpy,
            tensor.tolist: self._tolist,
            tensor.type: self._type,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return self._make(func, args, dict(kwargs))
        return self._answers.get(func, func)(*args, **kwargs)

    def _make(self, factory: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        kwargs.pop("pin_memory", None)
        device = kwargs.pop("device", None)
        before, self._seen.making = self._seen.making, True
        try:
            made = factory(*args, **kwargs)
        finally:
            self._seen.making = before
        return made if device is None else _put(made, _side_of(device))

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (GPU if on_gpu(args[0]) else HOST, args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            tensor = self._move(tensor, device, non_blocking=non_blocking)
        return tensor.to(dtype=dtype or tensor.dtype, copy=copy, memory_format=memory)

    def _move(self, tensor: Tensor, device: Any, *, non_blocking: bool = False) -> Tensor:
        side = _side_of(device)
        if (side == "gpu") == on_gpu(tensor):
            return tensor
        if side == "host" and not non_blocking:
            self._seen.wait()
        return _put(tensor.clone(), side)

    def _numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if on_gpu(tensor):
            self._seen.problem("numpy() of a GPU tensor")
        return tensor.numpy(*args, **kwargs)

    def _tolist(self, tensor: Tensor) -> Any:
        if on_gpu(tensor):
            self._seen.wait()
        return tensor.tolist()

    def _type(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor.type(*args, **kwargs)
        # The CPU's patch makes it a name of CUDA's, and has asked for it through this mode.
        return found.replace("cuda.", "") if isinstance(found, str) else found


def _side_of(device: Any) -> str:
    return "host" if str(device) == "cpu" else "gpu"  # a number is a GPU's


# What operators get

_ATEN = torch.ops.aten
_BETWEEN = {
    *(_ATEN.copy_.default, _ATEN._to_copy.default),
    *(_ATEN.set_.source_Tensor, _ATEN.set_.source_Storage_storage_offset),
}
"""Take tensors of both devices."""
_INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}
_SCALARS = {_ATEN.fill_, _ATEN.masked_fill, _ATEN.masked_fill_, _ATEN.where, *_INDEXING}
"""Take a host tensor of dimension 0 beside those of the GPU, as what is pointwise does."""
_WAITING = {
    *(_ATEN._local_scalar_dense, _ATEN._unique2, _ATEN.bincount, _ATEN.equal, _ATEN.nonzero),
    *(_ATEN.masked_select, _ATEN.unique_consecutive, _ATEN.unique_dim),
}


class _Operators(TorchDispatchMode):
    """Sees which tensors operators and collectives get, and says where their results are."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors_of((args, kwargs)))
        if func.namespace == "c10d":
            self._collective(func, args, tensors)
            return func(*args, **kwargs)
        sides = [_side(tensor) for tensor in tensors]
        if "gpu" in sides:
            self._operator(func, args, tensors, sides)
        result = func(*args, **kwargs)
        side = "gpu" if "gpu" in sides else "host" if "host" in sides else "either"
        if not tensors and self._seen.making:
            side = "host"
        if func not in _BETWEEN or func is _ATEN._to_copy.default:
            for made in _tensors_of(result):
                if not any(made is tensor for tensor in tensors) and _side(made) == "host":
                    _put(made, side)
        return result

    def _operator(self, func: Any, args: Any, tensors: list[Tensor], sides: list[str]) -> None:
        name = func.overloadpacket
        strangers = [t for t, side in zip(tensors, sides, strict=True) if side == "host"]
        if torch.Tag.pointwise in func.tags or name in _SCALARS:
            strangers = [t for t in strangers if t.dim()]
        if name in _INDEXING and sides[0] == "gpu":
            indices = [index for index in args[1] if index is not None]
            beside = [t for t in strangers if any(t is index for index in indices)]
            strangers = [t for t in strangers if not any(t is index for index in indices)]
            # Indices of the host are taken along, and a mask is counted.
            if beside or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._seen.wait()
        if strangers and func not in _BETWEEN:
            shapes = sorted({tuple(t.shape) for t in strangers})
            self._seen.problem(f"{func} of the GPU gets host tensors {shapes}")
        copied_to_host = func is _ATEN.copy_.default and sides[0] != "gpu"
        if name in _WAITING or (copied_to_host and not (len(args) > 2 and args[2])):
            self._seen.wait()

    def _collective(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        group = next(
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
        )
        name = func.overloadpacket.__name__
        gloo = group.group_name in self._seen.gloo
        for tensor in tensors:
            if tensor.numel() and name != "barrier" and gloo == on_gpu(tensor):
                kinds = "a gloo group gets a GPU" if gloo else "an nccl group gets a host"
                self._seen.problem(f"{name}: {kinds} tensor {tuple(tensor.shape)}")


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_of(part)
    elif isinstance(value, dict):
        yield from _tensors_of(list(value.values()))


# What stands for CUDA's


def _stand_ins(seen: Seen) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name, and what takes its place in the block."""
    c10d = dist.distributed_c10d
    new_group, groups = dist.new_group, parallel._groups

    def make_group(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        if kwargs.get("backend") == "gloo" and isinstance(group, dist.ProcessGroup):
            seen.gloo.add(group.group_name)
        return group

    def objects_travel_on(group: dist.ProcessGroup | None = None) -> torch.device:
        return HOST if (group or dist.group.WORLD).group_name in seen.gloo else GPU

    yield dist, "new_group", make_group
    yield c10d, "_get_object_coll_device", objects_travel_on
    yield parallel, "_groups", lambda world, device: groups(world, GPU)
    yield torch.cuda, "current_device", lambda: GPU
    yield Tensor, "cuda", lambda self, *args, **kwargs: self.to(GPU)
    yield Tensor, "record_stream", lambda self, stream: None
    yield torch.nn.Module, "cuda", lambda self, device=None: self.to(GPU)
    # Else the backward pass runs where the mode that is asked about it is off.
    yield torch.autograd, "has_torch_function", lambda tensors: False
    # Megatron's files name "cuda" and mean it.
    for name in ("tensor", "zeros", "ones", "empty", "full", "empty_like"):
        yield cpu._torch_on_cpu, name, getattr(torch, name)
    for module in (moe_utils, token_dispatcher):
        yield module, "maybe_move_tensor_to_cpu", UPSTREAMS_MOVE
