"""GRPO's clips, GSPO, CISPO and VESPO against their formulas written out by hand."""

import math

import pytest
import torch

from sapo_megatron.objective.baselines import (
    cispo_loss,
    clipped_loss,
    outside_clip,
    vespo_loss,
    vespo_weight,
)
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.objective.reduce import sequence_mean, sequence_sum


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def grad_of(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


def gspo(log_ratio, sequence_log_ratio, advantages, mask=None):
    r = Ratio.of(log_ratio, advantages, mask).of_sequences(sequence_log_ratio)
    return clipped_loss(r, 3e-4, 4e-4)


def cispo(log_ratio, logprob, advantages, mask=None):
    return cispo_loss(Ratio.of(log_ratio, advantages, mask, logprob), 1.0, 0.28)


def vespo(log_ratio, sequence_log_ratio, logprob, advantages, mask=None):
    r = Ratio.of(log_ratio, advantages, mask, logprob).of_sequences(sequence_log_ratio)
    return vespo_loss(r)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.6, 0.0),
        (0.5, 2.0, 1.0, 1.0),
        (1.5, -2.0, -3.0, -3.0),
        (0.5, -2.0, -1.6, 0.0),
        (4.0, -2.0, -6.0, 0.0),
    ],
)
def test_grpo_clip_higher_and_dual_clip(ratio, advantage, objective, slope):
    log_ratio = f64(math.log(ratio)).requires_grad_()
    loss = clipped_loss(Ratio.of(log_ratio, f64(advantage)), 0.2, 0.3, 3.0)
    assert loss.item() == pytest.approx(-objective)
    assert grad_of(loss, log_ratio).item() == pytest.approx(-slope)


def test_without_dual_clip_the_negative_side_is_unbounded():
    loss = clipped_loss(Ratio.of(f64(math.log(4.0)), f64(-2.0)), 0.2, 0.2)
    assert loss.item() == pytest.approx(8.0)


def test_outside_clip_is_where_the_gradient_vanishes():
    torch.manual_seed(0)
    log_ratio = torch.randn(200, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(200, dtype=torch.float64)
    loss = clipped_loss(Ratio.of(log_ratio, advantages), 0.2, 0.3)
    outside = outside_clip(log_ratio.detach().exp(), advantages, 0.2, 0.3)
    assert torch.equal(grad_of(loss, log_ratio) == 0, outside)
    assert outside.any()
    assert not outside.all()


def test_gspo_has_the_gradient_of_the_sequence_ratio():
    sequence_ids = torch.tensor([0, 0, 0, 1, 1])
    mask = torch.tensor([True, True, True, True, False])
    lengths = torch.tensor([3, 1])
    advantages = f64(2.0, 2.0, 2.0, -1.0, -1.0)
    log_ratio = f64(1e-4, -3e-4, 2e-4, 3e-4, math.nan).requires_grad_()
    mean = sequence_mean(log_ratio, mask, sequence_ids, lengths)
    loss = gspo(log_ratio, mean[sequence_ids], advantages, mask)
    weights = f64(1 / 3, 1 / 3, 1 / 3, 1.0, 0.0)
    got = grad_of(weights * loss, log_ratio)

    reference = log_ratio.detach().clone().requires_grad_()
    s0, s1 = reference[:3].mean().exp(), reference[3].exp()
    whole = -(2.0 * s0) - (-1.0 * s1)
    torch.testing.assert_close((weights * loss).sum(), whole, rtol=1e-12, atol=0)
    expected = grad_of(whole, reference)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_gspo_clips_the_whole_sequence():
    log_ratio = f64(0.01, -0.005).requires_grad_()
    mean = log_ratio.detach().mean().expand(2)
    loss = gspo(log_ratio, mean, f64(1.0, 1.0))
    assert grad_of(loss, log_ratio).tolist() == [0.0, 0.0]
    assert loss.tolist() == pytest.approx([-1.0004, -1.0004])


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    log_ratio = f64(math.log(3.0), math.log(0.5)).requires_grad_()
    logprob = f64(-1.0, -2.0).requires_grad_()
    loss = cispo(log_ratio, logprob, f64(2.0, -1.0))
    assert loss.tolist() == pytest.approx([1.28 * 2.0 * 1.0, -0.5 * 2.0])
    assert grad_of(loss, logprob).tolist() == pytest.approx([-1.28 * 2.0, 0.5])
    assert not cispo(log_ratio, logprob.detach(), f64(2.0, -1.0)).requires_grad


@pytest.mark.parametrize(
    ("w", "advantage", "phi"),
    [
        (1.0, 2.0, 1.0),
        (1.0, -2.0, 1.0),
        (2.0, 0.5, 4 * math.exp(-3)),
        (2.0, -0.5, 8 * math.exp(-2)),
        (0.5, 0.5, 0.25 * math.exp(1.5)),
        (0.5, -0.5, 0.125 * math.exp(1.0)),
        (2 / 3, 1.0, 4 / 9 * math.e),  # the largest: k / lambda
        (1.5, -1.0, 27 / 8 / math.e),
    ],
)
def test_the_weight_of_vespo(w, advantage, phi):
    got = vespo_weight(Ratio.of(f64(math.log(w)), f64(advantage)))
    assert got.item() == pytest.approx(phi, rel=1e-13)


def test_vespo_weighs_log_pi_by_the_product_of_a_sequences_ratios():
    sequence_ids = torch.tensor([0, 0, 0, 1, 1])
    mask = torch.tensor([True, True, True, True, False])
    log_ratio = f64(0.4, -0.9, 0.2, 0.3, math.nan)
    logprob = f64(-1.0, -2.0, -0.5, -3.0, math.nan).requires_grad_()
    advantages = f64(2.0, 2.0, 2.0, -1.0, math.nan)
    sums = sequence_sum(log_ratio, mask, sequence_ids, torch.tensor([3, 1]))
    loss = vespo(log_ratio, sums[sequence_ids], logprob, advantages, mask)
    w = math.exp(-0.3), math.exp(0.3)
    phi = w[0] ** 2 * math.exp(3 - 3 * w[0]), w[1] ** 3 * math.exp(2 - 2 * w[1])
    slopes = [-2 * phi[0]] * 3 + [phi[1], 0.0]
    expected = [slope * x for slope, x in zip(slopes[:4], (-1.0, -2.0, -0.5, -3.0), strict=True)]
    assert loss.tolist() == pytest.approx([*expected, 0.0], rel=1e-13)
    assert grad_of(loss, logprob).tolist() == pytest.approx(slopes, rel=1e-13)


def every_loss(log_ratio, advantages, mask):
    yield clipped_loss(Ratio.of(log_ratio, advantages, mask), 0.2, 0.2, 3.0)
    yield gspo(log_ratio, log_ratio.detach(), advantages, mask)
    yield cispo(log_ratio, log_ratio, advantages, mask)
    yield vespo(log_ratio, log_ratio.detach(), log_ratio, advantages, mask)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 200.0])
def test_garbage_on_masked_tokens_changes_nothing(garbage):
    mask = torch.tensor([True, False])
    log_ratio = torch.tensor([0.0, garbage], requires_grad=True)
    for loss in every_loss(log_ratio, torch.tensor([1.5, garbage]), mask):
        assert loss[1] == 0
        assert grad_of(loss, log_ratio).tolist() == [-1.5, 0.0]


@pytest.mark.parametrize("extreme", [200.0, -200.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_stay_finite(extreme, advantage):
    log_ratio = torch.tensor([extreme], requires_grad=True)
    for loss in every_loss(log_ratio, torch.tensor([advantage]), None):
        assert loss.isfinite().all()
        assert grad_of(loss, log_ratio).isfinite().all()
