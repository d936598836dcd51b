import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapo_megatron.objective.advantage import group_advantages, zero_std

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Sample standard deviations: sqrt(4 * 0.25 / 3) and sqrt((3 * 0.75^2 + 2.25^2) / 3) = 1.5.
        (
            "grpo",
            [[0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5], [-0.5, -0.5, -0.5, 1.5]],
        ),
        ("dr_grpo", [[0.5, -0.5, -0.5, 0.5], [-0.75, -0.75, -0.75, 2.25]]),
        ("rloo", [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-1.0, -1.0, -1.0, 3.0]]),
    ],
)
def test_by_hand(estimator, expected):
    got = group_advantages(REWARDS, estimator)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize(
    "group",
    [[0.0] * 4, [1.0] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3], [1 / 3, 1 / 3 + 3e-8, 1 / 3, 1 / 3]],
)
def test_equal_REWARDhave_exactly_no_advantage(estimator, group):
    rewards = torch.tensor([group, [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    assert zero_std(rewards).tolist() == [True, False]
    got = group_advantages(rewards, estimator)
    assert got[0].tolist() == [0.0] * 4
    assert got[1].abs().min() > 0


def test_small_REWARDare_not_noise():
    assert zero_std(torch.tensor([[1e-9, 2e-9]])).tolist() == [False]


# At the thresholds of NOISE and TINY a change of scale may tip a group over.
REWARD = st.floats(-100, 100).map(lambda r: round(r, 3))


@given(st.lists(REWARD, min_size=2, max_size=16), st.floats(0.01, 100))
@example(group=[0.0, 1e-283], scale=1.0)
@settings(max_examples=200, deadline=None)
def test_mean_zero_unit_std_and_no_scale(group, scale):
    rewards = torch.tensor([group], dtype=torch.float64)
    got = group_advantages(rewards, "grpo")
    if zero_std(rewards).item():
        assert not got.any()
        return
    assert got.sum().item() == pytest.approx(0, abs=1e-6)
    assert got.std().item() == pytest.approx(1)
    torch.testing.assert_close(group_advantages(rewards * scale, "grpo"), got)


def test_dtype_follows_the_rewards():
    assert group_advantages(REWARDS.float(), "grpo").dtype is torch.float32
    assert group_advantages(REWARDS.int(), "grpo").dtype is torch.float32


@pytest.mark.parametrize(
    ("rewards", "estimator", "message"),
    [
        (torch.zeros(3, 1), "grpo", "at least 2 responses"),
        (torch.zeros(3), "grpo", "at least 2 responses"),
        (torch.tensor([[0.0, math.nan]]), "grpo", "expected finite"),
        (torch.zeros(3, 2), "gae", "expected grpo, dr_grpo or rloo, got 'gae'"),
    ],
)
def test_bad_input(rewards, estimator, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, estimator)
