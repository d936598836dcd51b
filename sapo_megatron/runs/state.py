"""The state of a run, as it lies beside the tensors of a checkpoint."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sapo_megatron.errors import UserError, first_problem
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.recipe.schema import ParallelConfig, Recipe, RolloutConfig
from sapo_megatron.sample import Prompt

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Sizes that a checkpoint is bound to."""

SAMPLING = (
    "num_generations",
    "temperature",
    "top_p",
    "max_prompt_length",
    "max_response_length",
)
"""Keys of the recipe's rollout that responses which were generated ahead are bound to."""


@dataclass(frozen=True, kw_only=True)
class QueuedGroup:
    """A group that was generated ahead; its responses are files of their own."""

    prompt: Prompt
    updates: int
    """Optimizer steps behind the weights that sampled it."""
    kept: bool
    """Whether it will be trained on; others only count in metrics."""
    unscored: int = 0
    """Responses that are left out of it."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What the training loop needs to go on: ``state.json`` of a checkpoint."""

    step: int
    """Steps that are done."""
    start: str
    """The weights that the run started from, relative to its folder."""
    model: dict[str, Any]
    """What the weights must agree on with the model that they are loaded into."""
    cursor: dict[str, Any]
    """Where the source of prompts stands."""
    eval: dict[str, float]
    """Scores before the first step."""
    wall_s: float
    """Seconds of the run so far."""
    layout: dict[str, int | None]
    """The sizes of :data:`LAYOUT`."""
    world_size: int
    moments: dict[str, list[list[float]]] = field(default_factory=dict)
    """Those of the router's latest measurements, by metric; none in states of before they were."""
    ahead: list[QueuedGroup] = field(default_factory=list)
    """Groups that were generated and not yet trained on, oldest first."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """How they were sampled: what of the recipe must stay until they are trained on."""


_ADAPTER: TypeAdapter[RunState] = TypeAdapter(RunState)


def identity(recipe: Recipe, arch: Architecture) -> dict[str, Any]:
    """What a checkpoint's weights must agree on with the model that they are loaded into."""
    return {**arch.config, "params_dtype": recipe.model.params_dtype}


def layout(parallel: ParallelConfig) -> dict[str, int | None]:
    """The sizes that a checkpoint is bound to."""
    return {name: getattr(parallel, name) for name in LAYOUT}


def sampling(rollout: RolloutConfig) -> dict[str, Any]:
    """What responses that were generated ahead must agree on with the run that trains on them."""
    return {name: getattr(rollout, name) for name in SAMPLING}


def write_state(checkpoint: Path, state: RunState) -> None:
    """Make ``checkpoint``, a folder that already holds the tensors, one that can be found."""
    (checkpoint / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")


def read_state(checkpoint: Path, parallel: ParallelConfig) -> RunState:
    """The state of ``checkpoint``.

    Raises UserError where there is none, where it is damaged, or where the layout differs.
    """
    path = checkpoint / "state.json"
    try:
        state = _ADAPTER.validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint}: expected a checkpoint folder with state.json, got none; name a folder "
            f"such as RUN/checkpoints/step-000010"
        ) from None
    except ValidationError as error:
        raise UserError(
            f"{path}: expected the state of a run, got something else ({first_problem(error)}); "
            f"resume from another checkpoint"
        ) from None
    for name, ours in layout(parallel).items():
        saved = state.layout.get(name)
        if saved != ours:
            raise UserError(
                f"parallel.{name}: expected {saved}, the size that {checkpoint} was written with, "
                f"got {ours}; only the data- and context-parallel sizes may change on resume"
            )
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints below ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").exists())


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below ``folder``."""
    return next(reversed(checkpoints(folder)), None)
