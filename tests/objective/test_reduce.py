"""Denominators, sequence means, KL penalties, and Megatron's loss contract."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.objective.kl import kl_penalty
from sapo_megatron.objective.reduce import megatron_loss, sequence_mean, token_weights
from sapo_megatron.sample import Denominators
from tests.support.gloo import run_ranks

# Three sequences in this piece: 2 valid tokens here of 4 in all (the rest on another rank), none
# valid, and 1. The global mini-batch has 5 sequences and 20 tokens.
MASK = torch.tensor([False, True, True, False, False, True])
SEQUENCE_IDS = torch.tensor([0, 0, 0, 1, 1, 2])
LENGTHS = torch.tensor([4, 0, 1])
DENOMINATORS = Denominators(sequences=5, tokens=20)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("seq-mean-token-mean", [0, 1 / 20, 1 / 20, 0, 0, 1 / 5]),
        ("token-mean", [0, 1 / 20, 1 / 20, 0, 0, 1 / 20]),
        ("seq-mean-token-sum-norm", [0, 1 / 40, 1 / 40, 0, 0, 1 / 40]),
    ],
)
def test_token_weights_by_hand(mode, expected):
    got = token_weights(MASK, SEQUENCE_IDS, LENGTHS, DENOMINATORS, mode, 8)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_means_of_ones_are_one(lengths):
    """A weighted mean of ones is one: sequences without a token leave both sides."""
    sequence_ids = torch.repeat_interleave(torch.arange(len(lengths)), 7)
    mask = torch.cat([torch.arange(7) < n for n in lengths])
    denominators = Denominators(sequences=sum(n > 0 for n in lengths), tokens=sum(lengths))
    for mode in ("seq-mean-token-mean", "token-mean"):
        weights = token_weights(mask, sequence_ids, torch.tensor(lengths), denominators, mode, 7)
        assert weights.sum().item() == pytest.approx(1.0 if sum(lengths) else 0.0)


def test_unknown_mode():
    with pytest.raises(ValueError, match="got 'mean'"):
        token_weights(MASK, SEQUENCE_IDS, LENGTHS, DENOMINATORS, "mean", 8)


def test_sequence_mean_by_hand():
    x = torch.tensor([torch.nan, 1.0, 4.0, torch.inf, 7.0, 3.0], requires_grad=True)
    means = sequence_mean(x, MASK, SEQUENCE_IDS, torch.tensor([2, 0, 1]))
    assert means.tolist() == [2.5, 0.0, 3.0]
    assert not means.requires_grad


def _sequence_mean_on_a_rank():
    rank = torch.distributed.get_rank()
    x, sequence_ids = (
        (torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0, 0, 1]))
        if rank == 0
        else (torch.tensor([6.0, 100.0]), torch.tensor([0, 1]))
    )
    mask = torch.tensor([True, True, True]) if rank == 0 else torch.tensor([True, False])
    group = torch.distributed.group.WORLD
    return sequence_mean(x, mask, sequence_ids, torch.tensor([3, 1]), group).tolist()


def test_sequence_mean_sees_every_context_parallel_rank():
    assert run_ranks(2, _sequence_mean_on_a_rank) == [[3.0, 9.0]] * 2


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("contract", ["2-tuple", "3-tuple"])
@pytest.mark.parametrize(("microbatches", "dp", "cp"), [(1, 1, 1), (3, 2, 1), (2, 1, 4), (3, 2, 2)])
@pytest.mark.parametrize("counted", [False, True])
def test_gradient_is_that_of_the_plain_sum(contract, per_token, microbatches, dp, cp, counted):
    """Through megatron-core's own schedule code; DDP and finalize as the table says."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    config = SimpleNamespace(calculate_per_token_loss=per_token, timers=None)
    coefficients = torch.arange(1.0, 1 + microbatches * dp * cp, dtype=torch.float64)
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    counts = [(i + 1) % 3 if counted else 1 for i in range(len(coefficients))]
    total_tokens = 0
    for coefficient, count in zip(coefficients, counts, strict=True):

        def loss_func(output, count=count):
            return megatron_loss(
                output,
                "report",
                contract=contract,
                calculate_per_token_loss=per_token,
                num_microbatches=microbatches,
                dp_size=dp,
                cp_size=cp,
                num_tokens=count,
                total_num_tokens=sum(counts) if counted else None,
            )

        reports = []
        loss, num_tokens = schedules.forward_step_calc_loss(
            None,
            coefficient * theta,
            loss_func,
            config,
            None,
            False,
            microbatches,
            reports,
            cp_group_size=cp,
            is_last_stage=True,
        )
        loss.backward()
        assert reports == ["report"]
        total_tokens += num_tokens
    gradient = theta.grad
    if not per_token:
        gradient = gradient / (dp * cp)
    elif total_tokens > 0:
        gradient = gradient / total_tokens
    torch.testing.assert_close(gradient, coefficients.sum(), rtol=1e-13, atol=0)


def test_unknown_contract():
    with pytest.raises(ValueError, match="expected 2-tuple or 3-tuple, got '4-tuple'"):
        megatron_loss(
            torch.tensor(0.0), None, num_microbatches=1, dp_size=1, cp_size=1, contract="4-tuple"
        )


def test_kl_values_by_hand():
    logprob = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    d = torch.tensor([0.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(kl_penalty(logprob, ref, "k1"), d)
    torch.testing.assert_close(kl_penalty(logprob, ref, "k2"), d**2 / 2)
    torch.testing.assert_close(kl_penalty(logprob, ref, "k3"), (-d).exp() - 1 + d)
    with pytest.raises(ValueError, match="expected k1, k2 or k3, got 'abs'"):
        kl_penalty(logprob, ref, "abs")


@pytest.mark.parametrize("kind", ["k1", "k2"])
def test_expected_gradient_is_that_of_the_kl(kind):
    """Summed over the vocabulary with pi as weights, per-token gradients give that of the KL."""
    torch.manual_seed(0)
    logits = torch.randn(11, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(11, dtype=torch.float64).log_softmax(0)
    logprob = logits.log_softmax(0)
    exact = torch.autograd.grad((logprob.exp() * (logprob - ref)).sum(), logits)[0]
    logprob = logits.log_softmax(0)
    penalty = kl_penalty(logprob, ref, kind)
    sampled = torch.autograd.grad((logprob.exp().detach() * penalty).sum(), logits)[0]
    torch.testing.assert_close(sampled, exact, rtol=1e-12, atol=1e-14)


def test_k3_gradient_is_k2s_to_first_order_and_bounded():
    d = torch.tensor([1e-4, -1e-4, -100.0, 100.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(kl_penalty(d, torch.zeros(4), "k3").sum(), d)
    assert grad[:2].tolist() == pytest.approx([1e-4, -1e-4], rel=1e-3)
    assert grad[2:].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_ignores_masked_garbage(kind):
    logprob = torch.tensor([-1.0, torch.nan], requires_grad=True)
    ref = torch.tensor([-2.0, -torch.inf])
    kl = kl_penalty(logprob, ref, kind, mask=torch.tensor([True, False]))
    (grad,) = torch.autograd.grad(kl.sum(), logprob)
    assert kl[1] == 0
    assert grad[1] == 0
    assert grad[0] > 0
