"""Run folders: which one a run gets, and what refuses to be one."""

import os
from pathlib import Path

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.recipe.load import load
from sapo_megatron.runs import folder as runs
from sapo_megatron.runs.state import LAYOUT, RunState, identity, write_state
from tests.support.tiny import write_recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return load(write_recipe(tmp_path, train={"steps": 9}))


@pytest.fixture
def arch(recipe):
    return read_architecture(recipe.model.path)


def add_checkpoint(run, recipe, step):
    """What ``find_run`` and ``open_run`` look at, without any weights."""
    start = run.shared / "cold-start-x"
    start.mkdir(parents=True, exist_ok=True)
    (start / "config.json").write_text("{}")
    folder = run.checkpoints / f"step-{step:06d}"
    folder.mkdir(parents=True)
    state = RunState(
        step=step,
        start=os.path.relpath(start, run.path),
        model=identity(recipe, read_architecture(recipe.model.path)),
        cursor={},
        eval={},
        wall_s=0.0,
        layout=dict.fromkeys(LAYOUT, 1) | {"virtual_pipeline_model_parallel_size": None},
        world_size=1,
    )
    write_state(folder, state)
    return folder


def test_runs_are_numbered(recipe, arch):
    paths = [runs.open_run(recipe, arch, None).path for _ in range(3)]
    assert [str(p) for p in paths] == [f"runs/recipe/run-00{i}" for i in (1, 2, 3)]
    Path("runs/recipe/run-1000").mkdir()
    Path("runs/recipe/run-old").mkdir()
    assert runs.open_run(recipe, arch, None).path.name == "run-1001"
    assert load(paths[0] / "config.yaml") == recipe


def test_runs_started_at_once_do_not_share_a_folder(recipe, arch, monkeypatch):
    first = runs.open_run(recipe, arch, None)
    monkeypatch.setattr(runs, "_numbered", lambda shared: [])  # as it was before the first began
    assert runs.open_run(recipe, arch, None).path != first.path


def test_auto_takes_the_newest_run_that_has_a_checkpoint(recipe, arch):
    assert runs.open_run(recipe, arch, "auto").checkpoint is None
    run = runs.open_run(recipe, arch, None)
    add_checkpoint(run, recipe, 2)
    newest = add_checkpoint(run, recipe, 8)
    (run.checkpoints / "step-000009").mkdir()  # not whole
    runs.open_run(recipe, arch, None)
    found = runs.open_run(recipe, arch, "auto")
    assert found.path == run.path
    assert found.checkpoint == newest
    assert found.state.step == 8
    assert found.start == Path("runs/recipe/cold-start-x").resolve()


def test_a_path_means_a_run_or_one_of_its_checkpoints(recipe, arch, monkeypatch):
    run = runs.open_run(recipe, arch, None)
    early, late = (add_checkpoint(run, recipe, step).absolute() for step in (2, 8))
    assert runs.open_run(recipe, arch, str(run.path)).checkpoint == late
    found = runs.open_run(recipe, arch, str(early))
    assert (found.checkpoint, found.path) == (early, run.path.absolute())
    monkeypatch.chdir(early)
    assert runs.find_run(recipe, arch, Path(".")).path == found.path


def test_a_fixed_folder_starts_anew_only_where_nothing_is_lost(recipe, arch):
    fixed = load("recipe.yaml", {"train.run_dir": "here"})
    assert runs.open_run(fixed, arch, None).path == Path("here")
    Path("here/metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="holds a run"):
        runs.open_run(fixed, arch, None)
    # A job that is always started with --resume auto and died before its first checkpoint.
    assert runs.open_run(fixed, arch, "auto").checkpoint is None


def test_weights_that_are_gone_are_missed(recipe, arch):
    run = runs.open_run(recipe, arch, None)
    add_checkpoint(run, recipe, 2)
    (run.shared / "cold-start-x" / "config.json").unlink()
    with pytest.raises(UserError, match=r"started from at .*cold-start-x, got none"):
        runs.open_run(recipe, arch, "auto")


def test_another_precision_is_another_model(recipe, arch):
    run = runs.open_run(recipe, arch, None)
    add_checkpoint(run, recipe, 2)
    other = load("recipe.yaml", {"model.params_dtype": "bfloat16"})
    with pytest.raises(UserError, match="params_dtype is 'bfloat16' instead of 'float32'"):
        runs.open_run(other, arch, "auto")
    assert load(run.path / "config.yaml") == recipe  # as it was


def test_a_folder_that_cannot_be_written(recipe, arch):
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match=r"train.run_dir: .* runs/recipe: Not a directory"):
        runs.open_run(recipe, arch, None)
