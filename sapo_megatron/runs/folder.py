"""Run folders: ``config.yaml``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``, ``report/``.

Runs of a recipe lie side by side below ``runs/<name>`` as ``run-001``, ``run-002``, ...; what they
share (initial weights, the cold start) lies beside them. A file ``stop`` in a run's folder ends the
run after the step it is at, with a checkpoint.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_megatron.errors import UserError
from sapo_megatron.files import write_whole
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.recipe.load import to_yaml
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.runs.state import RunState, identity, latest, read_state, sampling

RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's folder, and where the run goes on from."""

    path: Path
    shared: Path
    """What runs of this recipe have in common."""
    checkpoint: Path | None = None
    """The checkpoint to go on from; None for a new run."""
    state: RunState | None = None
    """What was saved with the checkpoint."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def start(self) -> Path | None:
        """The weights that the run started from, once it has a checkpoint."""
        return (self.path / self.state.start).resolve() if self.state else None

    @property
    def stop_requested(self) -> bool:
        """Whether somebody has put a file ``stop`` into the folder."""
        return (self.path / "stop").exists()

    def forget_stop_request(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def open_run(recipe: Recipe, arch: Architecture, resume: str | None) -> RunFolder:
    """Choose and make the folder of this run; for one process, the others are told.

    ``resume``: None for a new run, ``auto`` for the newest one that has a checkpoint (or a new one
    where none has), else a run folder or one of its checkpoints. Raises UserError for a folder
    that does not fit; then nothing has been written.
    """
    explicit = recipe.train.run_dir
    shared = Path(explicit) if explicit else RUNS / recipe.name
    runs = [shared] if explicit else _numbered(shared)
    found = None
    if resume == "auto":
        found = next((c for run in runs if (c := latest(run / "checkpoints"))), None)
    elif resume:
        found = _checkpoint_at(Path(resume), "--resume")
    run = RunFolder(path=shared, shared=shared)
    if found:
        run = _reopen(found, shared, recipe, arch)
        _check_queue(run, recipe)
        if run.state and run.state.step > recipe.train.steps:
            raise UserError(
                f"train.steps: expected at least {run.state.step}, the steps that {found} has "
                f"behind it, got {recipe.train.steps}; raise it"
            )
    elif explicit and not resume and (shared / "metrics.jsonl").exists():
        raise UserError(
            f"train.run_dir: expected a new folder, got {shared}, which holds a run; go on with it "
            f"(--resume auto) or name another"
        )
    try:
        if not (found or explicit):
            run = RunFolder(path=_make_next(shared), shared=shared)
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(run.path / "config.yaml", to_yaml(recipe))
    except OSError as error:
        raise UserError(
            f"train.run_dir: expected a folder that can be written, got {run.path}: "
            f"{error.strerror}; name another"
        ) from None
    return run


def find_run(recipe: Recipe, arch: Architecture, path: Path) -> RunFolder:
    """The run with a checkpoint at ``path``, to read only. Raises UserError if it does not fit."""
    return _reopen(_checkpoint_at(path, "--checkpoint"), path, recipe, arch)


def _reopen(checkpoint: Path, shared: Path, recipe: Recipe, arch: Architecture) -> RunFolder:
    state = read_state(checkpoint, recipe.parallel)
    ours = identity(recipe, arch)
    for key in sorted(ours.keys() | state.model.keys()):
        saved, got = state.model.get(key), ours.get(key)
        if saved != got:
            raise UserError(
                f"model.path: expected the model that {checkpoint} was written with, got another: "
                f"its {key} is {got!r} instead of {saved!r}"
            )
    path = checkpoint.parent.parent
    run = RunFolder(path=path, shared=shared, checkpoint=checkpoint, state=state)
    start = (path / state.start).resolve()
    if not (start / "config.json").exists():
        raise UserError(
            f"{checkpoint}: expected the weights that the run started from at {start}, got none; "
            f"put them back"
        )
    return run


def _check_queue(run: RunFolder, recipe: Recipe) -> None:
    ours = sampling(recipe.rollout)
    for key, saved in run.state.sampling.items() if run.state and run.state.ahead else ():
        if ours.get(key) != saved:
            raise UserError(
                f"rollout.{key}: expected {saved}, with which {run.checkpoint} has responses that "
                f"were generated ahead (rollout.async_steps), got {ours.get(key)}; set it back"
            )


def _checkpoint_at(path: Path, option: str) -> Path:
    """The checkpoint that a user's path means: itself, or the newest of a run."""
    whole = (path / "state.json").exists()
    found = path if whole else latest(path / "checkpoints")
    if found is None:
        raise UserError(
            f"{option}: expected a run folder with checkpoints, or a checkpoint folder, got {path}"
        )
    return Path(os.path.abspath(found))


def _numbered(shared: Path) -> list[Path]:
    """Newest first."""
    runs = (p for p in shared.glob("run-*") if p.name.removeprefix("run-").isdigit())
    return sorted(runs, key=_number, reverse=True)


def _number(run: Path) -> int:
    return int(run.name.removeprefix("run-"))


def _make_next(shared: Path) -> Path:
    number = max(map(_number, _numbered(shared)), default=0) + 1
    while True:
        path = shared / f"run-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run was faster
            number += 1
        else:
            return path
