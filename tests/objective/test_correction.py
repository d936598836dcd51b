"""How far the log-probs of two engines lie apart."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.correction import EXTREME, correction_weights, mismatch_metrics
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig
from sapo_megatron.sample import Denominators, PackedBatch

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
            "rollout_train/ess": (10 / 3) ** 2 / (2 * (9 + 1 / 9)),
            "rollout_train/pearson": -1.0,
        },
        abs=1e-12,
    )


def test_equal_engines_do_not_differ():
    found = mismatch([-0.5, -3.0], [-0.5, -3.0])
    assert found.pop("rollout_train/ess") == 1.0
    assert found.pop("rollout_train/pearson") == pytest.approx(1.0)
    assert set(found.values()) == {0.0}


def test_the_correlation_of_what_does_not_vary_is_no_number():
    assert math.isnan(mismatch([-1.0, -1.0], [-1.0, -2.0])["rollout_train/pearson"])


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


RATIOS = [1.0, 0.25, 3.0, 8.0, 0.9, math.nan]
MASK = [True, True, True, True, True, False]
"""Of train to rollout: two tokens of a bad response, three of a good one, and padding."""


def micro_batch(dtype=torch.float64):
    """Two sequences of 2 and 3 tokens with advantages -1 and 2."""
    old = torch.tensor([-1.0, -2.0, -1.5, -3.0, -0.5, math.nan], dtype=dtype)
    ids = torch.tensor([0, 0, 1, 1, 1, 1])
    return PackedBatch(
        tokens=torch.zeros(6, dtype=torch.int64),
        targets=torch.zeros(6, dtype=torch.int64),
        mask=torch.tensor(MASK),
        position_ids=torch.zeros(6, dtype=torch.int64),
        sequence_ids=ids,
        cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32),
        max_seqlen=4,
        lengths=torch.tensor([2, 3]),
        advantages=torch.where(ids == 0, -1.0, 2.0).to(dtype),
        rollout_logprob=old - torch.tensor(RATIOS, dtype=dtype).log(),
        sample_uids=(0, 1),
        old_logprob=old,
    )


def multipliers(**config):
    batch = micro_batch()
    weights, metrics = correction_weights(batch, batch.old_logprob, CorrectionConfig(**config))
    return weights[batch.mask].tolist(), metrics.values()


def test_truncated_importance_sampling():
    weights, metrics = multipliers(rollout_is="tis", tis_cap=2.5)
    assert weights == pytest.approx([1.0, 0.25, 2.5, 2.5, 0.9])
    assert metrics == pytest.approx(
        {"rollout_train/is_weight_mean": 7.15 / 5, "rollout_train/is_outside": 0.4}
    )


def test_icepop():
    weights, metrics = multipliers(rollout_is="icepop", icepop_low=0.5, icepop_high=5.0)
    assert weights == pytest.approx([1.0, 0.0, 3.0, 0.0, 0.9])
    assert metrics["rollout_train/is_outside"] == pytest.approx(0.4)


@pytest.mark.parametrize(("threshold", "kept"), [(0.69, 0.0), (0.70, 1.0)])
def test_far_sequences_with_a_negative_advantage_are_masked(threshold, kept):
    """The mean of log pi_rollout - log pi of the bad response is log(4) / 2 = 0.693."""
    weights, metrics = multipliers(sequence_mask_kl=threshold)
    assert weights == [kept, kept, 1.0, 1.0, 1.0]
    assert metrics["rollout_train/sequence_masked"] == pytest.approx((1 - kept) * 0.4)


def test_the_distance_of_a_sequence_is_that_of_the_current_policy():
    batch = micro_batch()
    logprob = batch.old_logprob + 2.0  # it has moved towards the rollout engine and past it
    weights, _ = correction_weights(batch, logprob, CorrectionConfig(sequence_mask_kl=0.1))
    assert weights[batch.mask].tolist() == [1.0] * 5


def test_corrections_multiply():
    weights, _ = multipliers(rollout_is="tis", sequence_mask_kl=0.1)
    assert weights == pytest.approx([0.0, 0.0, 2.0, 2.0, 0.9])


def test_without_a_correction_nothing_is_multiplied():
    batch = micro_batch()
    weights, metrics = correction_weights(batch, batch.old_logprob, CorrectionConfig())
    assert weights is None
    assert metrics.values() == {}


@pytest.mark.parametrize("loss_type", ["sapo", "grpo", "cispo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_policy_term_is_multiplied_and_nothing_else(loss_type, dtype):
    """Value and gradient, token by token; KL and entropy terms stay."""
    batch = micro_batch(dtype)
    batch = dataclasses.replace(batch, ref_logprob=batch.old_logprob - 0.3)
    correction = CorrectionConfig(rollout_is="icepop", sequence_mask_kl=0.1)
    weights, _ = correction_weights(batch, batch.old_logprob, correction)
    assert weights[batch.mask].tolist()[:2] == [0.0, 0.0]

    def gradient(correction, kl_coef):
        logprob = (batch.old_logprob + 0.05).requires_grad_()
        loss, _ = policy_loss(
            batch,
            logprob,
            None,
            algorithm=AlgorithmConfig(loss_type=loss_type, kl_coef=kl_coef),
            denominators=Denominators(sequences=2, tokens=5),
            max_response_length=8,
            correction=correction,
        )
        loss.backward()
        return float(loss), logprob.grad[batch.mask]

    plain, plain_grad = gradient(None, 0.0)
    corrected, corrected_grad = gradient(correction, 0.0)
    assert corrected != plain
    tolerance = {"rtol": 1e-5, "atol": 1e-7}
    if loss_type != "gspo":  # whose tokens share the gradient of a sequence
        expected = plain_grad * weights[batch.mask]
        torch.testing.assert_close(corrected_grad, expected, **tolerance)
    with_kl, kl_grad = gradient(None, 0.5)
    both, both_grad = gradient(correction, 0.5)
    assert both - corrected == pytest.approx(with_kl - plain, rel=1e-5)
    torch.testing.assert_close(both_grad - corrected_grad, kl_grad - plain_grad, **tolerance)
