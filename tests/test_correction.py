"""How far the log-probs of two engines lie apart."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.correction import EXTREME, mismatch_metrics

FINITE = st.floats(-30.0, 0.0, width=32)


def mismatch(old, rollout, mask=None):
    old, rollout = (torch.tensor(x, dtype=torch.float64) for x in (old, rollout))
    mask = torch.ones(len(old), dtype=torch.bool) if mask is None else torch.tensor(mask)
    return mismatch_metrics(old, rollout, mask).values()


def test_values_by_hand():
    """d = log 3 and -log 3: k1 cancels, k3 does not."""
    found = mismatch([math.log(0.6), math.log(0.2)], [math.log(0.2), math.log(0.6)])
    assert found == pytest.approx(
        {
            "rollout_train/kl": 0.0,
            "rollout_train/k3_kl": (2 - math.log(3) - 2 / 3 + math.log(3)) / 2,
            "rollout_train/logprob_abs_diff": math.log(3),
            "rollout_train/extreme_fraction": 1.0,
        },
        abs=1e-15,
    )


def test_equal_engines_do_not_differ():
    assert set(mismatch([-0.5, -3.0], [-0.5, -3.0]).values()) == {0.0}


def test_the_sign_is_that_of_the_kl_of_the_sampler():
    """Both estimators, averaged over the sampler's own distribution, are KL(rollout || train)."""
    rollout, train = [0.5, 0.25, 0.125, 0.125], [0.125, 0.25, 0.125, 0.5]
    kl = sum(p * math.log(p / q) for p, q in zip(rollout, train, strict=True))
    drawn = [0] * 4 + [1] * 2 + [2, 3]  # each token as often as its probability says
    found = mismatch(*([math.log(probs[i]) for i in drawn] for probs in (train, rollout)))
    assert kl > 0.5
    assert found["rollout_train/kl"] == pytest.approx(kl)
    assert found["rollout_train/k3_kl"] == pytest.approx(kl)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_factor_of_two_is_not_yet_extreme(sign):
    limit = math.log(EXTREME)
    differences = [sign * limit * (1 - 1e-9), sign * limit, sign * limit * (1 + 1e-9), 0.0]
    found = mismatch(differences, [0.0] * 4)
    assert found["rollout_train/extreme_fraction"] == 0.25


def test_differences_beyond_all_measure_stay_finite():
    found = mismatch([-1.0, -900.0], [-900.0, -1.0])
    assert found["rollout_train/logprob_abs_diff"] == 20
    assert found["rollout_train/k3_kl"] == pytest.approx(math.exp(20) / 2, rel=1e-6)


def test_what_is_masked_does_not_count():
    garbage = mismatch(
        [-1.0, math.nan, -2.0, math.inf], [-1.5, -1.0, -1.0, math.inf], [True, False, True, False]
    )
    assert garbage == mismatch([-1.0, -2.0], [-1.5, -1.0])


def test_a_nan_that_counts_shows():
    found = mismatch([-1.0, math.nan], [-1.0, -1.0])
    assert math.isnan(found["rollout_train/kl"])
    assert math.isnan(found["rollout_train/logprob_abs_diff"])


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.lists(st.tuples(FINITE, FINITE, st.booleans()), min_size=1, max_size=20),
    cut=st.integers(0, 20),
)
def test_pieces_merge_to_the_whole(tokens, cut):
    old, rollout, mask = (torch.tensor(x) for x in zip(*tokens, strict=True))
    merged = Metrics()
    for piece in (slice(cut), slice(cut, None)):
        merged.update(mismatch_metrics(old[piece], rollout[piece], mask[piece]))
    whole = mismatch_metrics(old, rollout, mask)
    assert merged.values() == pytest.approx(whole.values(), rel=1e-9, abs=1e-12, nan_ok=True)
