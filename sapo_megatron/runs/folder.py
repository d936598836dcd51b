"""Run folders: ``config.yaml``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``, ``report/``.

Runs of a recipe lie side by side below ``runs/<name>`` as ``run-001``, ``run-002``, ...; what they
share (initial weights, the cold start) lies beside them. A file ``stop`` in a run's folder ends the
run after the step it is at, with a checkpoint.
"""

import copy
import dataclasses
import json
import os
import re
import shutil
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sapo_megatron.errors import UserError
from sapo_megatron.files import write_whole
from sapo_megatron.hf.architecture import Architecture, parse_architecture
from sapo_megatron.hf.folder import SAME, sizes
from sapo_megatron.recipe.load import to_plain, to_yaml
from sapo_megatron.recipe.resume import check_bound, going_on
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.runs.history import MANIFEST, abandon, checkpoints, home, settle
from sapo_megatron.runs.lock import Lock
from sapo_megatron.runs.state import RunState, listed, read_state

RUNS = Path("runs")
COMPUTED = (*SAME, "norm_eps", "rope")
"""What of an architecture the weights, or what they compute, depend on."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's folder, and where the run goes on from."""

    path: Path
    shared: Path
    """What runs of this recipe have in common."""
    recipe: Recipe
    """What the run does: as it was asked to, with what a resume keeps."""
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
        return (home(self.path.resolve()) / self.state.start).resolve() if self.state else None

    def updates(self, step: int) -> int:
        """Updates of all steps up to ``step``, before a resume as many as there were."""
        done, at = (self.state.updates, self.state.step) if self.state else (0, 0)
        return done + (step - at) * self.recipe.train.num_mini_batches

    def take_over(self) -> None:
        """Put aside what is newer than the checkpoint, and write ``config.yaml``.

        Another one before it stays, as that of the steps up to then.
        """
        settle(self.path)
        if self.state:
            abandon(self.path, after=self.state.step)
            if self.state.step < self.recipe.train.steps:  # one that is there tells of fewer steps
                (self.path / "summary.json").unlink(missing_ok=True)
        for left in self.checkpoints.glob(".step-*.tmp"):  # of a process that was killed
            shutil.rmtree(left)
        if self.state and self.state.recipe != to_plain(self.recipe):
            before = yaml.safe_dump(self.state.recipe, sort_keys=False)
            write_whole(self.path / f"config-{self.state.step:06d}.yaml", before)
        write_whole(self.path / "config.yaml", to_yaml(self.recipe))

    @property
    def stop_requested(self) -> bool:
        """Whether somebody has put a file ``stop`` into the folder."""
        return (self.path / "stop").exists()

    def forget_stop_request(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run may go on, or begin."""

    shared: Path
    """What runs of this recipe have in common."""
    path: Path | None
    """The run's folder; None for one that is to be numbered."""
    checkpoints: list[Path]
    """Those that it may go on from, of which it takes the first that is whole; none: a new run."""


def find_place(recipe: Recipe, resume: str | None) -> Place:
    """Where this run is to be; nothing is written.

    ``resume``: None for a new run, ``auto`` for the newest one that has a checkpoint (or a new one
    where none has), else a run folder or one of its checkpoints. Raises UserError where that is
    none, or where a folder cannot be read.
    """
    explicit = recipe.train.run_dir
    shared = Path(explicit) if explicit else RUNS / recipe.name
    found: list[Path] = []
    if resume == "auto":
        runs = [shared] if explicit else _numbered(shared)
        found = next(filter(None, (checkpoints(run)[::-1] for run in runs)), [])
    elif resume:
        found = checkpoints_at(Path(resume), "--resume")
    elif explicit and (shared / "metrics.jsonl").exists():
        raise UserError(
            f"train.run_dir: expected a new folder, got {shared}, which holds a run; go on with it "
            f"(--resume auto) or name another"
        )
    path = _run_of(found[0]) if found else shared if explicit else None
    if found and not path:
        raise UserError(
            f"--resume: expected a checkpoint of a run, RUN/checkpoints/{found[0].name} beside "
            f"RUN/config.yaml, got {found[0]}; put it there"
        )
    return Place(shared=shared, path=path, checkpoints=found)


def hold(place: Place, stack: ExitStack) -> tuple[Place, Lock]:
    """The place with a folder, which is made, and the right to write there until ``stack`` ends.

    Raises UserError for a folder that another process writes, or nobody can.
    """
    path = place.path or place.shared
    try:
        path = place.path or _make_next(place.shared)
        path.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(closing(Lock(path)))
    except OSError as error:
        raise UserError(
            f"train.run_dir: expected a folder that can be written, got {path}: "
            f"{error.strerror}; name another"
        ) from None
    return dataclasses.replace(place, path=path), lock


def open_run(
    recipe: Recipe,
    arch: Architecture,
    place: Place,
    chosen: Path | None,
    data: str | None,
) -> RunFolder:
    """The run in a folder that is held, which goes on from ``chosen``; for one process.

    ``data`` stands for the training problems, which must be the checkpoint's; None: they may be
    others. Raises UserError for a checkpoint that does not fit. Nothing is written before
    ``RunFolder.take_over``.
    """
    assert place.path, "it is held"
    if not chosen:
        return RunFolder(path=place.path, shared=place.shared, recipe=recipe)
    run = _reopen(chosen, place.path, place.shared, recipe, arch, training=True)
    return _go_on(run, data)


def find_run(recipe: Recipe, arch: Architecture, checkpoint: Path) -> RunFolder:
    """The run of a checkpoint, to read only. Raises UserError if it does not fit."""
    path = _run_of(checkpoint) or checkpoint.parent.parent
    return _reopen(checkpoint, path, checkpoint, recipe, arch, training=False)


def checkpoints_at(path: Path, option: str) -> list[Path]:
    """The checkpoints that a user's path means: itself, or those of a run, newest first.

    Raises UserError where there are none.
    """
    path = Path(os.path.abspath(path))
    itself = any((path / name).exists() for name in ("state.json", MANIFEST))
    if not path.is_dir() or not (found := [path] if itself else checkpoints(path)[::-1]):
        raise UserError(
            f"{option}: expected a run folder with checkpoints, or a checkpoint folder, got {path}"
        )
    return found


def _run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint is of, also where a link leads to it."""
    places = (checkpoint, Path(os.path.realpath(checkpoint)))
    runs = (place.parent.parent for place in places)
    return next((run for run in runs if (run / "config.yaml").exists()), None)


def _reopen(
    checkpoint: Path,
    path: Path,
    shared: Path,
    recipe: Recipe,
    arch: Architecture,
    *,
    training: bool,
) -> RunFolder:
    state = read_state(checkpoint)
    check_bound(state.recipe, recipe, checkpoint, ahead=training and bool(state.ahead))
    saved = sizes(parse_architecture(state.model, checkpoint / "state.json"), COMPUTED)
    ours = sizes(arch, COMPUTED)
    for key in sorted(ours.keys() | saved.keys()):
        if saved.get(key) != ours.get(key):
            raise UserError(
                f"model.path: expected the model that {checkpoint} was written with, got another: "
                f"its {key} is {ours.get(key)!r} instead of {saved.get(key)!r}"
            )
    return RunFolder(path=path, shared=shared, recipe=recipe, checkpoint=checkpoint, state=state)


def _go_on(run: RunFolder, data: str | None) -> RunFolder:
    """``run`` with what it keeps of the recipe before. Raises UserError where it cannot go on."""
    recipe, state, start = run.recipe, run.state, run.start
    assert state, "there is a checkpoint"
    assert start, "and with it what the run started from"
    if state.step > recipe.train.steps:
        raise UserError(
            f"train.steps: expected at least {state.step}, the steps that {run.checkpoint} has "
            f"behind it, got {recipe.train.steps}; raise it"
        )
    if recipe.algorithm.kl_coef > 0 and not (start / "config.json").exists():
        raise UserError(
            f"algorithm.kl_coef: expected the weights that the run started from, the reference, at "
            f"{start}, got none; put them back, or set algorithm.kl_coef=0"
        )
    if data not in (None, state.data):
        raise UserError(
            f"data.train: expected the problems that {run.checkpoint} has its place in, in their "
            f"order, got others; set data.train back, or go on at this place in them (--new-data)"
        )
    before = copy.deepcopy(state.recipe)
    given = (recipe.train.run_dir, before["train"]["run_dir"])
    here = [place for place in given if place and Path(place).resolve() == run.path.resolve()]
    if here or given[1]:  # else a numbered one, of which the name says where it is
        before["train"]["run_dir"] = here[0] if here else str(run.path.absolute())
    return dataclasses.replace(run, recipe=going_on(before, recipe))


def _numbered(shared: Path) -> list[Path]:
    """Newest first."""
    runs = (shared / name for name in listed(shared) if re.fullmatch(r"run-\d+", name))
    return sorted(runs, key=_number, reverse=True)


def _number(run: Path) -> int:
    return int(run.name.removeprefix("run-"))


def _make_next(shared: Path) -> Path:
    number = max(map(_number, _numbered(shared)), default=0) + 1
    shared.mkdir(parents=True, exist_ok=True)
    while True:
        path = shared / f"run-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # another run was faster
            number += 1
        else:
            return path
