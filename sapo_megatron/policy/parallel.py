"""Process groups. The only reader of megatron-core's ``parallel_state``."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from sapo_megatron.data.batch import MicroBatching
from sapo_megatron.errors import RunFailed, UserError, one_line
from sapo_megatron.launcher import STORE
from sapo_megatron.policy import cpu
from sapo_megatron.policy.machine import check_parallel
from sapo_megatron.recipe.schema import ParallelConfig, Recipe

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """The groups this rank belongs to, passed down as a value."""

    world: ProcessGroup
    """Every rank, over gloo: carries host objects (samples, metrics), never gradients."""
    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    ep: ProcessGroup
    dp: ProcessGroup
    """Ranks with the same weights and different sequences."""
    dp_cp: ProcessGroup
    """``dp`` and ``cp`` together: ranks with the same weights."""
    megatron: ProcessGroupCollection
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def leader(self) -> int:
        """Global rank that speaks for this model-parallel block: its last stage's first rank."""
        block = dist.get_process_group_ranks(self.megatron.mp)
        return block[-self.tp.size()]

    @property
    def is_leader(self) -> bool:
        return dist.get_rank() == self.leader

    def micro_batching(self, recipe: Recipe) -> MicroBatching:
        """How this rank's part of a mini-batch is cut."""
        parallel = recipe.parallel
        interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        return MicroBatching(
            dp_rank=self.dp.rank(),
            dp_size=self.dp.size(),
            cp_rank=self.cp.rank(),
            cp_size=self.cp.size(),
            tp_size=self.tp.size(),
            max_tokens=recipe.train.max_tokens_per_gpu * self.cp.size(),
            packing=recipe.train.packing,
            count_multiple=self.pp.size() if interleaved else 1,
        )


def launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return "RANK" in os.environ


def setup(parallel: ParallelConfig, *, seed: int) -> ParallelGroups:
    """Join the processes of this run and cut them into groups.

    Collective over all processes. Uses nccl where there is CUDA, gloo elsewhere. Raises UserError
    for a layout that needs a GPU where there is none.
    """
    check_parallel(parallel)
    timeout_s = parallel.distributed_timeout_s
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        cpu.enable()
        device = torch.device("cpu")
    if not dist.is_initialized():
        _init_process_group("nccl" if device.type == "cuda" else "gloo", timeout_s)
    _lay_out(parallel, distributed_timeout_minutes=timeout_s / 60)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    world = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return _groups(world, device)


@contextmanager
def pretended(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[ParallelGroups]:
    """The groups of one rank of a world that has no processes, for a model on the meta device.

    What is built inside takes no memory, and no collective does anything. For a process without
    CUDA and without a process group of its own. Raises UserError as ``setup``.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    check_parallel(parallel)
    assert not dist.is_initialized(), "this process is part of a real world"
    cpu.enable()
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _lay_out(parallel)
        meta = torch.device("meta")
        with meta:
            yield _groups(dist.distributed_c10d._get_default_group(), meta)
    finally:
        teardown()
        shutdown()
        sys.excepthook = hook  # torch's names the rank, also of a world that is gone


def _lay_out(parallel: ParallelConfig, **options: Any) -> None:
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        # Upstream's twins of groups over gloo are for a form of checkpoint that is not used here.
        create_gloo_process_groups=False,
        **options,
    )


def _groups(world: ProcessGroup, device: torch.device) -> ParallelGroups:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelGroups(
        world=world,
        tp=groups.tp,
        pp=groups.pp,
        cp=groups.cp,
        ep=groups.ep,
        dp=groups.dp,
        dp_cp=groups.dp_cp,
        megatron=groups,
        device=device,
    )


def data_parallel_blocks(groups: ParallelGroups) -> list[list[int]]:
    """The global ranks that have the sequences of each data-parallel rank, in its order.

    Collective over all ranks.
    """
    places: list[Any] = [None] * dist.get_world_size()
    # Over the world: each rank says its own place.
    dist.all_gather_object(places, groups.dp.rank(), group=groups.world)
    return [
        [rank for rank, found in enumerate(places) if found == place]
        for place in range(groups.dp.size())
    ]


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a run, and this rank's place on its own."""

    firsts: tuple[int, ...]
    """The global rank of each node's first process."""
    number: int
    """This rank's node."""
    local: int
    """This rank's place on it."""
    peers: ProcessGroup | None
    """The ranks in the same place on their nodes; None where there is one node."""

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.local == 0


def nodes(groups: ParallelGroups) -> Nodes:
    """The machines, as torchrun says where one ends. Collective over all ranks.

    Raises UserError where they do not have as many processes each.
    """
    locals_: list[Any] = [None] * dist.get_world_size()
    # Over the world: each rank says its place on its node.
    dist.all_gather_object(locals_, int(os.environ.get("LOCAL_RANK", "0")), group=groups.world)
    firsts = tuple(rank for rank, local in enumerate(locals_) if local == 0)
    size = len(locals_) // len(firsts)
    if locals_ != list(range(size)) * len(firsts):
        raise UserError(
            f"LOCAL_RANK: expected 0, 1, ... on every node, as many on each, got {locals_}; start "
            f"the run with torchrun, and the same --nproc-per-node everywhere"
        )
    number, local = divmod(dist.get_rank(), size)
    peers = None
    if len(firsts) > 1:
        # New groups are made by all ranks, each of all groups.
        made = [dist.new_group([first + place for first in firsts]) for place in range(size)]
        peers = made[local]
    return Nodes(firsts=firsts, number=number, local=local, peers=peers)


def on_first_rank(groups: ParallelGroups, function: Callable[[], T]) -> T:
    """``function()`` of global rank 0, on every rank; so is an error that it raises."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (RunFailed, UserError, OSError) as error:
            box[1] = error
    # Over the world: every rank comes here, whatever happened on the first.
    dist.broadcast_object_list(box, group=groups.world)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextmanager
def failing_together(groups: ParallelGroups) -> Iterator[None]:
    """A RunFailed, UserError or OSError of one rank in the block is raised on every rank behind it.

    It names the rank unless all ranks have one. Collective over all ranks, each of which must come
    to the block's end, or out of it by such an error, without waiting for another.
    """
    mine: Exception | None = None
    try:
        yield
    except (RunFailed, UserError, OSError) as error:
        mine = error
    errors: list[Any] = [None] * dist.get_world_size()
    # Over the world: every rank comes here, whatever happened in its block.
    dist.all_gather_object(errors, mine, group=groups.world)
    failed = [rank for rank, error in enumerate(errors) if error is not None]
    if failed:
        first = errors[failed[0]]
        if len(failed) < len(errors):
            kind = UserError if isinstance(first, UserError) else RunFailed
            first = kind(f"rank {failed[0]}: {first}")
        raise first from None


def greatest(groups: ParallelGroups, value: float) -> float:
    """The greatest ``value`` of all ranks, on each of them. Collective over all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    # Over the world: each rank brings its own.
    dist.all_gather_object(values, value, group=groups.world)
    return max(values)


def shutdown() -> None:
    """Leave the process group at the end of a program."""
    dist.destroy_process_group()


def teardown() -> None:
    """Drop all groups but torch's own, and the layout they stand for; another ``setup`` may follow.

    Upstream forgets its groups, and torch does not: three threads of each would wake up a hundred
    times a second for as long as the process runs.
    """
    mpu.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    # Upstream's caches of rotary frequencies hold the modules that computed them, and their groups.
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()


def _init_process_group(backend: str, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    if store := os.environ.get(STORE):
        # All ranks are on this machine: a file, and nothing that others could talk to.
        size = int(os.environ["WORLD_SIZE"])
        rank, meeting = int(os.environ["RANK"]), dist.FileStore(store, size)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=timeout)
    elif launched():
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"MASTER_ADDR:MASTER_PORT: expected a free port that every node reaches, got "
                f"{address} ({one_line(error, 200)}); choose another with --master-port"
            ) from None
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
