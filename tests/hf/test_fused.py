"""Experts of a layer that are one tensor: each is read as if it stood alone."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sapo_megatron.errors import UserError
from sapo_megatron.hf.fused import apart

NAME = "model.layers.0.mlp.experts."


@pytest.fixture
def stored(tmp_path):
    """Three experts, 4 wide inside and 6 outside, beside a tensor that is none."""
    path = tmp_path / "model.safetensors"
    tensors = {
        f"{NAME}gate_up_proj": torch.randn(3, 8, 6),
        f"{NAME}down_proj": torch.randn(3, 6, 4),
        "model.norm.weight": torch.randn(6),
    }
    save_file(tensors, path)
    return path, tensors


def test_each_expert_is_read_alone(stored):
    path, tensors = stored
    with safe_open(path, framework="pt") as file:
        files = dict.fromkeys(tensors, path)
        parts = apart(files, file.get_slice)
        kinds = ("gate", "up", "down")
        names = {f"{NAME}{i}.{kind}_proj.weight" for i in range(3) for kind in kinds}
        assert files == dict.fromkeys(names | {"model.norm.weight"}, path)
        assert parts.keys() == names
        gate_up, down = (tensors[f"{NAME}{kind}_proj"] for kind in ("gate_up", "down"))
        for i in range(3):
            wholes = gate_up[i, :4], gate_up[i, 4:], down[i]
            for kind, whole in zip(kinds, wholes, strict=True):
                part = parts[f"{NAME}{i}.{kind}_proj.weight"]
                assert part.get_shape() == list(whole.shape)
                assert part.get_dtype() == "F32"
                assert torch.equal(part[...,], whole)
                assert torch.equal(part[slice(1, 3),], whole[1:3])
                assert torch.equal(part[slice(None), slice(2, 4)], whole[:, 2:4])


def test_an_expert_that_is_there_twice_is_refused(stored):
    path, tensors = stored
    with safe_open(path, framework="pt") as file:
        files = dict.fromkeys([*tensors, f"{NAME}2.up_proj.weight"], path)
        with pytest.raises(UserError, match=r"expected the experts once, got also .*2\.up_proj"):
            apart(files, file.get_slice)
