"""Whole runs on a GPU that is only pretended (``tests/support/pretend.py``).

No operator gets tensors of two devices, no group carries those of the other side, and the host
waits for the device no more often than the numbers below say.
"""

import pytest

from tests.support.families import FAMILIES
from tests.support.gloo import run_ranks, run_worlds
from tests.support.pretended_runs import Run, measure, offloaded, refusals
from tests.support.tiny import ARCH

RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
RUNS = {
    "EP2, recomputed, saved, resumed, exported": Run(
        world=2,
        sections={"parallel": {"expert_model_parallel_size": 2} | RECOMPUTED},
        saved=True,
    ),
    "TP2xEP2, fused, R2, KL": Run(
        world=2,
        sections={
            "parallel": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
            "train": {"logprob": "fused"},
            "routing": {"router_replay": "R2"},
            "algorithm": {"kl_coef": 0.1},
        },
    ),
    "PP2, R3": Run(
        world=2,
        sections={
            "parallel": {"pipeline_model_parallel_size": 2},
            "routing": {"router_replay": "R3"},
        },
    ),
    "CP2": Run(world=2, sections={"parallel": {"context_parallel_size": 2}}),
    "latent attention": Run(
        arch=FAMILIES["moonlight"] | {"num_hidden_layers": 2, "vocab_size": ARCH["vocab_size"]}
    ),
    "2 layers": Run(),
    "metrics in one stack": Run(in_one_stack=True),
    "4 layers": Run(arch={"num_hidden_layers": 4}),
}
MOST_WAITS = {"unrecorded": 0, "forward": 1, "update": 9, "observe": 27, "decode": 1}
"""Of ours, beside those of torch's layers, in a micro-batch's pass or a token's step; none of them
once per layer. A number only ever falls."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each run's ranks saw, by name; a traceback where it failed."""
    folder = tmp_path_factory.mktemp("device")
    jobs = [(run.world, (run, folder / str(i))) for i, run in enumerate(RUNS.values())]
    return dict(zip(RUNS, run_worlds(measure, jobs), strict=True))


@pytest.fixture(scope="module", params=[0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def offload(request, tmp_path_factory):
    """What a rank saw whose Adam is in host memory, by half or whole; a traceback."""
    (ranks,) = run_worlds(offloaded, [(1, (request.param, tmp_path_factory.mktemp("offload")))])
    return ranks


@pytest.mark.parametrize("name", [name for name in RUNS if not RUNS[name].in_one_stack])
def test_everything_is_where_it_is_used(found, name):
    ranks = found[name]
    assert not isinstance(ranks, str), ranks
    assert [rank.problems for rank in ranks] == [{}] * RUNS[name].world
    assert (ranks[0].streamed > 0) == RUNS[name].saved


def test_a_run_that_stacks_metrics_of_both_devices_is_found_out(found):
    ranks = found["metrics in one stack"]
    assert not isinstance(ranks, str), ranks
    (problem,) = ranks[0].problems
    assert problem.startswith("aten.stack.default of the GPU gets host tensors [()] @ metrics.py")


@pytest.mark.parametrize("layers", [2, 4])
def test_the_host_seldom_waits(found, layers):
    (rank,) = found[f"{layers} layers"]
    counted = dict.fromkeys(MOST_WAITS, 0.0)
    for (phase, function), times in rank.waits.items():
        if phase in counted and not function.startswith("policy/layers.py"):
            counted[phase] += times / rank.calls[phase]
    assert counted == MOST_WAITS


def test_a_resumed_run_with_adam_in_host_memory_is_the_straight_one(offload):
    assert not isinstance(offload, str), offload
    (rank,) = offload
    assert rank["problems"] == {}
    assert rank["kinds"].keys() == {"weight", "master_param", "step", "exp_avg", "exp_avg_sq"}
    assert rank["moved"]
    assert rank["differ"] == []


def test_what_a_gpu_would_refuse_is_seen():
    (found,) = run_ranks(1, refusals)
    assert {name for name, problems in found.items() if problems} == {
        *("sum", "two scalars", "product", "choice", "rows of the GPU"),
        *("an array", "backward", "nccl", "gloo"),
    }
