"""A model whose layers are mostly Gated DeltaNet, from its first weights to transformers."""

import math

import pytest
import torch
import transformers

from sapo_megatron.policy import parallel
from sapo_megatron.recipe.load import load
from sapo_megatron.training.inputs import read_model
from sapo_megatron.training.session import export_checkpoint
from tests.support.gloo import run_ranks
from tests.support.tiny import read_metrics, write_recipe
from tests.support.whole_runs import run

ARCH = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 3,  # two on the first stage
    "partial_rotary_factor": 0.5,
    "shared_expert_intermediate_size": 16,
}


def runs(folder):
    """Three steps at once and in two goes; a step with each kind of replay; the weights."""
    straight, halves = folder / "straight", folder / "halves"
    run(folder, train__run_dir=straight, train__steps=3)
    run(folder, train__run_dir=halves, train__steps=2)
    run(folder, "auto", train__run_dir=halves, train__steps=3)
    for kind in ("R2", "R3"):
        run(folder, train__run_dir=folder / kind, train__steps=1, routing__router_replay=kind)
    recipe = load(folder / "recipe.yaml")
    model = read_model(recipe, 4, weights=False)
    export_checkpoint(recipe, *model, halves / "checkpoints" / "step-000003", folder / "out")
    parallel.teardown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    write_recipe(
        folder,
        arch=ARCH,
        parallel={
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 2,
            "expert_model_parallel_size": 2,
        },
        routing={"decompose_every": 1},
        checkpoint={"every": 1},
    )
    run_ranks(4, runs, folder)
    return folder


def test_a_resumed_run_is_the_run(folder):
    straight, halves = (read_metrics(folder / name) for name in ("straight", "halves"))
    assert [line["step"] for line in halves] == [1, 2, 3]
    for name, value in straight[2].items():
        if isinstance(value, float) and not name.startswith(("time/", "perf/")):
            assert halves[2][name] == pytest.approx(value, rel=1e-5, abs=1e-8), name


def test_every_layer_has_its_part_in_the_split_of_the_variance(folder):
    for line in read_metrics(folder / "straight"):
        parts = [line[f"variance/{name}"] for name in ("weights", "router", "cov")]
        assert line["variance/total"] == pytest.approx(sum(parts), rel=1e-4, abs=1e-9)
        assert all(f"routing/slot_flip/layer_{i}" in line for i in range(3))


def test_the_rollout_engine_and_the_training_engine_agree(folder):
    for name in ("straight", "R2", "R3"):
        first = read_metrics(folder / name)[0]
        assert first["rollout_train/logprob_abs_diff"] < 1e-5
        assert math.isfinite(first["actor/grad_norm"])
        assert first["actor/grad_norm"] > 0


def test_transformers_generates_with_what_comes_out(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] > 3
