"""The importance ratio: what masked and extreme tokens become, and the ratio of a sequence."""

import math

import pytest
import torch

from sapo_megatron.objective.ratio import Ratio, safe_log_ratio


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_safe_log_ratio_clamps_both_sides():
    assert safe_log_ratio(f64(-30.0, -3.0, 30.0), None).tolist() == [-20.0, -3.0, 20.0]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_a_masked_token_holds_nothing(garbage):
    mask = torch.tensor([[True, False], [False, True]])
    log_ratio = torch.tensor([[0.5, garbage], [garbage, -50.0]], dtype=torch.bfloat16)
    r = Ratio.of(log_ratio, torch.tensor([[2.0], [garbage]]).double(), mask)
    assert r.log_ratio.tolist() == [[0.5, 0.0], [0.0, -20.0]]
    assert torch.equal(r.ratio, r.log_ratio.exp())
    assert r.advantages[~mask].tolist() == [0.0, 0.0]
    assert r.advantages[0, 0] == 2
    assert r.mask is mask
    assert {r.log_ratio.dtype, r.ratio.dtype, r.advantages.dtype} == {torch.float32}


def test_without_a_mask_all_tokens_count():
    r = Ratio.of(torch.zeros(2, 3), torch.ones(2, 1, requires_grad=True))
    assert r.mask.tolist() == [[True] * 3] * 2
    assert not r.advantages.requires_grad
    flat = r.flatten()
    assert (flat.ratio.shape, flat.advantages.shape, flat.mask.shape) == ((6,),) * 3


def test_the_ratio_of_a_sequence_has_the_gradient_of_its_tokens():
    log_ratio = f64(0.2, -0.4, math.nan).requires_grad_()
    mask = torch.tensor([True, True, False])
    sequence_log_ratio = f64(-0.1, -0.1, math.nan).requires_grad_()
    s = Ratio.of(log_ratio, f64(1.0, 1.0, 1.0), mask).of_sequences(sequence_log_ratio)
    assert s.ratio.tolist() == pytest.approx([math.exp(-0.1), math.exp(-0.1), 1])
    (gradient,) = torch.autograd.grad(s.ratio.sum(), log_ratio)
    assert gradient.tolist() == pytest.approx([math.exp(-0.1), math.exp(-0.1), 0])
