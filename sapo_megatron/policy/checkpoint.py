"""Save and resume: weights, optimizer, schedule, RNG, data cursor, step.

A checkpoint is a folder ``step-000012`` of megatron-core's ``dist_checkpointing`` files and a
``state.json``. It is written under another name and renamed when it is whole, so a crash while
writing leaves the one before it valid. It loads into any data-parallel size; the other sizes of
the layout must be those it was written with.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from safetensors.torch import load_file, save_file

from sapo_megatron.policy import compat
from sapo_megatron.policy.parallel import failing_together
from sapo_megatron.policy.step import Policy
from sapo_megatron.runs.state import RunState, checkpoints, write_state

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

    ``beside`` writes what else belongs into its folder, on each rank. Collective over all ranks.
    Raises RunFailed, and writes nothing, where a weight is not finite.
    """
    target = folder / f"step-{state.step:06d}"
    policy.model.weights.check_finite(target)
    temporary = folder / f".{target.name}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    # Over the world: every rank saves, and none writes before the folder is there.
    dist.barrier(policy.groups.world)
    beside(temporary)
    metadata = _metadata(policy)
    compat.write_with_threads()
    dist_checkpointing.save(
        _sharded_state(policy, metadata, loading=False),
        str(temporary),
        content_metadata={k: v for k, v in metadata.items() if isinstance(v, str)},
    )
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    save_file({"torch": torch.get_rng_state(), **tracked}, _rng_file(temporary))
    # Over the world: the folder has every rank's files before it gets its name.
    dist.barrier(policy.groups.world)
    if torch.cuda.is_available():
        # The writer copied the whole state through pinned memory, which torch would keep.
        torch._C._host_emptyCache()
    if dist.get_rank() == 0:
        write_state(temporary, state)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    # Over the world: no rank goes on before the checkpoint can be found.
    dist.barrier(policy.groups.world)
    return target


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

    megatron-core 0.19 tells groups apart by the learning rates, too, and would not find others.
    """
    first = policy.optimizer.param_groups[0]
    for name, value in loaded.items():
        if name == "param_groups":
            for group in value:
                group.update({setting: first[setting] for setting in SETTINGS})
        elif isinstance(value, dict):
            _keep_settings(policy, value)


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
    state["scheduler"] = policy.scheduler.state_dict()
    return state
