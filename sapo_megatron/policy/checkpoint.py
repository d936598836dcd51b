"""Save and resume: weights, optimizer, schedule, RNG, data cursor, step.

A checkpoint is a folder ``step-000012`` of megatron-core's ``dist_checkpointing`` files and a
``state.json``. It is written under another name and renamed when it is whole, so a crash while
writing leaves the one before it valid. It loads into any data-parallel size; the other sizes of
the layout must be those it was written with.
"""

import json
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async

from sapo_megatron.config import ParallelConfig, UserError
from sapo_megatron.policy.step import Policy

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Sizes that a checkpoint is bound to."""


def save(
    policy: Policy, folder: Path, state: dict[str, Any], parallel: ParallelConfig, *, keep: int
) -> Path:
    """Write a checkpoint of ``state["step"]`` below ``folder`` and prune all but ``keep``.

    ``state`` is JSON data: what the training loop needs to go on. Collective over all ranks.
    """
    target = folder / f"step-{state['step']:06d}"
    temporary = folder / f".{target.name}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(policy.groups.world)
    metadata = _metadata(policy)
    # Upstream's queue belongs to a process of its own, which outlives a rank that is killed; the
    # one thread that writes needs no more than this.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(
        _sharded_state(policy, metadata, loading=False, with_rng=True),
        str(temporary),
        content_metadata={k: v for k, v in metadata.items() if isinstance(v, str)},
    )
    if dist.get_rank() == 0:
        layout = {name: getattr(parallel, name) for name in LAYOUT}
        text = json.dumps(
            {**state, "layout": layout, "world_size": dist.get_world_size()}, indent=2
        )
        (temporary / "state.json").write_text(text + "\n")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier(policy.groups.world)
    return target


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below ``folder``."""
    return next(reversed(_checkpoints(folder)), None)


def read_state(checkpoint: Path, parallel: ParallelConfig) -> dict[str, Any]:
    """The ``state`` that ``save`` was given. Raises UserError where the layout does not fit."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint}: expected a checkpoint folder with state.json, got none; name a folder "
            f"such as RUN/checkpoints/step-000010"
        ) from None
    for name in LAYOUT:
        saved, ours = state["layout"][name], getattr(parallel, name)
        if saved != ours:
            raise UserError(
                f"parallel.{name}: expected {saved}, the size that {checkpoint} was written with, "
                f"got {ours}; only the data- and context-parallel sizes may change on resume"
            )
    return state


def load(policy: Policy, checkpoint: Path, state: dict[str, Any]) -> None:
    """Fill ``policy`` from a checkpoint whose ``state`` has been read. Collective."""
    same_world = state["world_size"] == dist.get_world_size()
    with torch.no_grad():
        template = _sharded_state(policy, _metadata(policy), loading=True, with_rng=same_world)
        loaded = dist_checkpointing.load(template, str(checkpoint))
        for i, chunk in enumerate(policy.chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
        _restore_steps(policy)
        policy.scheduler.load_state_dict(loaded["scheduler"])
    if same_world:
        torch.set_rng_state(loaded["rng"]["torch"])
        tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])


def _restore_steps(policy: Policy) -> None:
    """Give torch's Adam its step counts back: upstream leaves them in the parameter groups."""
    for part in policy.optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                step = group.pop("step")
                for weight in group["params"]:
                    part.optimizer.state[weight]["step"] = torch.tensor(step)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").exists())


def _metadata(policy: Policy) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "dp_reshardable",
        "dp_cp_group": policy.groups.dp_cp,
    }


def _sharded_state(
    policy: Policy, metadata: dict[str, Any], *, loading: bool, with_rng: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(policy.chunks)
    }
    models = dict(state) if len(policy.chunks) > 1 else state["model0"]
    state["optimizer"] = policy.optimizer.sharded_state_dict(
        models, is_loading=loading, metadata=metadata
    )
    state["scheduler"] = policy.scheduler.state_dict()
    if with_rng:
        rng = {
            "torch": torch.get_rng_state(),
            "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
        rank, size = dist.get_rank(), dist.get_world_size()
        state["rng"] = ShardedObject("rng", rng, (size,), (rank,))
    return state
