"""Where the releases of megatron-core that this package runs on (0.16 to 0.19) differ.

Each difference is told by what the installed release has, not by its number: distributors carry
patches from later releases.
"""

import functools
import inspect
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
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
