"""``plan``: every recipe on its cluster; against published numbers, hand counts, measurements."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sapo_megatron.__main__ import main
from sapo_megatron.commands.plan import Plan, plan
from sapo_megatron.commands.plan.activations import chunk, layer
from sapo_megatron.commands.plan.layout import Batches, Layout, in_flight
from sapo_megatron.commands.plan.memory import GIB, _cached
from sapo_megatron.commands.plan.render import as_json, as_table
from sapo_megatron.commands.plan.seconds import seconds, slow
from sapo_megatron.data.batch import pack, plan_micro_batches
from sapo_megatron.hf.architecture import count_parameters, parse_architecture
from sapo_megatron.hf.folder import find_architecture
from sapo_megatron.policy import blueprint
from sapo_megatron.policy.flops import Parameters, forward_flops
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import ParallelConfig
from sapo_megatron.sample import Sample
from tests.support import held_bytes as planning
from tests.support.gloo import run_ranks
from tests.support.tiny import ARCH, IN_PROCESS, ROOT, cli, write_recipe

RECIPES = ROOT / "recipes"
TINY = RECIPES / "tiny-moe-cpu.yaml"
MOE_8 = RECIPES / "qwen3-30b-a3b-8gpu.yaml"
ACTIVE, WITHOUT = ("active",), ("active_without_embeddings",)
BETWEEN = ACTIVE + WITHOUT  # their mean: without the input embedding, which is a look-up
PUBLISHED = {
    "qwen3-4b": (4.0, 3.6, WITHOUT),
    "qwen3-8b": (8.2, 6.95, WITHOUT),
    "qwen3-30b-a3b": (30.5, 3.3, ACTIVE),
    "qwen3-235b-a22b": (235, 22, ACTIVE),
    "moonlight-16b-a3b": (15.96, 2.24, WITHOUT),
    "glm-4.5-air-106b-a12b": (106, 12, WITHOUT),
    "deepseek-v3-671b": (671, 37, ACTIVE),
    "deepseek-v3.1-671b": (671, 37, ACTIVE),
    "qwen3-coder-30b-a3b": (30.5, 3.3, ACTIVE),
    "qwen3-coder-480b-a35b": (480, 35, ACTIVE),
    "glm-4.7-355b-a32b": (355, 32, WITHOUT),
    "glm-4.7-flash-30b-a3b": (30, 3, WITHOUT),
    "kimi-k2-1026b-a32b": (1026, 32, BETWEEN),
    "minimax-m2-230b-a10b": (230, 10, WITHOUT),
    "qwen3.5-35b-a3b": (35, 3, ACTIVE),
    "qwen3.5-397b-a17b": (397, 17, ACTIVE),
}
"""Model -> billions of parameters, in all and for a token, as its publisher counts them."""
PAGE = (ROOT / "docs" / "plan.md").read_text()
NAMES = sorted(path.stem for path in RECIPES.glob("*gpu*.yaml"))


@pytest.fixture(scope="module")
def planned():
    """The plan of a recipe by name, made once."""
    made: dict[str, Plan] = {}

    def planned(name: str) -> Plan:
        if name not in made:
            made[name] = plan(load(RECIPES / f"{name}.yaml"), 6000)
        return made[name]

    return planned


# The recipes


@pytest.mark.parametrize("name", NAMES)
def test_recipe(planned, name):
    made = planned(name)
    assert made.fits
    assert made.total_gib <= 0.9 * made.gpu.memory_gib, "no headroom"
    assert made.recipe.rollout.engine == "vllm"
    gpus = made.layout.world_size + made.servers.beside
    assert gpus == int(name.split("gpu")[0].rsplit("-", 1)[-1])
    took = seconds(made)[0]
    assert took.rollout <= 1.5 * (took.logprobs + took.update)
    assert slow(made) is None
    if name == "qwen3-30b-a3b-8gpu":
        assert took.step <= 600
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line]
    *_, ratio, step = row.strip("| ").split(" | ")
    assert float(ratio) == pytest.approx(took.rollout / (took.logprobs + took.update), abs=0.006)
    assert float(step) == pytest.approx(took.step, abs=0.6)
    assert all(len(line) <= 100 for line in as_table(made).splitlines())
    assert as_table(made).isascii()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones(planned, name):
    made = planned(name)
    (model,) = [m for m in PUBLISHED if name.startswith(m)]
    total, active, convention = PUBLISHED[model]
    assert made.parameters.total / 1e9 == pytest.approx(total, rel=0.01)
    assert count_parameters(made.arch) == pytest.approx(made.parameters.total, rel=1e-4)
    counted = sum(vars(made.parameters)[name] for name in convention) / len(convention) / 1e9
    assert (round(counted) if active in (3, 17) else counted) == pytest.approx(active, rel=0.02)


def test_parameters_are_those_of_the_published_files_to_the_last(planned):
    """What the hub counts in a model's files, less what is there and not trained."""
    flash = planned("glm-4.7-flash-30b-a3b-8gpu").parameters.total
    biases = 46 * 64
    moe_layer = 64 * (3 * 2048 * 1536 + 2048 + 1) + 3 * 2048 * 1536 + 21_763_328  # and attention
    predicting = moe_layer + 2 * 154880 * 2048 + 2 * 2048 * 2048 + 3 * 2048
    assert flash == 31_221_488_576 - biases - predicting
    minimax = planned("minimax-m2-230b-a10b-96gpu").parameters.total
    biases = 62 * 256
    fp8_scales = 62 * (256 * 3 * 24 * 12 + 2 * 48 * 24 + 2 * 8 * 24)
    assert minimax == 228_703_644_928 - biases - fp8_scales


@pytest.mark.parametrize(
    ("recipe", "config", "total"),
    [
        ("qwen3-235b-a22b-64gpu", "qwen3-235b-a22b-2507", 235_093_634_560),
        ("qwen3-8b-8gpu", "qwen3-vl-8b", 8_190_735_360),  # its text model is Qwen3-8B's size
        ("qwen3.5-397b-a17b-128gpu", "qwen3.5-122b-a10b", 122_111_526_912),
        ("qwen3.5-397b-a17b-128gpu", "qwen3-next-80b-a3b", 79_674_391_296),
    ],
)
def test_published_configurations_without_a_recipe(recipe, config, total):
    file = ROOT / "tests" / "data" / "configs" / config / "config.json"
    made = plan(load(RECIPES / f"{recipe}.yaml", {"model.architecture": str(file)}))
    assert made.fits
    assert made.parameters.total == total


def test_states_stand_in_the_place_of_keys_and_values():
    """Qwen3.5-35B-A3B on a rank: 30 of 40 layers keep 32 states of 128 x 128 in fp32 and three
    tokens of 8192 channels in bf16, the others 2 x 2 x 256 numbers of every token."""
    made = plan(load(RECIPES / "qwen3.5-35b-a3b-8gpu.yaml"))
    (stage,) = made.stages
    assert stage.cached_per_token == 10 * 2 * 2 * 256
    sequence = 10240 * stage.cached_per_token * 2 + 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    batches = Batches.of(made.recipe, made.layout)
    assert _cached(made.arch, made.layout, stage, batches, 2) == sequence
    linear, full = (layer(made.arch, number, made.recipe.parallel) for number in (0, 3))
    assert linear.states == 2 * 32 * 128 * 128 / 64
    assert not full.states
    named = {kept.name: kept.numbers for kept in linear.attention}
    assert named["projected"] == 2 * 2048 + 2 * 4096 + 2 * 32
    assert named["systems of the chunks"] == 32 * 64


def test_every_published_model_has_a_recipe():
    assert {m for m in PUBLISHED if any(n.startswith(m) for n in NAMES)} == set(PUBLISHED)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b-32gpu-32k", "deepseek-v3-671b-128gpu"])
def test_ranks_of_a_stage_are_alike(planned, name):
    made = planned(name)
    recipe, layout = made.recipe, made.layout
    arch = find_architecture(recipe.model.path, recipe.model.architecture)
    of_a_stage = layout.world_size // layout.pp
    for stage, rank in ((0, of_a_stage - 1), (layout.pp - 1, layout.world_size - 3)):
        assert blueprint._stage(recipe, arch, layout.world_size, rank) == made.stages[stage]


def test_nothing_is_left_behind(planned):
    hook = sys.excepthook
    plan(load(RECIPES / "qwen3-4b-8gpu.yaml"))
    assert not dist.is_initialized()
    assert torch.get_default_device() == torch.device("cpu")
    assert sys.excepthook is hook


def test_json_as_the_program_prints_it():
    done = cli("plan", RECIPES / "qwen3-8b-8gpu.yaml", "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = json.loads(done.stdout)
    assert out["model"] == "Qwen/Qwen3-8B"
    assert out["world_size"] == 8
    assert out["layout"] == {
        **{"tp": 4, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1},
        **{"dp": 2, "expert_dp": 8},
    }
    assert out["fits"] is True
    assert out["params"]["total"] == 8_190_735_360
    assert out["params"]["per_rank_max"] < out["params"]["total"] / 3.9
    parts = {"weights", "gradients", "optimizer", "activations", "logprobs", "kv_cache", "total"}
    assert parts <= set(out["memory_gib"])
    assert out["memory_gib"]["total"] <= out["available_gib"]
    host = out["host_memory_gib"]
    assert list(host) == ["samples", "exchange", "pinned", "optimizer", "total"]
    assert host["total"] == pytest.approx(sum(host.values()) - host["total"], abs=0.05)


def test_total_is_the_larger_of_update_and_rollout(planned):
    for made in [*map(planned, NAMES), plan(load(MOE_8, IN_PROCESS))]:
        out, r = as_json(made), made.recipe.rollout
        part = out["memory_gib"]
        stay = part["weights"] + part["gradients"] + part["optimizer"] + part["reserve"]
        rollout = stay + part["kv_cache"] + part["generation"] + part["server"]
        leaves = ("gradients", "optimizer", "weights").index(r.colocate_offload) + 1
        if r.colocate:
            rollout -= sum(part[name] for name in ("gradients", "optimizer", "weights")[:leaves])
        update = stay + part["batches"] + max(part["activations"], part["logprobs"])
        if out["peak"] == "rollout":
            assert part["total"] == pytest.approx(rollout, abs=0.01)
            assert part["total"] >= update - 0.01
        else:
            assert part["total"] >= max(update, rollout) - 0.01


# Plans that do not fit


@pytest.mark.parametrize(
    ("name", "settings", "largest"),
    [
        ("qwen3-30b-a3b-8gpu", {"optimizer.optimizer_offload_fraction": "0"}, "optimizer"),
        ("qwen3-30b-a3b-8gpu", {"rollout.gpu_memory_utilization": "0.9"}, "kv_cache"),
        ("qwen3-8b-8gpu", IN_PROCESS | {"rollout.generation_batch_size": "256"}, "kv_cache"),
        (
            "qwen3-30b-a3b-8gpu",
            {
                "parallel.recompute_granularity": "null",
                "parallel.recompute_method": "null",
                "parallel.recompute_num_layers": "null",
                "train.max_tokens_per_gpu": "40960",
            },
            "activations",
        ),
        ("glm-4.5-air-106b-a12b-32gpu", {"optimizer.optimizer_offload_fraction": "0"}, "optimizer"),
        (
            "qwen3-235b-a22b-64gpu",
            {
                **IN_PROCESS,
                "cluster.gpu": "h100-80gb",
                "optimizer.optimizer_offload_fraction": "0",
                "rollout.generation_batch_size": "512",
                "train.max_tokens_per_gpu": "200000",
            },
            "generation",
        ),
    ],
)
def test_suggestions_fit(name, settings, largest):
    path = RECIPES / f"{name}.yaml"
    made = plan(load(path, settings))
    assert not made.fits
    assert made.largest == largest
    assert len(made.suggestions) == 2
    assert len({tuple(s.settings) for s in made.suggestions}) == 2
    for suggestion in made.suggestions:
        words = dict(word.split("=") for word in suggestion.words.split())
        better = plan(load(path, {**settings, **words}))
        assert better.fits, suggestion
        assert better.total_gib == pytest.approx(suggestion.total_gib)


def test_a_plan_that_does_not_fit_fails():
    done = cli("plan", MOE_8, "--optimizer_offload_fraction", "0", cwd=ROOT)
    assert done.returncode == 1
    assert "does not fit" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: qwen3-30b-a3b-8gpu: does not fit on h100-80gb: a GPU of stage 0")
    assert "most of it optimizer" in line
    assert "optimizer.optimizer_offload_fraction=" in line
    assert " or " in line


def test_a_larger_gpu_may_do(capsys):
    words = ["plan", str(MOE_8), "--optimizer_offload_fraction=0", "--gpu", "h200-141gb"]
    words += ["--colocate_offload", "optimizer"]
    assert main(words) == 0
    assert "h200-141gb" in capsys.readouterr().out


# Layouts and batches that are refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tensor_model_parallel_size", "3"], ["attention heads 32", "got 3"]),
        (["--expert_model_parallel_size", "5"], ["number of experts 128", "got 5"]),
        (["--server_tensor_parallel_size", "3"], ["rollout.server_tensor", "heads 32, got 3"]),
        (
            ["rollout.engine=in_process", "--vllm_python=null", "--colocate=false"],
            ["rollout.engine: expected vllm for a model of 30.5 billion", "large_in_process=true"],
        ),
        (["--pipeline_model_parallel_size", "5"], ["48 layers", "5"]),
        (
            ["--virtual_pipeline_model_parallel_size", "2"],
            ["expected none with one pipeline stage"],
        ),
        (["--context_parallel_size", "3"], ["tp x pp x cp = 12", "got 8"]),
        (["--expert_tensor_parallel_size", "2"], ["etp x ep x pp = 16", "got 8"]),
        (["--nodes", "3", "--ep", "1"], ["parallel.expert_model_parallel_size"]),
        (["--nodes", "0"], ["cluster.nodes", "> 0"]),
        (["--gpu", "h100"], ["cluster.gpu", "h100-80gb", "b200-180gb"]),
        (["--num_mini_batches", "3"], ["train.num_mini_batches", "1024"]),
        (["--max_tokens_per_gpu", "8192"], ["10240", "8192"]),
        (["--max_response_length", "40000", "--max_tokens_per_gpu", "42048"], ["40960", "42048"]),
        (["model.architecture=no/where.json"], ["model.architecture", "no such file"]),
        (["--jsn"], ["--jsn", "no value"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(monkeypatch, capsys, words, expected):
    monkeypatch.chdir(ROOT)
    assert main(["plan", str(MOE_8), *words]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    for text in expected:
        assert text in line
    assert printed.out == ""


def test_what_only_megatron_refuses(tmp_path, capsys):
    arch = {"mlp_only_layers": [0], "intermediate_size": 66}
    recipe = write_recipe(tmp_path, arch=arch, parallel={"tensor_model_parallel_size": 4})
    assert main(["plan", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: parallel: expected a layout that megatron-core can build")
    assert "not divisible" in line


# Servers


THEIRS = {
    **{"rollout.vllm_python": "null", "rollout.colocate": "false"},
    "rollout.servers": "[http://a]",
}


def test_memory_beside_a_server_by_hand():
    made = plan(load(MOE_8))
    (memory,) = made.memory
    share = 0.7 * 81559 * 2**20
    assert memory.server == 2 * made.parameters.total / 4
    assert memory.kv_cache == pytest.approx(share - 4 * GIB - memory.server)
    # Gradients are away, Adam is on the host; 4 GiB of the trainer beside the server's share.
    assert memory.rollout == pytest.approx(2 * made.stages[0].parameters + 4 * GIB + share)
    gone = plan(load(MOE_8, {"rollout.colocate_offload": "weights"})).memory[0]
    assert memory.rollout - gone.rollout == pytest.approx(memory.weights)
    beside = plan(load(MOE_8, THEIRS)).memory[0]
    assert (beside.server, beside.kv_cache, beside.generation) == (0, 0, 0)
    assert memory.update - beside.update == 4 * GIB  # of a server that sleeps
    assert made.servers.least == 10240 * 48 * 2 * 128 * 2


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "qwen3-235b-a22b-128gpu",
            {"rollout.server_tensor_parallel_size": "4"},
            "a server takes 0.92 of each of its 4 GPUs, 73.3 GiB; weights are 109.5 of that, all "
            "else 4.0, and keys and values of one sequence 0.5; it would fit with "
            "rollout.server_tensor_parallel_size=8",
        ),
        (
            "deepseek-v3-671b-128gpu",
            {"rollout.server_tensor_parallel_size": "8"},
            "8 GPUs, 129.2 GiB; weights are 156.2 of that",
        ),
        (
            "qwen3-235b-a22b-64gpu",
            {"cluster.gpu": "h100-80gb", "rollout.gpu_memory_utilization": "0.7"},
            "0.7 of each of its 8 GPUs, 55.8 GiB; weights are 54.7 of that",
        ),
    ],
)
def test_servers_that_do_not_hold_the_weights(capsys, name, settings, expected):
    words = [f"{key}={value}" for key, value in settings.items()]
    assert main(["plan", str(RECIPES / f"{name}.yaml"), *words]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {name}: does not fit: a server takes")
    assert expected in line
    assert "does not fit: the longest sequence takes" in printed.out


def test_more_servers_than_a_node_has_gpus(capsys):
    assert main(["plan", str(MOE_8), "--server_tensor_parallel_size", "16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "at most 0 servers with rollout.server_tensor_parallel_size 16 on the 8 GPUs" in line
    assert main(["plan", str(MOE_8), "--num_servers", "3"]) == 2
    assert "got 3; start fewer" in capsys.readouterr().err


# The arithmetic, by hand


DENSE = {
    **{"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 40, "vocab_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    **{"hidden_act": "silu", "tie_word_embeddings": False},
}
# Of one layer: input and normed 16 each; q and k before their norms 32 + 16; q, k, v 32 + 2 x 16;
# output 32. Then input and normed 16 each; gate and up 80; activation 40.
ATTENTION, MLP = 16 + 16 + 48 + 64 + 32, 16 + 16 + 80 + 40


def parallel(**sizes) -> ParallelConfig:
    return ParallelConfig(**sizes)


def test_activations_of_a_dense_model():
    arch, layers = parse_architecture(DENSE), (0, 1, 2)
    whole = chunk(arch, layers, parallel())
    assert whole.stored == 3 * (ATTENTION + MLP)
    assert whole.working == max(ATTENTION, MLP)
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    each = chunk(arch, layers, parallel(**full, recompute_num_layers=1))
    assert each.stored == 3 * 16
    assert each.working == (ATTENTION + MLP) + ATTENTION
    pairs = chunk(arch, layers, parallel(**full, recompute_num_layers=2))
    assert pairs.stored == 2 * 16
    assert pairs.working == 2 * (ATTENTION + MLP) + ATTENTION
    full["recompute_method"] = "block"
    block = chunk(arch, layers, parallel(**full, recompute_num_layers=2))
    assert block.stored == 2 * 16 + (ATTENTION + MLP)
    mlp = parallel(recompute_granularity="selective", recompute_modules=("mlp",))
    assert chunk(arch, layers, mlp).stored == 3 * (ATTENTION + 16)


def test_activations_of_experts():
    arch = parse_architecture(ARCH)  # hidden 32, 4 experts of 32, 2 of them per token
    by_name = {k.name: k.numbers for k in layer(arch, 0, parallel()).mlp}
    assert by_name == {
        **{"input": 32, "normed": 32, "router": 16},
        **{"dispatched tokens": 2 * 32, "gate and up": 2 * 64, "activation": 2 * 32},
    }
    spread = layer(arch, 0, parallel(expert_model_parallel_size=2)).mlp
    assert sum(k.numbers for k in spread if k.name == "dispatched tokens") == 1.5 * 2 * 32


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches", "expected"),
    [
        (1, 1, 8, [1]),
        (4, 1, 8, [4, 3, 2, 1]),
        (4, 1, 2, [2, 2, 2, 1]),
        (4, 2, 8, [11, 9, 7, 5]),
        (2, 3, 2, [6, 5]),
    ],
)
def test_passes_in_flight(pp, vpp, micro_batches, expected):
    layout = Layout(world_size=pp, tp=1, pp=pp, vpp=vpp, cp=1, ep=1, etp=1)
    assert [in_flight(layout, stage, micro_batches) for stage in range(pp)] == expected


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3-30b-a3b-8gpu", {}),
        ("qwen3-30b-a3b-32gpu-32k", {}),
        ("qwen3-235b-a22b-64gpu", {"train.max_tokens_per_gpu": "11000"}),
        (
            "qwen3-30b-a3b-64gpu",
            {"virtual_pipeline_model_parallel_size": "3", "rollout.rollout_batch_size": "96"},
        ),
    ],
)
def test_micro_batches_are_those_of_training(name, settings):
    recipe = load(RECIPES / f"{name}.yaml", settings)
    layout = Layout.of(recipe, recipe.cluster.nodes * 8)
    batches = Batches.of(recipe, layout)
    multiple = 2 * layout.cp if layout.cp > 1 else 1
    fed = -(-(batches.length - 1) // multiple) * multiple
    rows = plan_micro_batches(
        [fed] * batches.mini_batch,
        layout.dp,
        recipe.train.max_tokens_per_gpu * layout.cp,
        layout.pp if layout.vpp > 1 else 1,
    )
    assert {len(row) for row in rows} == {batches.micro_batches}


def test_flops_of_a_sequence():
    arch = parse_architecture(DENSE)
    # q, k, v, out and the MLP; norms are counted with the parameters.
    each = 16 * (32 + 16 + 16) + 32 * 16 + 3 * 16 * 40 + (16 + 8 + 8 + 16)
    parameters = Parameters(total=0, active=0, active_without_embeddings=3 * each + 16)
    attention = 3 * 4 * 2 * 8 * 10**2  # layers, heads, scores and values, half of 2 x 2 x length^2
    expected = 2 * (3 * each + 16 + 96 * 16) * 10 + attention
    assert forward_flops(arch, parameters, 10) == expected


def test_bytes_of_a_packed_batch():
    """45 per token, which memory.py counts with: all micro-batches of a step are on the GPU."""
    sample = Sample(
        uid=0,
        prompt_tokens=tuple(range(500)),
        response_tokens=list(range(501)),
        rollout_logprobs=[0.0] * 501,
        truncated=False,
    )
    batch = pack([sample])
    batch = dataclasses.replace(batch, old_logprob=torch.zeros(len(batch.tokens)))
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    per_token = sum(x.numel() * x.element_size() for x in tensors if len(x) == 1000) / 1000
    assert per_token == 45


def test_offloading_moves_the_optimizer_to_the_host():
    recipe = load(MOE_8)
    made = plan(recipe)
    stage = made.stages[0]
    assert made.memory[0].optimizer == 0
    # dp x cp = 2 for dense weights, 1 for experts; 16 bytes per parameter, 8 GPUs per node.
    assert made.host.optimizer == pytest.approx(8 * 16 * (stage.dense / 2 + stage.experts))


def test_host_memory_by_hand():
    made = plan(load(MOE_8, IN_PROCESS))
    stage, tokens = made.stages[0], 1024 * 10240
    # 48 layers: 8 experts of 2 bytes each, and at one token of 128 fp32 probabilities of 128.
    routes = 48 * (2 * 8 + 4 * 128 / 128)
    # All is kept once by the two leaders that made it, and half by each of eight ranks.
    assert made.host.samples == 8 * tokens * 72
    ahead = plan(load(MOE_8, IN_PROCESS | {"rollout.async_steps": "2"}))
    assert ahead.host.samples == 3 * made.host.samples
    saved = plan(load(MOE_8, IN_PROCESS | {"old_policy": "rollout"}))
    assert made.step.flops["logprob"] == made.step.flops["rollout"]
    assert saved.step.flops["logprob"] == 0
    assert made.host.exchange == (1 + 8 / 2) * tokens * routes + 8 * tokens / 2 * 64
    servers = plan(load(MOE_8, {"rollout.colocate_offload": "weights"})).host
    # The model for its servers, the ranks' weights meanwhile, and no routes from those.
    in_transit = 2 * made.parameters.total + 8 * 2 * stage.parameters
    assert servers.exchange == 8 * tokens * 64 + in_transit
    # Weights in bf16, as the optimizer is not on the GPU.
    assert made.host.pinned == 8 * 2 * 2 * stage.parameters
    assert made.host.total == sum(made.host.parts().values()) * GIB


@pytest.mark.parametrize(
    ("settings", "exchange"),
    [
        (IN_PROCESS | {"routing.observe": "false"}, 0.0),
        (THEIRS, (1 + 4) * 960),
        (THEIRS | {"rollout.async_steps": "1"}, (2 + 4) * 960),
    ],
    ids=["no routes", "servers", "ahead"],
)
def test_routes_that_hosts_keep(settings, exchange):
    made = plan(load(MOE_8, settings))
    in_process = made.recipe.rollout.engine == "in_process"
    made_at_once = 1024 / 2 if in_process else 1024 * (1 + made.recipe.rollout.async_steps)
    sent = 8 * made_at_once * 10240 * 64
    assert made.host.exchange == 1024 * 10240 * exchange + sent


def test_a_node_without_the_memory(capsys):
    words = ["plan", str(MOE_8), "cluster.host_memory_gib=600"]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert re.search(r"host memory per node: .*; does not fit: 6\d\d of 600 GiB", printed.out)
    (line,) = printed.err.splitlines()
    assert line.startswith("error: qwen3-30b-a3b-8gpu: does not fit: a node needs 6")
    assert "most of it optimizer (45" in line
    assert "cluster.host_memory_gib" in line
    assert main([*words[:-1], "cluster.host_memory_gib=650"]) == 0


def test_what_fits_the_gpus_alone_is_not_suggested():
    settings = {"cluster.host_memory_gib": "600", "optimizer.optimizer_offload_fraction": "0"}
    for suggestion in plan(load(MOE_8, settings)).suggestions:
        words = dict(word.split("=") for word in suggestion.words.split())
        assert plan(load(MOE_8, settings | words)).fits, suggestion


# Against what training really holds

P = "parallel."
LAYOUTS = [
    {"model.params_dtype": "bfloat16"},
    {
        P + "pipeline_model_parallel_size": "2",
        P + "expert_model_parallel_size": "1",
        P + "num_layers_in_first_pipeline_stage": "1",
    },
]


def test_memory_is_what_training_holds(tmp_path):
    held = run_ranks(2, planning.all_held, TINY, tmp_path, LAYOUTS)
    for number, layout in enumerate(LAYOUTS):
        made = plan(load(TINY, layout))
        for rank in range(2):
            memory = made.memory[rank if made.layout.pp == 2 else 0]
            got = held[rank][number]
            assert got["weights"] == memory.weights
            assert got["kv_cache"] == memory.kv_cache
            # The gradient buffer is padded; shards of the optimizer are whole numbers of elements.
            assert memory.gradients <= got["gradients"] <= 1.001 * memory.gradients
            assert got["optimizer"] == pytest.approx(memory.optimizer, rel=1e-4)


def test_stored_activations_against_autograd(tmp_path):
    one = {P + "expert_model_parallel_size": "1"}
    full = {
        P + "recompute_granularity": "full",
        P + "recompute_method": "uniform",
        P + "recompute_num_layers": "1",
    }
    (shares,) = run_ranks(1, planning.all_saved, TINY, tmp_path, [one, {**one, **full}])
    # torch's layers keep more than the fused ones that the model counts; inputs are inputs.
    assert 0.45 < shares[0] < 0.65
    assert 0.95 < shares[1] <= 1.0


def test_paths_of_architectures_are_files():
    for path in Path(RECIPES / "models").glob("*/config.json"):
        parse_architecture(json.loads(path.read_text()), path)
