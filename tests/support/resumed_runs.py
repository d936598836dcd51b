"""What the tests of resumed runs do on a rank: a run, and others that go on from it."""

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.policy import parallel, step
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.runs.state import read_state
from sapo_megatron.training import loop, update
from sapo_megatron.training.inputs import read_inputs, read_model
from sapo_megatron.training.session import export_checkpoint
from tests.support.tiny import read_metrics, write_recipe
from tests.support.whole_runs import message_of, run


def everything(folder: Path) -> dict[str, dict[str, Any]]:
    """By subject: what was found."""
    write_recipe(folder, cold_start={"steps": 1, "batch_size": 4})
    os.chdir(folder)
    first = folder / "first"
    run(folder, train__run_dir=first, train__steps=2, checkpoint__keep=9, checkpoint__every=1)
    place = read_state(first / "checkpoints" / "step-000002").cursor["index"]
    found = {
        "changed": _changed(folder, first),
        "data": {**_data(folder, first), "place": place},
        "moved": _moved(folder, first),
        "weights": _not_finite(folder, first),
        "skipped": _skipped(folder),
    }
    return found


def _changed(folder: Path, first: Path) -> dict[str, Any]:
    with _told() as told:
        changes = {"optimizer__lr": 1e-5, "cold_start__steps": 7, "reward__num_workers": 2}
        run(folder, str(_copy(first, "changed")), train__steps=3, **changes)
    where = folder / "changed"
    names = ("config.yaml", "config-000002.yaml")
    recipes = [yaml.safe_load((where / name).read_text()) for name in names]
    return {"told": told, "recipes": recipes, "lr": [m["actor/lr"] for m in read_metrics(where)]}


def _data(folder: Path, first: Path) -> dict[str, Any]:
    where = _copy(first, "data")
    changes = {"train__steps": 3, "data__train__seed": 5}
    refused = message_of(UserError, folder, str(where), **changes)
    overrides = {key.replace("__", "."): str(value) for key, value in changes.items()}
    recipe = load(folder / "recipe.yaml", overrides)
    untouched = sorted(path.name for path in where.glob("config*"))
    loop.train(recipe, read_inputs(recipe, 1), str(where), new_data=True)
    parallel.teardown()
    went_on = read_state(where / "checkpoints" / "step-000003").cursor["index"]
    return {"refused": refused, "untouched": untouched, "went on": went_on}


def _moved(folder: Path, first: Path) -> dict[str, Any]:
    """A run that is found by a link, in a folder of its own, without what it started from."""
    (folder / "deep" / "er").mkdir(parents=True)
    shutil.move(_copy(first, "moved"), folder / "deep" / "er" / "run")
    (folder / "link").symlink_to(folder / "deep" / "er" / "run")
    for path in (folder / "link").glob("cold-start-*"):
        shutil.rmtree(path)
    (folder / "newest").symlink_to(folder / "link" / "checkpoints" / "step-000002")
    os.environ["HERE"] = str(folder)
    run(folder, "auto", train__run_dir="$HERE/link", train__steps=3)
    run(folder, str(folder / "newest"), train__steps=3)  # an older one
    (folder / "sums.jsonl").rename(folder / "gone.jsonl")
    config = folder / "model" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("{", '{"transformers_version": "9", "use_cache": true,', 1))
    recipe = load(folder / "recipe.yaml")
    model = read_model(recipe, 1, weights=False)
    export_checkpoint(recipe, *model, folder / "newest", folder / "out")
    parallel.teardown()
    config.write_text(before)
    (folder / "gone.jsonl").rename(folder / "sums.jsonl")
    apart = shutil.copytree(folder / "newest", folder / "apart" / "step-000002")
    return {
        "steps": [line["step"] for line in read_metrics(folder / "link")],
        "run_dir": load(folder / "link" / "config.yaml").train.run_dir,
        "exported": sorted(path.suffix for path in (folder / "out").iterdir()),
        "apart": message_of(UserError, folder, str(apart), train__steps=3),
    }


def _not_finite(folder: Path, first: Path) -> dict[str, Any]:
    """An update that ruins the weights; a cold start that does, or whose log-probs are ruined."""
    where = _copy(first, "ruined")
    ruin, values = Policy.update, [math.inf]

    def ruined(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = ruin(self, *args, **kwargs)
        if kwargs["where"] in ("step 3, mini-batch 2 of 2", "cold start, step 1"):
            with torch.no_grad():
                self.model.chunks[0].output_layer.weight[5, 3] = values[0]
        return done

    found = {}
    lent = {path.name for path in folder.glob("*/cold-start-*")}
    Policy.update = ruined
    try:
        found["saved"] = message_of(RunFailed, folder, str(where), train__steps=3)
        found["left"] = sorted(path.name for path in (where / "checkpoints").iterdir())
        for name, values[0] in (("infinite", math.inf), ("too large", 3e38)):
            at = folder / name
            found[name] = message_of(RunFailed, folder, None, train__run_dir=at, train__seed=2)
            found[f"{name} left"] = [p.name for p in at.glob("*start*") if p.name not in lent]
    finally:
        Policy.update = ruin
    return found


def _skipped(folder: Path) -> dict[str, Any]:
    policy_loss = update.policy_loss

    def bad(*args: Any, **kwargs: Any) -> Any:
        loss, metrics = policy_loss(*args, **kwargs)
        return loss * math.nan, metrics

    step.MOST_SKIPPED, most = 3, step.MOST_SKIPPED
    update.policy_loss = bad
    try:
        options = {"train__on_nonfinite": "skip", "train__steps": 9, "cold_start__steps": 0}
        return {"ended": message_of(RunFailed, folder, None, **options)}
    finally:
        update.policy_loss, step.MOST_SKIPPED = policy_loss, most


def _copy(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.parent / name))


@contextmanager
def _told() -> Iterator[list[str]]:
    """What is logged in the block of changed keys."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("changed: "):
                told.append(record.getMessage())

    logger, handler = logging.getLogger("sapo_megatron"), Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield told
    logger.removeHandler(handler)
