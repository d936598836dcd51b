"""The SAPO gate: closed forms, autograd against the analytic weight, and hostile input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.objective.sapo import sapo_gate, sapo_token_loss, sapo_weight

taus = st.floats(0.1, 10.0)
log_ratios = st.floats(-8.0, 8.0)
advantages = st.floats(-5.0, 5.0)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_and_grad(log_ratio, advantage, **kwargs):
    log_ratio = log_ratio.clone().requires_grad_()
    loss = sapo_token_loss(log_ratio, advantage, **kwargs)
    (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
    return loss.detach(), grad


@pytest.mark.parametrize(("tau", "at_zero_and_two"), [(1.0, 0.7864), (1.05, 0.7681)])
def test_weight_constants(tau, at_zero_and_two):
    weight = sapo_weight(f64(0.0, 1.0, 2.0), tau)
    torch.testing.assert_close(
        weight, f64(at_zero_and_two, 1.0, at_zero_and_two), atol=5e-5, rtol=0
    )


@pytest.mark.parametrize(("tau", "distance"), [(1.0, 1.7627), (1.05, 1.6788)])
def test_weight_is_half_at_distance(tau, distance):
    weight = sapo_weight(f64(1 - distance, 1 + distance), tau)
    torch.testing.assert_close(weight, f64(0.5, 0.5), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("tau", "largest", "at"), [(1.0, 1.5747, 2.060), (1.05, 1.5363, 1.992)])
def test_largest_weight_times_ratio(tau, largest, at):
    ratio = torch.linspace(0, 20, 200_001, dtype=torch.float64)
    value, index = (ratio * sapo_weight(ratio, tau)).max(0)
    assert value.item() == pytest.approx(largest, abs=5e-5)
    assert ratio[index].item() == pytest.approx(at, abs=1e-3)


def test_loss_against_the_formula_by_hand():
    loss, grad = loss_and_grad(f64(math.log(2.0), math.log(0.5)), f64(2.0, -3.0))
    gate_pos = 4 / 1.0 / (1 + math.exp(-1.0 * (2.0 - 1)))
    gate_neg = 4 / 1.05 / (1 + math.exp(-1.05 * (0.5 - 1)))
    torch.testing.assert_close(loss, f64(-2.0 * gate_pos, 3.0 * gate_neg), rtol=1e-14, atol=0)
    weight_pos = 1 / math.cosh(1.0 * 1.0 / 2) ** 2
    weight_neg = 1 / math.cosh(1.05 * 0.5 / 2) ** 2
    expected = f64(-2.0 * weight_pos * 2.0, 3.0 * weight_neg * 0.5)
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=0)


def test_zero_advantage_uses_tau_neg_and_has_no_loss():
    loss, grad = loss_and_grad(f64(0.3), f64(0.0))
    assert loss.item() == 0
    assert grad.item() == 0


@given(log_ratios, advantages, taus, taus)
@settings(max_examples=200, deadline=None)
def test_gradient_is_the_analytic_weight(log_ratio, advantage, tau_pos, tau_neg):
    _, grad = loss_and_grad(f64(log_ratio), f64(advantage), tau_pos=tau_pos, tau_neg=tau_neg)
    tau = tau_pos if advantage > 0 else tau_neg
    ratio = math.exp(log_ratio)
    x = tau * (ratio - 1) / 2
    weight = 1 / math.cosh(x) ** 2 if abs(x) < 300 else 0.0
    assert grad.item() == pytest.approx(-weight * ratio * advantage, rel=1e-9, abs=1e-100)


@pytest.mark.parametrize(
    ("tau", "rtol"),
    [(0.5, 2e-5), (1.0, 2e-5), (1.05, 2e-5), (2.0, 2e-5), (4.0, 2e-5), (8.0, 3e-4)],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_in_fp32_loss_and_gradient_are_as_accurate_as_the_weight(tau, rtol, sign):
    """Against fp64, for ratios of 0 to 20, wherever there is a weight to speak of."""
    log_ratio = torch.linspace(1e-3, 20, 20_001, dtype=torch.float64).log().float()
    taus = {"tau_pos": tau, "tau_neg": tau}
    loss, grad = loss_and_grad(log_ratio, torch.full_like(log_ratio, sign), **taus)
    ratio = log_ratio.double().exp()
    p, q = torch.sigmoid(tau * (ratio - 1)), torch.sigmoid(-tau * (ratio - 1))
    seen = 4 * p * q > 1e-6
    assert seen.sum() > 1000
    torch.testing.assert_close(loss.double(), -sign * 4 / tau * p, rtol=rtol, atol=0)
    expected = -sign * 4 * p * q * ratio
    torch.testing.assert_close(grad.double()[seen], expected[seen], rtol=rtol, atol=0)


@given(advantages, taus, taus)
@settings(max_examples=100, deadline=None)
def test_on_policy_it_is_the_policy_gradient(advantage, tau_pos, tau_neg):
    _, grad = loss_and_grad(f64(0.0), f64(advantage), tau_pos=tau_pos, tau_neg=tau_neg)
    assert grad.item() == pytest.approx(-advantage, rel=1e-13)


@given(st.floats(0.0, 50.0), st.floats(0.0, 50.0), taus)
@settings(max_examples=200, deadline=None)
def test_gate_is_bounded_and_rises(a, b, tau):
    low, high = sapo_gate(f64(min(a, b), max(a, b)), tau).tolist()
    assert 0 <= low <= high <= 4 / tau * (1 + 1e-15)


@given(st.floats(-3.0, 3.0), taus)
@settings(max_examples=200, deadline=None)
def test_weight_is_symmetric_and_at_most_one(distance, tau):
    left, right = sapo_weight(f64(1 - distance, 1 + distance), tau).tolist()
    assert left == pytest.approx(right, rel=1e-9)
    assert 0 <= right <= 1 + 1e-15


@given(st.floats(0.0, 20.0), taus)
@settings(max_examples=100, deadline=None)
def test_weight_is_the_slope_of_the_gate(ratio, tau):
    ratio = f64(ratio).requires_grad_()
    (slope,) = torch.autograd.grad(sapo_gate(ratio, tau).sum(), ratio)
    torch.testing.assert_close(slope, sapo_weight(ratio.detach(), tau), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("extreme", [200.0, -200.0, math.inf, -math.inf])
def test_extreme_ratios_have_finite_loss_and_no_gradient(dtype, advantage, extreme):
    log_ratio = torch.tensor([extreme], dtype=dtype)
    loss, grad = loss_and_grad(log_ratio, torch.tensor([advantage]))
    assert loss.isfinite().all()
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 200.0, -200.0, 89.0])
def test_garbage_on_masked_tokens_changes_nothing(garbage):
    mask = torch.tensor([True, False, True])
    log_ratio = torch.tensor([0.1, garbage, -0.2])
    advantage = torch.tensor([1.0, garbage, -1.0])
    loss, grad = loss_and_grad(log_ratio, advantage, mask=mask)
    clean_loss, clean_grad = loss_and_grad(log_ratio[mask], advantage[mask])
    assert loss[1] == 0
    assert grad[1] == 0
    assert torch.equal(loss[mask], clean_loss)
    assert torch.equal(grad[mask], clean_grad)


def test_nan_on_a_valid_token_is_not_hidden():
    loss = sapo_token_loss(torch.tensor([math.nan]), torch.tensor([1.0]))
    assert loss.isnan().all()


def test_dtypes_shapes_and_no_gradient_to_advantages():
    assert sapo_token_loss(torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)).dtype is (
        torch.float32
    )
    assert sapo_token_loss(f64(0.0), torch.ones(1)).dtype is torch.float64
    advantage = torch.ones(2, 1, requires_grad=True)
    loss = sapo_token_loss(torch.zeros(2, 5, requires_grad=True), advantage)
    assert loss.shape == (2, 5)
    loss.sum().backward()
    assert advantage.grad is None


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["tau_pos", "tau_neg"])
def test_bad_temperature_is_refused(name, tau):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number > 0"):
        sapo_token_loss(torch.zeros(1), torch.ones(1), **{name: tau})
