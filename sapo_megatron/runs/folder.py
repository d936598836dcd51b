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
from sapo_megatron.runs.state import RunState, latest, listed, read_state

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
        return (self.path.resolve() / self.state.start).resolve() if self.state else None

    def updates(self, step: int) -> int:
        """Updates of all steps up to ``step``, before a resume as many as there were."""
        done, at = (self.state.updates, self.state.step) if self.state else (0, 0)
        return done + (step - at) * self.recipe.train.num_mini_batches

    def write_recipe(self) -> None:
        """Write ``config.yaml``; another one before it stays, as that of the steps up to then."""
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


def find_checkpoint(recipe: Recipe, resume: str | None) -> Path | None:
    """The checkpoint that ``resume``, as in ``open_run``, means; None: a new run is asked for.

    Raises UserError where there is none to name, or where a folder cannot be read.
    """
    if resume != "auto":
        return _checkpoint_at(Path(resume), "--resume") if resume else None
    shared = _shared(recipe)
    for run in [shared] if recipe.train.run_dir else _numbered(shared):
        found = latest(run / "checkpoints")
        if found is None and any(n.startswith("step-") for n in listed(run / "checkpoints")):
            raise UserError(
                f"--resume: expected a whole checkpoint in {run / 'checkpoints'}, got none that "
                f"has a state.json; put it back, or name another run"
            )
        if found:
            return found
    return None


def open_run(recipe: Recipe, arch: Architecture, resume: str | None, data: str | None) -> RunFolder:
    """Choose and make the folder of this run; for one process, the others are told.

    ``resume``: None for a new run, ``auto`` for the newest one that has a checkpoint (or a new one
    where none has), else a run folder or one of its checkpoints. ``data`` stands for the training
    problems, which must be the checkpoint's; None: they may be others. Raises UserError for a
    folder that does not fit; then nothing has been written. A resumed run's is not written to
    before ``RunFolder.write_recipe``.
    """
    shared, explicit = _shared(recipe), recipe.train.run_dir
    if found := find_checkpoint(recipe, resume):
        return _go_on(_reopen(found, shared, recipe, arch, training=True), data)
    if explicit and not resume and (shared / "metrics.jsonl").exists():
        raise UserError(
            f"train.run_dir: expected a new folder, got {shared}, which holds a run; go on with it "
            f"(--resume auto) or name another"
        )
    path = shared
    try:
        if not explicit:
            path = _make_next(shared)
        path.mkdir(parents=True, exist_ok=True)
        run = RunFolder(path=path, shared=shared, recipe=recipe)
        run.write_recipe()
    except OSError as error:
        raise UserError(
            f"train.run_dir: expected a folder that can be written, got {path}: "
            f"{error.strerror}; name another"
        ) from None
    return run


def find_run(recipe: Recipe, arch: Architecture, path: Path) -> RunFolder:
    """The run with a checkpoint at ``path``, to read only. Raises UserError if it does not fit."""
    return _reopen(_checkpoint_at(path, "--checkpoint"), path, recipe, arch, training=False)


def _shared(recipe: Recipe) -> Path:
    return Path(recipe.train.run_dir) if recipe.train.run_dir else RUNS / recipe.name


def _reopen(
    checkpoint: Path, shared: Path, recipe: Recipe, arch: Architecture, *, training: bool
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
    run = checkpoint.parents[1]
    if not (run / "config.yaml").exists():
        run = checkpoint.resolve().parents[1]  # a link may lead to it
    if training and not (run / "config.yaml").exists():
        raise UserError(
            f"--resume: expected a checkpoint of a run, RUN/checkpoints/{checkpoint.name} beside "
            f"RUN/config.yaml, got {checkpoint}; put it there"
        )
    return RunFolder(path=run, shared=shared, recipe=recipe, checkpoint=checkpoint, state=state)


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
