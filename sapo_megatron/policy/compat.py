"""Where the releases of megatron-core that this package runs on (0.16 to 0.19) differ.

Each difference is told by what the installed release has, not by its number: distributors carry
patches from later releases.
"""

import functools
import inspect
import pickle
import queue
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import megatron.core
import torch
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from torch import serialization
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.futures import Future

from sapo_megatron.errors import UserError, with_type

DESCRIBING = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
}
"""All that a checkpoint's ``.metadata`` is made of, beside dtypes, containers and numbers."""


def grouped_mlp(linear: type) -> tuple[type, MLPSubmodules] | Callable[..., Any]:
    """What ``BackendSpecProvider.grouped_mlp_modules`` answers for experts made of ``linear``.

    Once a module and its submodules, which the caller builds; now their builder.
    """
    submodules = MLPSubmodules(linear_fc1=linear, linear_fc2=linear)
    asked = inspect.signature(BackendSpecProvider.grouped_mlp_modules).parameters
    if "moe_use_legacy_grouped_gemm" in asked:
        return TEGroupedMLP, submodules
    return functools.partial(TEGroupedMLP, submodules=submodules)


class LatentSelfAttention(MLASelfAttention):
    """Latent attention of the layers that its spec names.

    0.19 works out by itself which projections own a norm, and gives one to the query projection of
    models without a low-rank query (Moonlight), which have none there.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return vars(submodules)


@functools.cache
def allow_torch_layers(duplicated: type) -> None:
    """Let upstream's modules be made of torch's layers, where it takes Transformer Engine's for
    granted. Idempotent; for a process whose models are all made of torch's layers.

    ``duplicated``: the linear layer that tensor-parallel ranks have whole.
    """
    # It asks whether a layer is one of Transformer Engine's although there are none.
    multi_latent_attention.HAVE_TE = False
    # The kinds of linear that it accepts are Transformer Engine's, ModelOpt's and its own.
    multi_latent_attention.Linear = duplicated
    # Named whether or not Transformer Engine is there; None selects the torch path.
    moe_utils.te_general_gemm = None
    # Upstream takes "no fp8" (False) for fp8 and goes on to ask Transformer Engine about it.
    without_output = random.CheckpointWithoutOutput
    without_output.__init__ = _without_fp8(without_output.__init__)


def _without_fp8(init: Any) -> Any:
    @functools.wraps(init)
    def initialise(self: Any, fp8: Any = None) -> None:
        init(self, None)

    return initialise


def auxiliary_loss_tokens(tokens: int, tp_size: int) -> int:
    """``num_tokens`` of a 3-tuple loss that auxiliary losses count on under per-token loss.

    ``tokens`` of a micro-batch on one context-parallel rank, of which each tensor-parallel rank's
    router sees its part. Routers multiply by those they see; now by the whole micro-batch's.
    """
    code = TopKRouter.attach_and_log_load_balancing_loss.__code__
    return tokens if "tp_cp_group" in code.co_names else tokens // tp_size


def release() -> str:
    """The number of the release that is installed."""
    return megatron.core.__version__.partition("+")[0]


def reads(files: Iterable[str]) -> bool:
    """Whether this release reads a checkpoint of these files.

    0.16 keeps what is no tensor in a file of its own, without which it cannot load; 0.19 writes
    none, and reads both.
    """
    return common.COMMON_STATE_FNAME in files or not hasattr(common, "TorchCommonLoadStrategy")


def write_with_threads() -> None:
    """Have threads of the rank write its files of the next checkpoint, as 0.19 does.

    0.16 forks a process per file, which hangs for good where its rank is killed while it writes.
    The queue of either belongs to a process of its own, which outlives such a rank; threads need
    no more than one of theirs.
    """
    filesystem_async._results_queue = queue.SimpleQueue()
    if hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc"):
        FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write)


def _write(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any
) -> None:
    """Stands for ``write_preloaded_data_multiproc``: one thread per bucket, that is per file."""
    written: queue.SimpleQueue = queue.SimpleQueue()
    to_write: queue.Queue = queue.Queue()

    def write(number: int) -> None:
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, buckets[number], written, to_write, use_fsync=True, use_msc=use_msc
        )

    for number in range(len(buckets)):
        to_write.put(number)
    with ThreadPoolExecutor(len(buckets)) as pool:
        list(pool.map(write, range(len(buckets))))
    found = dict(written.get() for _ in buckets)
    failed = [error for error in found.values() if isinstance(error, Exception)]
    results.put(failed[0] if failed else found)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Let nothing that lies in ``checkpoint`` run code while upstream reads it in the block.

    Upstream unpickles what describes a checkpoint, and what in it is no tensor. In the block that
    makes tensors, plain values and what :data:`DESCRIBING` names. Raises UserError, naming the file
    where it is known, for whatever else there is and whatever cannot be read. For one thread.
    """
    known, read_data = serialization.get_safe_globals(), FileSystemReader.read_data
    described = _read_metadata(checkpoint / ".metadata")

    def read_by_file(reader: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future:
        files = defaultdict(list)
        for item in plan.items:
            files[described.storage_data[item.storage_index].relative_path].append(item)
        for name, items in files.items():
            with naming(checkpoint / name):
                read_data(reader, replace(plan, items=items), planner)
        return read_data(reader, replace(plan, items=[]), planner)

    serialization.clear_safe_globals()
    try:
        with (
            naming(checkpoint),
            patch.object(torch, "load", functools.partial(_load_plain, torch.load)),
            patch.object(FileSystemReader, "read_data", read_by_file),
            patch.object(FileSystemReader, "read_metadata", lambda *_, **__: described),
        ):
            yield
    finally:
        serialization.add_safe_globals(known)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong in the block is a UserError about ``path``, or about a file in it."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        while isinstance(cause, CheckpointException):  # of upstream: what each rank came upon
            cause = next(iter(cause.failures.values()))[0]
        if isinstance(cause, UserError):
            raise cause from None
        what = f"others ({with_type(cause, 200)})"
        if isinstance(cause, pickle.UnpicklingError):  # torch's text is long, and says how to allow
            found = re.search(r"GLOBAL (\S+) (was not|whose)", str(cause))
            what = f"{found[1]}, which none holds" if found else "a pickle of something else"
        raise UserError(
            f"{path}: expected tensors and values of a checkpoint of this model, got {what}; "
            f"resume from another checkpoint"
        ) from cause


def _read_metadata(path: Path) -> Metadata:
    with naming(path), path.open("rb") as file:
        described = _Unpickler(file).load()
        for place in described.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"{place.relative_path!r}, which is not in this folder")
    return described


def _load_plain(load: Callable[..., Any], file: Any, *_: Any, **options: Any) -> Any:
    """``torch.load`` of tensors and plain values, whatever else the caller would take."""
    named = naming(Path(file)) if isinstance(file, str | Path) else nullcontext()
    with named, warnings.catch_warnings(action="ignore"):  # that another pickle may not be read
        return load(file, map_location=options.get("map_location"), weights_only=True)


_IN_PYTHON: Any = pickle._Unpickler


class _Unpickler(_IN_PYTHON):
    """Makes what :data:`DESCRIBING` names. In Python: the one in C cannot be told what to set."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in DESCRIBING.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not allowed")
        return super().find_class(module, name)

    def load_build(self) -> None:
        made = type(self.stack[-2])
        if made.__name__ not in DESCRIBING.get(made.__module__, ()):  # a class itself, say
            raise pickle.UnpicklingError(f"expected nothing set on a {made.__name__}")
        super().load_build()

    dispatch: ClassVar = {**_IN_PYTHON.dispatch, pickle.BUILD[0]: load_build}
