"""Checkpoints that were made to run code: one line says what they hold, and nothing ran."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from sapo_megatron.errors import UserError
from sapo_megatron.policy import compat, parallel
from sapo_megatron.recipe.load import load
from sapo_megatron.training.inputs import read_inputs
from sapo_megatron.training.loop import train
from sapo_megatron.training.session import evaluate_checkpoint, export_checkpoint
from tests.support.gloo import run_ranks
from tests.support.hostile import by_hand, craft, payloads, places
from tests.support.tiny import write_recipe

MARK = Path("ran")
HOSTILE = {**payloads(MARK), **by_hand(MARK)}
"""Whatever runs makes this file in the working folder."""


def said_of(checkpoint: Path, load: Any) -> str:
    """What is said of a checkpoint that must be refused."""
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert not MARK.exists()
    assert "\n" not in message
    assert message.startswith(str(checkpoint)), message
    assert "weights_only" not in message  # how torch would be made to take it
    return message


# What describes a checkpoint, and what is in it


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    state = {"tensor": torch.ones(3), "value": {"lr": 1.0}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    described = dcp.FileSystemReader(folder).read_metadata()
    described.storage_meta = None  # torch's own writer keeps a Path there
    return craft(folder, folder.with_name("as ours"), ".metadata", described)


def read(checkpoint):
    state: dict[str, Any] = {"tensor": torch.zeros(3), "value": {"lr": 0.0}}
    with compat.reading(checkpoint):
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def test_an_honest_one_is_read(plain):
    before = torch.load, torch.serialization.get_safe_globals(), dcp.FileSystemReader.read_data
    state = read(plain)
    assert state["tensor"].tolist() == [1, 1, 1]
    assert state["value"] == {"lr": 1.0}
    after = torch.load, torch.serialization.get_safe_globals(), dcp.FileSystemReader.read_data
    assert after[0] is before[0]
    assert set(after[1]) == set(before[1])
    assert after[2] is before[2]


@pytest.mark.parametrize("payload", HOSTILE)
@pytest.mark.parametrize("place", [".metadata", "tensor", "value.lr"])
def test_what_runs_is_refused(plain, tmp_path, monkeypatch, place, payload):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    attributes = dict(vars(Metadata))
    crafted = craft(plain, tmp_path / "crafted", place, HOSTILE[payload])
    message = said_of(crafted, lambda: read(crafted))
    file = ".metadata" if place == ".metadata" else "__0_0.distcp"
    assert message.startswith(f"{crafted / file}: expected tensors and values of a checkpoint")
    assert dict(vars(Metadata)) == attributes


def test_the_payloads_run_where_nothing_holds_them(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for payload in ("os.system", "eval", "a tensor's type", "numpy", "a dictionary"):
        crafted = craft(plain, tmp_path / payload, ".metadata", HOSTILE[payload])
        with pytest.raises(Exception):  # noqa: B017, PT011
            dcp.FileSystemReader(crafted).read_metadata().storage_data.clear()
        assert MARK.exists(), payload
        MARK.unlink()


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/hostname", "below/__0_0.distcp"])
def test_no_file_elsewhere_is_read(plain, tmp_path, name):
    described = dcp.FileSystemReader(plain).read_metadata()
    for place in described.storage_data.values():
        place.relative_path = name
    crafted = craft(plain, tmp_path / "crafted", ".metadata", described)
    assert f"{name!r}, which is not in this folder" in said_of(crafted, lambda: read(crafted))


# Commands


COMMANDS = {
    "train": lambda recipe, inputs, path, out: train(recipe, inputs, str(path)),
    "eval": lambda recipe, inputs, path, out: evaluate_checkpoint(recipe, inputs, path),
    "export": lambda recipe, inputs, path, out: export_checkpoint(
        recipe, inputs.model, inputs.arch, path, out
    ),
}


def _refuse(folder: Path, every: int) -> list[str]:
    """On a rank: each command on a checkpoint that holds something at each place; its places."""
    write_recipe(folder, rollout={"async_steps": 1}, train={"steps": 2}, checkpoint={"every": 1})
    recipe = load(folder / "recipe.yaml", {"train.run_dir": str(folder / "run")})
    train(recipe, read_inputs(recipe, 1))
    parallel.teardown()
    kept = folder / "run" / "checkpoints" / "step-000001"
    crafted = kept.with_name("step-000003")
    found = places(kept)
    tried = [(place, command) for place in found for command in COMMANDS]
    for number, (place, command) in list(enumerate(tried))[::every]:
        if place.startswith("ahead-") and command != "train":
            continue  # nobody else reads it
        craft(kept, crafted, place, list(HOSTILE.values())[number % len(HOSTILE)])
        arguments = recipe, read_inputs(recipe, 1), crafted, folder / "out"
        said_of(crafted, lambda: COMMANDS[command](*arguments))  # noqa: B023
        parallel.teardown()
        shutil.rmtree(crafted)
    evaluate_checkpoint(recipe, read_inputs(recipe, 1), kept)
    return found


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_commands_refuse_it_at_every_place(tmp_path, monkeypatch, every):
    monkeypatch.chdir(tmp_path)
    (found,) = run_ranks(1, _refuse, tmp_path, every)
    assert {".metadata", "ahead-00000.safetensors", "rng-00000.safetensors"} <= set(found)
    assert len(found) >= 12
    # Transformer Engine pickles it, and unpickles it from a tensor.
    assert not [name for name in found if "_extra_state" in name]
