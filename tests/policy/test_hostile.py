"""Checkpoints that were made to run code: one line says what they hold, and nothing ran."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from sapo_megatron.policy import compat
from tests.support.gloo import run_ranks
from tests.support.hostile import by_hand, craft, payloads, plain_checkpoint, refusals, refused

MARK = Path("ran")
HOSTILE = {**payloads(MARK), **by_hand(MARK)}
"""Whatever runs makes this file in the working folder."""


def said_of(checkpoint: Path, load: Any) -> str:
    """What is said of a checkpoint that must be refused."""
    message, problem = refused(load, checkpoint, MARK)
    assert not problem, message
    return message


# What describes a checkpoint, and what is in it


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_checkpoint(tmp_path_factory.mktemp("plain"))


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


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_commands_refuse_it_at_every_place(tmp_path, monkeypatch, every):
    monkeypatch.chdir(tmp_path)
    ((found, tried),) = run_ranks(1, refusals, tmp_path, every)
    assert [refusal for refusal in tried if refusal[2]] == []
    assert {command for _, command, _ in tried} == {"train", "eval", "export"}
    assert {".metadata", "ahead-00000.safetensors", "rng-00000.safetensors"} <= set(found)
    assert len(found) >= 12
    # Transformer Engine pickles it, and unpickles it from a tensor.
    assert not [name for name in found if "_extra_state" in name]
