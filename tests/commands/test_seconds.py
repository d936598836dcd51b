"""Seconds of a step: against public measurements, hand counts, and what recipes ask for."""

import dataclasses
import functools
import json
import math
import os
import pty
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from sapo_megatron.__main__ import main
from sapo_megatron.commands import plan as planning
from sapo_megatron.commands.plan import Plan, plan, seconds
from sapo_megatron.commands.plan.gpus import CONSTANTS, GPUS, Constants
from sapo_megatron.commands.plan.layout import away
from sapo_megatron.commands.plan.render import as_json, as_table
from sapo_megatron.commands.plan.seconds import slow
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.policy import blueprint
from sapo_megatron.recipe.load import load
from tests.support.tiny import IN_PROCESS, ROOT

RECIPES = ROOT / "recipes"
MOE_8 = RECIPES / "qwen3-30b-a3b-8gpu.yaml"
MODELS = {
    name: json.loads((RECIPES / "models" / folder / "config.json").read_text())
    for name, folder in (
        ("Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen3-235B-A22B", "qwen3-235b-a22b"),
        ("DeepSeek-V3", "deepseek-v3-671b"),
    )
}
DENSE = MODELS["Qwen3-235B-A22B"] | {"model_type": "qwen3", "num_key_value_heads": 8}
MODELS["Qwen3-32B"] = DENSE | {
    **{"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64},
}
MODELS["Llama-3.1-8B"] = DENSE | {  # as Qwen3 would have it: two norms of a head more
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "vocab_size": 128256},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured step of NeMo-RL on H100."""

    release: str
    model: str
    longest: int
    mean: int
    gpus: int
    """Those that train."""
    servers: int = 0
    """GPUs that only generate; 0: the trainer's do."""
    sequences: int
    updates: int
    generation: int
    layout: tuple[int, int, int, int]
    """tp, cp, ep, pp."""
    recompute: bool
    passes: int
    """Of log-probs."""
    ends: tuple[int, int] | None = None
    """Layers in the first and the last pipeline stage."""
    seconds: float

    @property
    def words(self) -> str:
        """How the docs' table begins it."""
        gpus = f"{self.gpus} + {self.servers}" if self.servers else f"{self.gpus}"
        return f"| {self.release} {self.model}, {self.longest} | {gpus} | {self.seconds:g} |"


MOE = {"model": "Qwen3-30B-A3B", "longest": 4096, "sequences": 2048, "generation": 2}
MOE |= {"recompute": False, "passes": 2, "updates": 4}
LARGE = {"release": "0.6", "model": "Qwen3-235B-A22B", "longest": 8192, "sequences": 512}
LARGE |= {"recompute": True, "passes": 1, "updates": 1, "ends": (11, 11)}
HUGE = {"release": "0.6", "model": "DeepSeek-V3", "longest": 1536, "sequences": 512}
HUGE |= {"recompute": True, "passes": 1, "updates": 1, "ends": (3, 2)}
HUGE |= {"generation": 32, "layout": (1, 1, 16, 16)}
Q32 = {"release": "0.5", "model": "Qwen3-32B", "longest": 4096, "sequences": 2048, "updates": 4}
Q32 |= {"recompute": False, "passes": 2, "generation": 4, "layout": (4, 1, 1, 4), "gpus": 32}
LLAMA = {"model": "Llama-3.1-8B", "longest": 4096, "sequences": 2048, "updates": 4}
LLAMA |= {"recompute": True, "passes": 2, "generation": 1}
ALONE, TWO = (1, 1, 8, 1), (1, 1, 8, 2)
ROWS = (
    Row(**MOE, release="0.6", mean=3203, gpus=32, layout=ALONE, seconds=192),
    Row(**MOE, release="0.6", mean=3201, gpus=16, servers=16, layout=TWO, seconds=152),
    Row(**LARGE, mean=5698, gpus=128, generation=16, layout=(2, 2, 16, 8), seconds=395),
    Row(**LARGE, mean=5713, gpus=256, generation=16, layout=(2, 2, 16, 8), seconds=312),
    Row(**LARGE, mean=5721, gpus=128, servers=128, generation=8, layout=(4, 1, 16, 8), seconds=231),
    Row(**HUGE, mean=701, gpus=256, seconds=134),
    Row(**HUGE, mean=697, gpus=512, seconds=111),
    Row(**HUGE, mean=710, gpus=256, servers=256, seconds=64.1),
    Row(**Q32, mean=3251, seconds=376),
    Row(**Q32, mean=3252, servers=32, seconds=200),
    Row(**LLAMA, release="0.5", mean=1019, gpus=16, layout=(1, 1, 1, 2), seconds=92.8),
    Row(**LLAMA, release="0.5", mean=1123, gpus=8, servers=8, layout=(1, 1, 1, 1), seconds=64.8),
)
"""With which constants are fitted."""
ONCE = MOE | {"updates": 1, "passes": 1, "release": "0.7"}
LONG = MOE | {"longest": 40960, "recompute": True, "release": "0.7"}
APART = (
    Row(**ONCE, mean=3198, gpus=32, layout=ALONE, seconds=171),
    Row(**ONCE, mean=3203, gpus=16, servers=16, layout=TWO, seconds=141),
    Row(**LONG, mean=8170, gpus=32, layout=(4, 8, 8, 1), seconds=2022),
    Row(**LLAMA, release="0.3", mean=900, gpus=8, layout=(1, 1, 1, 1), seconds=112),
)
"""With which they are not."""


@functools.cache
def _stages(model, parallel, world):
    recipe = replace(load(MOE_8), parallel=parallel)
    return blueprint.stages(recipe, parse_architecture(MODELS[model]), world)


@functools.cache
def planned(row: Row) -> Plan:
    """The plan of a recipe with the row's settings."""
    tp, cp, ep, pp = row.layout
    settings = {
        "rollout.gpu_memory_utilization": "0.6",
        "rollout.async_steps": str(int(row.servers > 0)),
        "rollout.server_tensor_parallel_size": str(row.generation),
        "rollout.rollout_batch_size": str(row.sequences // 16),
        "rollout.num_generations": "16",
        "rollout.max_prompt_length": "256",
        "rollout.max_response_length": str(row.longest - 256),
        "parallel.tensor_model_parallel_size": str(tp),
        "parallel.context_parallel_size": str(cp),
        "parallel.expert_model_parallel_size": str(ep),
        "parallel.pipeline_model_parallel_size": str(pp),
        "optimizer.optimizer_offload_fraction": "0",
        "train.num_mini_batches": str(row.updates),
        "train.max_tokens_per_gpu": str(row.longest // cp),
        "algorithm.kl_coef": "0.01" if row.passes == 2 else "0",
        "cluster.nodes": str(row.gpus // 8),
    }
    if row.servers:
        urls = [f"http://node{n}" for n in range(row.servers // row.generation)]
        settings |= {"rollout.vllm_python": "null", "rollout.colocate": "false"}
        settings |= {"rollout.servers": json.dumps(urls), "rollout.weight_transfer": "nccl"}
    else:
        settings |= {"rollout.colocate_offload": "weights"}
    if row.ends:
        for place, layers in zip(("first", "last"), row.ends, strict=True):
            settings[f"parallel.num_layers_in_{place}_pipeline_stage"] = str(layers)
    if not row.recompute:
        keys = ("granularity", "method", "num_layers")
        settings |= {f"parallel.recompute_{key}": "null" for key in keys}
    recipe = load(MOE_8, settings)
    arch = parse_architecture(MODELS[row.model])
    # What a rank of a stage has does not depend on how many copies there are.
    block = cp * max(tp, ep) * pp
    return planning._plan(
        recipe, arch, row.mean, lambda recipe, world: _stages(row.model, recipe.parallel, block)
    )


def ratio(row: Row, constants: Constants = CONSTANTS) -> float:
    """Estimated over measured. There, servers go on while weights are handed over."""
    took = seconds.seconds(planned(row), constants)[0]
    training = took.logprobs + took.update + took.handover
    return (max(took.rollout, training) if row.servers else took.step) / row.seconds


def fitted(rows) -> Constants:
    """Least squares of logarithms, a constant at a time in ever smaller steps."""

    def cost(constants):
        return sum(math.log(ratio(row, constants)) ** 2 for row in rows)

    best, least, factor = CONSTANTS, cost(CONSTANTS), 1.2
    while factor > 1.03:
        moved = False
        for name in ("matrix", "launch", "graph", "hop", "tensor"):
            for by in (factor, 1 / factor):
                tried = replace(best, **{name: getattr(best, name) * by})
                if (now := cost(tried)) < least - 1e-5:
                    best, least, moved = tried, now, True
        if not moved:
            factor **= 0.5
    return best


def predicted(row: Row) -> float:
    """Estimated with constants that are fitted on the others, over measured."""
    return ratio(row, fitted([other for other in ROWS if other != row]))


def documented(row: Row) -> list[float]:
    """The ratios behind the row in the docs."""
    (line,) = [
        line
        for line in (ROOT / "docs" / "plan-arithmetic.md").read_text().splitlines()
        if line.startswith(row.words)
    ]
    return [float(cell) for cell in line.removeprefix(row.words).strip(" |").split("|")]


@pytest.mark.parametrize("row", ROWS + APART, ids=lambda row: row.words)
def test_measured_steps(row):
    got = ratio(row)
    assert 1 / 1.5 <= got <= 1.5
    assert 1 / 1.5 <= seconds.seconds(planned(row))[0].step / row.seconds <= 1.5  # and waiting
    assert got == pytest.approx(documented(row)[0], abs=0.011)


def test_a_row_from_the_others():
    assert 1 / 1.5 <= predicted(ROWS[0]) <= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.words)
def test_each_row_from_the_others(row):
    got = predicted(row)
    assert 1 / 1.5 <= got <= 1.5
    assert got == pytest.approx(documented(row)[1], abs=0.03)


def test_constants_are_few():
    assert len(dataclasses.fields(Constants)) + 1 <= 8  # and the experts' imbalance
    docs = (ROOT / "docs" / "plan-arithmetic.md").read_text()
    assert all(f"| `{field.name}` |" in docs for field in dataclasses.fields(Constants))


# By hand


def test_stages_of_a_measured_step():
    """Of Llama 3.1 8B on 8 H100, in seconds: 28, 58, 18, 5 (NeMo-RL 0.3, without recomputation)."""
    row = replace(APART[3], recompute=False)
    took = seconds.seconds(planned(row))[0]
    measured = {"update": 28, "rollout": 58, "logprobs": 18}
    for name, expected in measured.items():
        assert 1 / 1.3 <= took.parts()[name] / expected <= 1.3, name


@pytest.mark.parametrize(
    ("inner", "size", "node", "share"),
    [(1, 8, 8, 0.0), (1, 16, 8, 8 / 15), (8, 4, 8, 1.0), (4, 4, 8, 2 / 3), (1, 1, 8, 0.0)],
)
def test_what_leaves_a_node(inner, size, node, share):
    assert away(inner, size, node) == pytest.approx(share)


@pytest.fixture(scope="module")
def on_servers():
    return plan(load(MOE_8), 6000)


def with_rollout(made: Plan, **keys) -> Plan:
    recipe = replace(made.recipe, rollout=replace(made.recipe.rollout, **keys))
    return planning._plan(recipe, made.arch, made.length, lambda *_: made.stages)


def test_a_recipe_within_its_bounds(on_servers):
    took = seconds.seconds(on_servers)[0]
    assert took.rollout <= 1.5 * (took.logprobs + took.update)
    assert took.step <= 600
    assert slow(on_servers) is None
    assert took.step == pytest.approx(sum(list(took.parts().values())[:4]))


def test_a_decode_step_by_hand(on_servers):
    got = seconds.seconds(on_servers)[1]
    n, reached = got.at_once, 0.75
    # 128 experts, 8 of them for a token; 48 layers; 4 key heads, one on each of 4 GPUs.
    head = 151936 * 2048
    experts = 48 * 128 * 3 * 2048 * 768
    read = on_servers.parameters.total - head - experts * (15 / 16) ** n
    assert got.decode_step["reading weights"] == pytest.approx(2 * read / 4 / 3.35e12 / reached)
    assert got.decode_step["launching kernels"] == 48 * CONSTANTS.graph
    assert "2 vLLM servers of 4 GPUs" in got.engine
    assert n == 256  # which server_concurrency allows
    # 0.6 of the memory, less 4 GiB and the weights; 2 x 128 numbers of 2 bytes in each layer.
    less = with_rollout(on_servers, gpu_memory_utilization=0.6, server_concurrency=1000)
    room = 0.6 * 81559 * 2**20 - 4 * 2**30 - 2 * on_servers.parameters.total / 4
    n = seconds.seconds(less)[1].at_once
    assert n == pytest.approx(room / (48 * 2 * 128 * 2) / 6000)


def test_the_longest_response_is_waited_for(on_servers):
    """Where all fit at once, a rollout is its longest response's decode steps."""
    few = with_rollout(on_servers, num_generations=2, rollout_batch_size=32)
    got = seconds.seconds(few)[1]
    # From a mean of 4800 to the limit: what is left by then takes less than the full step.
    whole = sum(got.decode_step.values())
    assert 0.5 * 8192 * whole < got.seconds < 8192 * whole
    longest = seconds.seconds(replace(few, length=10240))[1]
    assert longest.seconds == pytest.approx(8192 * sum(longest.decode_step.values()), rel=0.02)


def test_steps_ahead_overlap(on_servers):
    ahead = {"servers": ("http://a", "http://b"), "colocate": False, "vllm_python": None}
    now = seconds.seconds(with_rollout(on_servers, **ahead))[0]
    then = seconds.seconds(with_rollout(on_servers, **ahead, async_steps=1))[0]
    assert now.step == pytest.approx(now.rollout + now.logprobs + now.update + now.handover)
    assert then.step == pytest.approx(
        max(then.rollout, then.logprobs + then.update) + then.handover
    )
    assert (
        seconds.seconds(with_rollout(on_servers, **ahead, weight_transfer="nccl"))[0].handover
        < now.handover
    )  # 61 GB through a shared file system, twice


def test_servers_of_others_hold_the_model(on_servers):
    theirs = with_rollout(
        on_servers, servers=("http://a",), colocate=False, server_tensor_parallel_size=1
    )
    assert theirs.servers.gpus == 2  # 61 GB are more than half of 0.92 of one
    assert with_rollout(theirs, server_tensor_parallel_size=8).servers.gpus == 8


def test_what_leaves_the_gpu_comes_back(on_servers):
    took = {
        what: seconds.seconds(with_rollout(on_servers, colocate_offload=what))[0].handover
        for what in ("gradients", "optimizer", "weights")
    }
    assert took["gradients"] == took["optimizer"]  # which is on the host
    moved = 2 * on_servers.memory[0].weights / GPUS["h100-80gb"].pcie / 0.75
    assert took["weights"] - took["gradients"] == pytest.approx(moved)


def test_in_process_is_slow_and_says_so():
    made = plan(load(MOE_8, IN_PROCESS), 6000)
    took, how = seconds.seconds(made)
    # 1024 sequences of 2 copies in batches of 64, each up to 8192 tokens.
    assert took.rollout == pytest.approx(8 * 8192 * sum(how.decode_step.values()))
    assert took.handover == 0
    assert "in process, 8 batches in turn, 64 sequences at once" in slow(made)
    table = as_table(made)
    assert "\033" not in table
    assert "\033[31mslow: the rollout takes" in as_table(made, colour=True)
    assert all(len(line) <= 100 for line in table.splitlines())
    out = as_json(made)
    assert list(out["seconds"]) == ["rollout", "logprobs", "update", "handover", "step"]
    assert out["slow"] == slow(made)


def test_mean_length_changes_the_step_and_not_the_memory(on_servers):
    longest = plan(load(MOE_8))
    assert longest.memory == on_servers.memory
    assert longest.host == on_servers.host
    assert longest.length == 10240
    assert on_servers.step.tokens == 1024 * 6000
    assert on_servers.step.flops["update"] < 0.6 * longest.step.flops["update"]
    assert seconds.seconds(on_servers)[0].step < seconds.seconds(longest)[0].step


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mean-length", "0"], "at least 2 tokens and at most 10240"),
        (["--mean-length", "-5"], "got -5"),
        (["--mean-length=1"], "got 1;"),
        (["--mean-length", "10241"], "rollout.max_prompt_length and max_response_length"),
        (["--mean-length", "many"], "many"),
        (["--mean-length", "6000.5"], "6000.5"),
        (["--mean-length", "nan"], "nan"),
        (["--mean-length"], "expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(capsys, words, expected):
    assert main(["plan", str(MOE_8), *words]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert "--mean-length" in line
    assert expected in line
    assert printed.out == ""


@pytest.mark.slow
def test_red_on_a_terminal_only():
    words = [sys.executable, "-m", "sapo_megatron", "plan", str(MOE_8), "--mean-length", "6000"]
    words += [f"{key}={value}" for key, value in IN_PROCESS.items()]
    ours, theirs = pty.openpty()
    subprocess.run(words, stdout=theirs, check=True)
    os.close(theirs)
    printed = b""
    try:
        while part := os.read(ours, 4096):
            printed += part
    except OSError:  # the end of a terminal
        pass
    os.close(ours)
    assert b"\033[31mslow: " in printed
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    assert b"slow: " in done.stdout
    assert b"\033" not in done.stdout
