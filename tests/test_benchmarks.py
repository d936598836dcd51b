"""The benchmarks compare what is comparable, and measure what they say."""

import pytest
import torch

from benchmarks import loss, measure, step
from tests.support.gloo import run_ranks


@pytest.fixture(scope="module")
def losses():
    torch.manual_seed(0)
    logprob, *rest = loss.inputs_of({"tokens": 8 * loss.SEQUENCE, "device": "cpu"})
    found = {}
    for name, function in loss.LOSSES.items():
        value = function(logprob, *rest)
        found[name] = value, *torch.autograd.grad(value, logprob)
    return found


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("sapo", "plain torch, SAPO"),
        ("grpo", "plain torch, PPO clip"),
        *((f"policy_loss, {name}", name) for name in ("sapo", "grpo", "gspo", "cispo")),
    ],
)
def test_losses_compute_the_same(losses, name, other):
    for got, expected in zip(losses[name], losses[other], strict=True):
        torch.testing.assert_close(got.float(), expected.float())


def test_ratios_are_those_of_a_round():
    times = {
        "slow": iter([(9, 9), (1, 2), (1, 20), (1, 2)]),
        "base": iter([(9, 9), (1, 1), (1, 10), (1, 1)]),
    }
    found = measure.in_turns({k: v.__next__ for k, v in times.items()}, 3, "base")
    assert found["slow"]["ratio"] == found["slow"]["best_ratio"] == 2
    assert found["slow"]["forward_backward_ms"] == found["slow"]["best_ms"] == 2000


def peak_of_ones():
    return measure.peak_bytes(lambda: torch.ones(2**24), "cpu")


def test_peak_memory():
    """In a process of its own, as a benchmark takes it: this one has memory that others freed."""
    (peak,) = run_ranks(1, peak_of_ones, fresh=True)
    assert peak == pytest.approx(2**26, rel=0.05)


def test_the_stages_of_a_step_can_be_told_apart():
    with step.Clocks().watching():
        pass


@pytest.mark.slow
def test_the_stages_of_a_step_add_up(tmp_path):
    (row,) = run_ranks(1, step.run, 1, 2, 8, tmp_path, 1)
    assert row["tokens"] > 2 * 8 * 2
    assert all(row[f"{name}_ms"] > 0 for name in step.COLUMNS)
    assert sum(row[f"{name}_ms"] for name in step.PARTS) == pytest.approx(row["update_ms"])
    assert sum(row[f"{name}_ms"] for name in step.STAGES) < row["step_ms"]
