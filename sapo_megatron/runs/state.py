"""The state of a run, as it lies beside the tensors of a checkpoint."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sapo_megatron.errors import UserError, first_problem
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.recipe.schema import ParallelConfig, Recipe

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Sizes that a checkpoint is bound to."""


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


_ADAPTER: TypeAdapter[RunState] = TypeAdapter(RunState)


def identity(recipe: Recipe, arch: Architecture) -> dict[str, Any]:
    """What a checkpoint's weights must agree on with the model that they are loaded into."""
    return {**arch.config, "params_dtype": recipe.model.params_dtype}


def layout(parallel: ParallelConfig) -> dict[str, int | None]:
    """The sizes that a checkpoint is bound to."""
    return {name: getattr(parallel, name) for name in LAYOUT}


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
