import dataclasses

import pytest

from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.metrics import Metrics, Spans
from sapo_megatron.policy.flops import Parameters, forward_flops
from sapo_megatron.recipe.load import load
from sapo_megatron.training.speed import Speed
from tests.support.tiny import ROOT

RECIPE = load(ROOT / "recipes" / "tiny-moe-cpu.yaml")
ARCH = read_architecture(ROOT / "recipes" / "tiny-moe")
PARAMETERS = Parameters(total=9, active=8, active_without_embeddings=5_000)


def speed(**changes):
    made = Speed(recipe=RECIPE, arch=ARCH, parameters=PARAMETERS, ranks=4, on_gpus=True)
    return dataclasses.replace(made, **changes)


def measured(of):
    metrics = Metrics()
    metrics.add("time/logprob", Spans((("rank 0", 0.0, 0.5),)))
    metrics.add("time/update", Spans((("rank 0", 0.5, 1.5), ("rank 1", 0.5, 1.0))))
    return of.measure([10, 30], metrics, 8.0).values()


def test_a_step():
    found = measured(speed())
    forward = forward_flops(ARCH, PARAMETERS, 10) + forward_flops(ARCH, PARAMETERS, 30)
    achieved = 4 * forward / 2.0 / 4  # old log-probs, forward, and backward of two; 2 s; 4 ranks
    assert found == pytest.approx(
        {
            "perf/tokens_per_s": 5.0,
            "perf/tokens_per_s_per_gpu": 1.25,
            "perf/tflops_per_gpu": achieved / 1e12,
            "perf/mfu": achieved / 989e12,  # cluster.gpu is h100-80gb unless it is said
        }
    )


def test_what_is_computed_again_does_not_count():
    again = dataclasses.replace(RECIPE.parallel, recompute_granularity="full")
    assert measured(speed(recipe=dataclasses.replace(RECIPE, parallel=again))) == measured(speed())


def test_the_reference_and_the_old_policy_are_passes():
    def passes(**changes):
        algorithm = dataclasses.replace(RECIPE.algorithm, **changes)
        found = measured(speed(recipe=dataclasses.replace(RECIPE, algorithm=algorithm)))
        return 4 * found["perf/mfu"] / measured(speed())["perf/mfu"]

    assert passes(kl_coef=0.1) == pytest.approx(5)
    assert passes(old_policy="rollout") == pytest.approx(3)


def test_a_cpu_has_no_peak():
    assert "perf/mfu" not in measured(speed(on_gpus=False))
