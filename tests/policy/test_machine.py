"""What a recipe asks of a machine that has not got it is one line, before any process starts."""

import dataclasses
import importlib.util
import types

import pytest
import torch

from sapo_megatron.errors import UserError
from sapo_megatron.hf.folder import find_architecture
from sapo_megatron.policy.machine import (
    check_machine,
    check_servers,
    host_threads,
    with_transformer_engine,
)
from sapo_megatron.recipe.load import load
from sapo_megatron.training.inputs import read_inputs
from tests.support.tiny import ROOT, write_recipe


@pytest.fixture
def machine(monkeypatch):
    """A machine with or without a GPU, with these packages and no other that is asked about."""

    def machine(*packages, gpu):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name if name in packages else None
        )

    return machine


@pytest.fixture
def recipe(tmp_path):
    """The tiny recipe with some changes."""
    write_recipe(tmp_path)

    def recipe(**changes):
        overrides = {key.replace("__", "."): str(value) for key, value in changes.items()}
        return load(tmp_path / "recipe.yaml", overrides)

    return recipe


TE = ["transformer_engine"]
FLEX = {"parallel__moe_token_dispatcher_type": "flex"}
LONG = {"rollout__max_response_length": 32_000, "train__max_tokens_per_gpu": 40_000}


@pytest.mark.parametrize(
    ("gpu", "packages", "changes", "expected"),
    [
        (
            False,
            [],
            {"model__layers": "transformer_engine"},
            "model.layers: expected torch without a GPU",
        ),
        (True, [], {}, "model.layers: expected torch without Transformer Engine, got auto"),
        (
            True,
            TE,
            LONG,
            "expected bfloat16 .* 32016 tokens, got float32",
        ),
        (True, TE, {"model__params_dtype": "float64"}, "got float64"),
        (True, [], {"model__params_dtype": "float64", "model__layers": "torch"}, "got float64"),
        (
            False,
            [],
            {"model__attention_backend": "flash"},
            "expected auto .* got flash",
        ),
        (
            False,
            ["deep_ep"],
            FLEX,
            "expected alltoall .* got flex",
        ),
        (
            True,
            TE,
            FLEX,
            "expected alltoall .* got flex",
        ),
        (
            False,
            [],
            {"optimizer__optimizer_offload_fraction": 0.5},
            "expected 0 without a GPU .* got 0.5",
        ),
        (
            False,
            [],
            {"parallel__expert_tensor_parallel_size": 2},
            "expert_tensor_parallel_size: expected 1 .* got 2",
        ),
    ],
)
def test_what_a_machine_cannot_run(machine, recipe, gpu, packages, changes, expected):
    asked = recipe(**changes)
    machine(*packages, gpu=gpu)
    with pytest.raises(UserError, match=expected):
        check_machine(asked)


@pytest.mark.parametrize(
    ("gpu", "packages", "changes"),
    [
        (False, [], {}),
        (True, TE, {}),
        (True, TE, {"model__params_dtype": "bfloat16"} | LONG),
        (True, TE, {"model__attention_backend": "fused"}),
        (True, [], {"model__layers": "torch"} | LONG),
        (True, [*TE, "deep_ep"], FLEX),
        (True, TE, {"optimizer__optimizer_offload_fraction": 1}),
    ],
)
def test_what_it_can_run(machine, recipe, gpu, packages, changes):
    asked = recipe(**changes)
    machine(*packages, gpu=gpu)
    check_machine(asked)


def test_whose_layers(machine, recipe):
    model = recipe().model
    for gpu, layers, expected in (
        (False, "auto", False),
        (True, "auto", True),
        (True, "torch", False),
        (False, "transformer_engine", True),
    ):
        machine(gpu=gpu)
        assert with_transformer_engine(dataclasses.replace(model, layers=layers)) == expected


def test_the_ranks_of_a_machine_divide_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert host_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "200")
    assert host_threads() == 1


def test_servers_that_stand_for_others_are_refused(recipe):
    urls = "[http://s1.invalid, http://s2.invalid:8000]"
    asked = recipe(rollout__engine="vllm", rollout__servers=urls)
    with pytest.raises(UserError) as refused:
        read_inputs(asked, 1)
    line = str(refused.value)
    assert line.startswith("rollout.servers: expected the URLs of running servers, got http://s1.")
    assert "start 2, of 1 GPUs each, and give rollout.servers=[" in line


def test_gpus_that_do_not_hold_a_servers_weights(monkeypatch, machine):
    machine(gpu=True)
    gpu = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    path = ROOT / "recipes" / "qwen3-30b-a3b-8gpu.yaml"
    arch = find_architecture("nowhere", load(path).model.architecture)
    check_servers(load(path), arch)
    check_servers(load(path, {"rollout.server_tensor_parallel_size": "2"}), arch)
    with pytest.raises(UserError) as refused:  # 61 GB are 56.9 GiB, and 0.7 of 80 are 56
        check_servers(load(path, {"rollout.server_tensor_parallel_size": "1"}), arch)
    arithmetic = "got 1 with 56.9 GiB of bfloat16, 56.9 on each, where a server has 0.7 x 80.0 GiB"
    assert arithmetic in str(refused.value)
