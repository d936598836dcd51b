"""Run folders: which one a run gets, and what refuses to be one."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.recipe.load import load, to_plain
from sapo_megatron.runs import folder as runs
from sapo_megatron.runs.state import RunState, write_state
from tests.support.tiny import write_recipe

DATA = "what the problems are"


def open_run(recipe, arch, resume=None, data=DATA):
    """The folder of a run whose newest checkpoint is whole, taken over and let go again."""
    with ExitStack() as stack:
        place, _ = runs.hold(runs.find_place(recipe, resume), stack)
        chosen = next(iter(place.checkpoints), None)
        run = runs.open_run(recipe, arch, place, chosen, data)
        run.take_over()
        return run


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
        model=read_architecture(recipe.model.path).config,
        recipe=to_plain(recipe),
        data=DATA,
        cursor={},
        eval={},
        wall_s=0.0,
        world_size=1,
        updates=step * recipe.train.num_mini_batches,
    )
    write_state(folder, state)
    return folder


def test_runs_are_numbered(recipe, arch):
    paths = [open_run(recipe, arch).path for _ in range(3)]
    assert [str(p) for p in paths] == [f"runs/recipe/run-00{i}" for i in (1, 2, 3)]
    Path("runs/recipe/run-1000").mkdir()
    Path("runs/recipe/run-old").mkdir()
    assert open_run(recipe, arch).path.name == "run-1001"
    assert load(paths[0] / "config.yaml") == recipe


def test_runs_started_at_once_do_not_share_a_folder(recipe, arch, monkeypatch):
    first = open_run(recipe, arch)
    monkeypatch.setattr(runs, "_numbered", lambda shared: [])  # as it was before the first began
    assert open_run(recipe, arch).path != first.path


def test_auto_takes_the_newest_run_that_has_a_checkpoint(recipe, arch):
    assert open_run(recipe, arch, "auto").checkpoint is None
    run = open_run(recipe, arch)
    add_checkpoint(run, recipe, 2)
    newest = add_checkpoint(run, recipe, 8)
    open_run(recipe, arch)
    found = open_run(recipe, arch, "auto")
    assert found.path == run.path
    assert found.checkpoint == newest
    assert found.state.step == 8
    assert found.start == Path("runs/recipe/cold-start-x").resolve()


def test_a_path_means_a_run_or_one_of_its_checkpoints(recipe, arch, monkeypatch):
    run = open_run(recipe, arch)
    early, late = (add_checkpoint(run, recipe, step).absolute() for step in (2, 8))
    assert open_run(recipe, arch, str(run.path)).checkpoint == late
    found = open_run(recipe, arch, str(early))
    assert (found.checkpoint, found.path) == (early, run.path.absolute())
    assert open_run(recipe, arch, "auto").checkpoint.name == early.name, "a new history"
    aside = run.path.absolute() / "abandoned-1"
    given_up = runs.find_run(recipe, arch, *runs.checkpoints_at(aside, "--checkpoint"))
    assert (given_up.path, given_up.start) == (aside, found.start)
    monkeypatch.chdir(early)
    assert runs.checkpoints_at(Path("."), "--checkpoint") == [early]
    assert runs.find_run(recipe, arch, early).path == found.path


def test_a_fixed_folder_starts_anew_only_where_nothing_is_lost(recipe, arch):
    fixed = load("recipe.yaml", {"train.run_dir": "here"})
    assert open_run(fixed, arch).path == Path("here")
    Path("here/metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="holds a run"):
        open_run(fixed, arch)
    # A job that is always started with --resume auto and died before its first checkpoint.
    assert open_run(fixed, arch, "auto").checkpoint is None


def test_weights_that_are_gone_are_missed_only_where_they_are_the_reference(recipe, arch):
    run = open_run(recipe, arch)
    add_checkpoint(run, recipe, 2)
    (run.shared / "cold-start-x" / "config.json").unlink()
    assert open_run(recipe, arch, "auto").state.step == 2
    other = load("recipe.yaml", {"algorithm.kl_coef": "0.1"})
    (found,) = runs.checkpoints_at(run.path, "--checkpoint")
    assert runs.find_run(other, arch, found).state.step == 2
    with pytest.raises(UserError, match=r"started from, the reference, at .*cold-start-x, got non"):
        open_run(other, arch, "auto")
    assert load(run.path / "config.yaml") == recipe  # as it was


def test_a_folder_that_cannot_be_written(recipe, arch):
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match=r"train.run_dir: .* runs/recipe: Not a directory"):
        open_run(recipe, arch)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "checkpoints").symlink_to("gone"), "No such file or directory"),
        (lambda run: (run / "checkpoints").write_text("a file"), "Not a directory"),
        (lambda run: (run / "checkpoints" / "step-000004").mkdir(parents=True), "state.json"),
        (lambda run: (run.parent / "run-002").symlink_to("gone"), "No such file or directory"),
    ],
)
def test_a_run_whose_checkpoints_cannot_be_seen_is_no_new_run(recipe, arch, spoil, said):
    run = open_run(recipe, arch)
    (run.path / "metrics.jsonl").write_text("{}")
    spoil(run.path)
    before = sorted(Path("runs").rglob("*"))
    with pytest.raises(UserError, match=f"checkpoints.*{said}"):
        open_run(recipe, arch, "auto")
    assert sorted(Path("runs").rglob("*")) == before


def test_runs_below_a_link_that_leads_nowhere(recipe, arch):
    Path("runs").symlink_to("gone/too")
    with pytest.raises(UserError, match=r"train.run_dir: .* runs/recipe: No such file"):
        open_run(recipe, arch)


def test_runs_below_a_link_find_what_they_started_from(recipe, arch, tmp_path):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    Path("runs").symlink_to("a/b/c")
    run = open_run(recipe, arch)
    add_checkpoint(run, recipe, 2)
    assert open_run(recipe, arch, "auto").start == (tmp_path / "a/b/c/recipe/cold-start-x")


def test_other_keys_of_the_model_s_config_are_no_other_model(recipe, arch):
    run = open_run(recipe, arch)
    add_checkpoint(run, recipe, 2)
    config = Path(recipe.model.path) / "config.json"
    values = json.loads(config.read_text())
    for key, value in (("torch_dtype", "bfloat16"), ("use_cache", False), ("eos_token_id", 3)):
        config.write_text(json.dumps({**values, key: value}))
        assert open_run(recipe, read_architecture(config.parent), "auto").state.step == 2
    config.write_text(json.dumps({**values, "rope_theta": 5e5}))
    with pytest.raises(UserError, match=r"its rope\.theta is 500000\.0 instead"):
        open_run(recipe, read_architecture(config.parent), "auto")


def test_a_run_that_is_being_written_is_refused_and_stays_as_it_was(recipe, arch):
    run = open_run(recipe, arch)
    add_checkpoint(run, recipe, 2)
    (run.path / "lock").write_text("1 elsewhere x")
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        open_run(load("recipe.yaml", {"train.steps": "20"}), arch, "auto")
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_what_is_of_no_use_any_more_goes(recipe, arch):
    run = open_run(recipe, arch)
    add_checkpoint(run, recipe, 2)
    left = run.checkpoints / ".step-000003.tmp"
    left.mkdir()
    (run.path / "summary.json").write_text("{}")
    open_run(load("recipe.yaml", {"train.steps": "2"}), arch, "auto")
    assert (run.path / "summary.json").exists()
    open_run(recipe, arch, "auto")
    assert not left.exists()
    assert not (run.path / "summary.json").exists(), "that of a shorter run"
