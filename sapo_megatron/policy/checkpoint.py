"""Save and resume: weights, optimizer, schedule, RNG, data cursor, step.

A checkpoint is a folder ``step-000012`` of megatron-core's ``dist_checkpointing`` files, a
``state.json`` and the checksums of them all. It is written under another name and renamed when the
disk holds it, so a crash while writing leaves the one before it valid. It loads into any
data-parallel size; the other sizes of the layout must be those it was written with.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from sapo_megatron.errors import RunFailed, UserError, one_line
from sapo_megatron.files import checksum, sync
from sapo_megatron.policy import compat, parallel
from sapo_megatron.policy.parallel import ParallelGroups, failing_together
from sapo_megatron.policy.step import Policy
from sapo_megatron.runs.history import checkpoints, damage, read_manifest, write_manifest
from sapo_megatron.runs.state import RunState, write_state

logger = logging.getLogger(__name__)

LEAST_FREE = 2**26
"""Bytes that are free where a disk is not full: what writes into one fails in many words."""
SETTINGS = ("lr", "max_lr", "min_lr", "betas", "eps")
"""What a parameter group of Adam has of the recipe; the schedule sets its weight decay."""


def save(
    policy: Policy,
    folder: Path,
    state: RunState,
    *,
    keep: int,
    beside: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a checkpoint of ``state.step`` below ``folder`` and prune all but ``keep``.

    ``beside`` writes what else belongs into its folder, on each rank. One that is there stays.
    Collective over all ranks. Raises RunFailed, and leaves nothing behind, where a weight is not
    finite or it cannot be written.
    """
    groups, target = policy.groups, folder / f"step-{state.step:06d}"
    policy.model.weights.check_finite(target)
    temporary = folder / f".{target.name}.tmp"
    with _leaving_nothing(temporary):
        if parallel.on_first_rank(groups, lambda: _begin(temporary, target)):
            return target
        with failing_together(groups):
            beside(temporary)
        metadata = _metadata(policy)
        compat.write_with_threads()
        dist_checkpointing.save(
            _sharded_state(policy, metadata, loading=False),
            str(temporary),
            content_metadata={k: v for k, v in metadata.items() if isinstance(v, str)},
        )
        tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
        with failing_together(groups):
            save_file({"torch": torch.get_rng_state(), **tracked}, _rng_file(temporary))
        if torch.cuda.is_available():
            # The writer copied the whole state through pinned memory, which torch would keep.
            torch._C._host_emptyCache()
        parallel.on_first_rank(groups, lambda: write_state(temporary, state))
        _write_checksums(temporary, groups)
        parallel.on_first_rank(groups, lambda: _end(temporary, target, keep))
    return target


def newest_whole(candidates: list[Path], groups: ParallelGroups) -> Path | None:
    """The first of ``candidates`` that is as it was written; None where there are none.

    Says what is wrong with those before it. Collective over all ranks. Raises UserError where none
    is whole, or where the release of megatron-core that is installed does not read it.
    """
    problems: list[str] = []
    for checkpoint in candidates:
        problem = _damage(checkpoint, groups)
        if not problem:
            for said in problems:
                logger.warning("%s; taking %s", said, checkpoint.name)
            return checkpoint
        problems.append(f"{checkpoint}: expected a whole checkpoint, got a damaged one ({problem})")
    if problems:
        raise UserError(f"{problems[0]}; name another run or checkpoint")
    return None


def load(policy: Policy, checkpoint: Path, state: RunState) -> None:
    """Fill ``policy`` from a checkpoint whose ``state`` has been read. Collective.

    Adam's settings and the schedule stay the recipe's; of the schedule comes the place in it.
    Raises UserError, on every rank, for one that cannot be read; nothing in it is run as code.
    """
    together = failing_together(policy.groups)
    with together, compat.reading(checkpoint), torch.no_grad():
        template = _sharded_state(policy, _metadata(policy), loading=True)
        loaded = dist_checkpointing.load(template, str(checkpoint))
        for i, chunk in enumerate(policy.model.chunks):
            chunk.load_state_dict(loaded[f"model{i}"], strict=False)  # without its extra state
        _keep_settings(policy, loaded["optimizer"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
        _restore_steps(policy)
        policy.scheduler.step(increment=loaded["scheduler"]["num_steps"])
        if state.world_size == dist.get_world_size():
            with compat.naming(_rng_file(checkpoint)):
                states = load_file(_rng_file(checkpoint))
            torch.set_rng_state(states.pop("torch"))
            tensor_parallel.get_cuda_rng_tracker().set_states(states)


def _rng_file(checkpoint: Path) -> Path:
    return checkpoint / f"rng-{dist.get_rank():05d}.safetensors"


def _keep_settings(policy: Policy, loaded: dict[Any, Any]) -> None:
    """Put the recipe's settings, which are those of every group, into the loaded groups.

    megatron-core 0.19 tells groups apart by the learning rates, too, and would not find others. The
    classes of Adam on the host, which groups name, are no part of a checkpoint.
    """
    first = policy.optimizer.param_groups[0]
    ours = {k: v for k, v in first.items() if k in SETTINGS or isinstance(v, type)}
    for name, value in loaded.items():
        if name == "param_groups":
            for group in value:
                group.update(ours)
        elif isinstance(value, dict):
            _keep_settings(policy, value)


@contextmanager
def _leaving_nothing(temporary: Path) -> Iterator[None]:
    """What keeps a checkpoint from being written becomes a RunFailed, and its folder goes."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        cause: object = error
        if isinstance(error, CheckpointException):  # the first rank knows what each came upon
            cause = next((found for found, _ in error.failures.values()), "the first rank says why")
        if shutil.disk_usage(temporary.parents[1]).free < LEAST_FREE:
            cause = "no space is left on the disk"
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(
            f"{temporary.parent}: a checkpoint could not be written ({one_line(cause, 200)}); mend "
            f"that and go on with --resume auto"
        ) from error


def _begin(temporary: Path, target: Path) -> bool:
    """Whether the checkpoint is there; else make an empty folder for it."""
    if not target.exists():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    return target.exists()


def _end(temporary: Path, target: Path, keep: int) -> None:
    sync(temporary)
    temporary.rename(target)
    sync(target.parent)
    for old in checkpoints(target.parent.parent)[:-keep]:
        gone = old.with_name(f".{old.name}.tmp")  # whole or not there, for whoever looks
        old.rename(gone)
        shutil.rmtree(gone)


def _write_checksums(folder: Path, groups: ParallelGroups) -> None:
    """Have each rank read what it wrote, and the first write down what all found."""
    names = parallel.on_first_rank(groups, lambda: os.listdir(folder))
    found: list[Any] = [None] * dist.get_world_size()
    sums: dict[str, tuple[int, int]] = {}
    with failing_together(groups):
        for name in names:
            numbered = re.match(r"(?:__|\w+-)(\d+)[_.]", name)
            if dist.get_rank() == (int(numbered[1]) if numbered else 0):
                sync(folder / name)
                sums[name] = checksum(folder / name)
    # Over the world: each rank has read its own by now.
    dist.all_gather_object(found, sums, group=groups.world)
    files = {name: part[name] for part in found for name in part}
    parallel.on_first_rank(groups, lambda: write_manifest(folder, compat.release(), files))


def _damage(checkpoint: Path, groups: ParallelGroups) -> str:
    """What is wrong with a checkpoint, of which each rank reads a part; empty: it is whole."""
    manifest = parallel.on_first_rank(groups, lambda: read_manifest(checkpoint))
    if isinstance(manifest, str):
        return manifest
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = sorted(manifest.files.items(), key=lambda file: file[1])[rank::size]
    problems: list[Any] = [None] * size
    # Over the world: each rank has read its part.
    dist.all_gather_object(problems, damage(checkpoint, dict(mine)), group=groups.world)
    problem = next(filter(None, problems), "")
    if not problem and not compat.reads(manifest.files):
        raise UserError(
            f"{checkpoint}: expected a checkpoint that megatron-core {compat.release()} reads, got "
            f"one of {manifest.megatron_core}; go on with that release"
        )
    return problem


def _restore_steps(policy: Policy) -> None:
    """Give torch's Adam its step counts back: upstream leaves them in the parameter groups.

    Of Adam in host memory it loads the moments and leaves the counts of a first, made-up step:
    updates behind a resume would be up to a third too small until the counts have caught up. The
    part on the GPU counts in its groups, which would be set back to the loaded count at each step.
    """
    for part in policy.optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for group in part.optimizer.param_groups:
                step = group.pop("step")
            for inner in part.optimizer.sub_optimizers:
                for group in inner.param_groups:
                    group["step"] = step
                for state in inner.state.values():
                    if "step" in state:
                        state["step"] = torch.tensor(float(step))
        elif isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                step = group.pop("step")
                for weight in group["params"]:
                    part.optimizer.state[weight]["step"] = torch.tensor(step)


def _metadata(policy: Policy) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "dp_reshardable",
        "dp_cp_group": policy.groups.dp_cp,
    }


def _sharded_state(policy: Policy, metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    # Extra state is fp8's alone, and Transformer Engine pickles it into a tensor.
    state: dict[str, Any] = {
        f"model{i}": {
            name: part
            for name, part in chunk.sharded_state_dict(metadata=metadata).items()
            if not name.endswith("_extra_state")
        }
        for i, chunk in enumerate(policy.model.chunks)
    }
    models = dict(state) if len(policy.model.chunks) > 1 else state["model0"]
    state["optimizer"] = policy.optimizer.sharded_state_dict(
        models, is_loading=loading, metadata=metadata
    )
    _drop_classes(state["optimizer"])
    state["scheduler"] = policy.scheduler.state_dict()
    return state


def _drop_classes(part: Any) -> None:
    """Leave out what a checkpoint's reader would have to call: the classes of Adam on the host."""
    if isinstance(part, ShardedObject):
        part = part.data
    if isinstance(part, dict):
        for name in [name for name, value in part.items() if isinstance(value, type)]:
            del part[name]
        part = part.values()
    elif not isinstance(part, list):
        return
    for inner in part:
        _drop_classes(inner)
