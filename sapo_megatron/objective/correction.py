"""The engine that samples and the engine that trains give one token two log-probs.

By how much, and what is done about it: d = log pi_train - log pi_rollout of a sampled token, where
pi_train is the old policy as the training engine computes it.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.metrics import Correlation, EffectiveSampleSize, Mean, Metrics
from sapo_megatron.objective.ratio import safe_log_ratio
from sapo_megatron.objective.reduce import sequence_mean
from sapo_megatron.recipe.schema import CorrectionConfig
from sapo_megatron.sample import PackedBatch

EXTREME = 2.0
"""A token whose probabilities differ by more than this factor is extreme (arXiv 2510.11370)."""


@torch.no_grad()
def mismatch_metrics(
    old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor, *, prefix: str = "rollout_train"
) -> Metrics:
    """``PREFIX/*`` of a micro-batch, ``[T]`` each, nats; ``old_logprob`` of the trainer.

    The tokens were drawn from the rollout engine, so the mean of -d (k1) and that of
    exp(d) - 1 - d (k3) both estimate KL(pi_rollout || pi_train).
    """
    old, rollout = old_logprob.double(), rollout_logprob.double()
    d = safe_log_ratio(old - rollout, mask)
    metrics = Metrics()
    metrics.add(f"{prefix}/kl", Mean.of(-d, mask))
    metrics.add(f"{prefix}/k3_kl", Mean.of(d.expm1() - d, mask))
    metrics.add(f"{prefix}/logprob_abs_diff", Mean.of(d.abs(), mask))
    metrics.add(f"{prefix}/extreme_fraction", Mean.of(d.abs() > math.log(EXTREME), mask))
    metrics.add(f"{prefix}/ess", EffectiveSampleSize.of(d.exp(), mask))
    metrics.add(f"{prefix}/pearson", Correlation.of(old.exp(), rollout.exp(), mask))
    return metrics


@torch.no_grad()
def correction_weights(
    batch: PackedBatch,
    logprob: Tensor,
    config: CorrectionConfig,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor | None, Metrics]:
    """What each token's policy term is multiplied by, [T], and how much that bites.

    With r = exp(d), ``tis`` is truncated importance sampling, min(r, tis_cap); ``icepop`` is r
    between icepop_low and icepop_high and 0 outside. ``sequence_mask_kl`` takes out sequences with
    a negative advantage whose mean log pi_rollout - log pi is above it, pi being the current policy
    (``logprob``), as in DeepSeek-V3.2 (arXiv 2512.02556). None where the recipe corrects nothing.
    The denominators of the loss stay what they are. Collective over ``cp_group`` with
    ``sequence_mask_kl``.
    """
    metrics = Metrics()
    weights = None
    mask = batch.mask
    if config.rollout_is != "disabled":
        assert batch.old_logprob is not None, "old_logprob is set before the first update"
        ratio = safe_log_ratio(batch.old_logprob - batch.rollout_logprob, mask).exp()
        if config.rollout_is == "tis":
            outside = ratio > config.tis_cap
            weights = ratio.clamp(max=config.tis_cap)
        else:
            outside = (ratio < config.icepop_low) | (ratio > config.icepop_high)
            weights = torch.where(outside, 0.0, ratio)
        metrics.add("rollout_train/is_weight_mean", Mean.of(weights, mask))
        metrics.add("rollout_train/is_outside", Mean.of(outside, mask))
    if config.sequence_mask_kl is not None:
        distance = safe_log_ratio(batch.rollout_logprob - logprob, mask)
        kl = sequence_mean(distance, mask, batch.sequence_ids, batch.lengths, cp_group)
        far = (kl > config.sequence_mask_kl)[batch.sequence_ids] & (batch.advantages < 0)
        kept = (~far).to(distance.dtype)
        weights = kept if weights is None else weights * kept
        metrics.add("rollout_train/sequence_masked", Mean.of(far, mask))
    return weights, metrics
