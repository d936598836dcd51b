"""The state of a run, as it lies beside the tensors of a checkpoint."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sapo_megatron.errors import UserError, first_problem
from sapo_megatron.sample import Prompt


@dataclass(frozen=True, kw_only=True)
class QueuedGroup:
    """A group that was generated ahead; its responses are files of their own."""

    prompt: Prompt
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
    """The model's ``config.json``."""
    recipe: dict[str, Any]
    """The recipe of the steps before, as data."""
    data: str
    """Stands for the problems that ``cursor`` is a place in."""
    cursor: dict[str, Any]
    """Where the source of prompts stands."""
    eval: dict[str, float]
    """Scores before the first step."""
    wall_s: float
    """Seconds of the run so far."""
    world_size: int
    updates: int
    """Updates of the steps, those that were skipped included."""
    moments: dict[str, list[list[float]]] = field(default_factory=dict)
    """Those of the router's latest measurements, by metric; none in states of before they were."""
    ahead: list[QueuedGroup] = field(default_factory=list)
    """Groups that were generated and not yet trained on, oldest first."""


_ADAPTER: TypeAdapter[RunState] = TypeAdapter(RunState)


def write_state(checkpoint: Path, state: RunState) -> None:
    """Make ``checkpoint``, a folder that already holds the tensors, one that can be found."""
    (checkpoint / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")


def read_state(checkpoint: Path) -> RunState:
    """The state of ``checkpoint``. Raises UserError where there is none, or a damaged one."""
    path = checkpoint / "state.json"
    try:
        return _ADAPTER.validate_json(path.read_bytes(), strict=True)
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


def listed(folder: Path) -> list[str]:
    """The names in ``folder``; none where nothing is there.

    Raises UserError where it cannot be read: a run may be in it that is not seen.
    """
    try:
        return os.listdir(folder)
    except OSError as error:
        links = [place for place in (folder, *folder.parents) if place.is_symlink()]
        if isinstance(error, FileNotFoundError) and all(link.exists() for link in links):
            return []
        raise UserError(
            f"train.run_dir: expected a folder that can be read, got {folder}: {error.strerror}; "
            f"make it readable, or name another"
        ) from None
