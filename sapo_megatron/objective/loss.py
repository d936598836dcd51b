"""The policy loss of one micro-batch, and what it says about itself."""

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.metrics import (
    EffectiveSampleSize,
    Histogram,
    Max,
    Mean,
    Metrics,
    Min,
    Sum,
    Variance,
)
from sapo_megatron.objective.baselines import (
    cispo_token_loss,
    grpo_token_loss,
    gspo_token_loss,
    outside_clip,
)
from sapo_megatron.objective.correction import correction_weights
from sapo_megatron.objective.kl import kl_penalty
from sapo_megatron.objective.ratio import masked, safe_log_ratio
from sapo_megatron.objective.reduce import sequence_mean, token_weights
from sapo_megatron.objective.sapo import sapo_gate, sapo_token_loss, sapo_weight, token_temperature
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig
from sapo_megatron.sample import Denominators, PackedBatch

RATIO_EDGES = tuple(i / 20 for i in range(61))
"""Bins of the ratio histograms: 0 to 3 by 0.05; larger ratios count in the last bin."""
WEIGHT_EDGES = tuple(i / 50 for i in range(51))
"""Bins of the gradient-weight histograms: 0 to 1 by 0.02."""


def policy_loss(
    batch: PackedBatch,
    logprob: Tensor,
    entropy: Tensor | None,
    *,
    algorithm: AlgorithmConfig,
    denominators: Denominators,
    max_response_length: int,
    correction: CorrectionConfig | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Metrics]:
    """This piece's share of the global loss, 0-dim, and its metrics.

    ``logprob``, ``entropy`` [T], nats, of the current policy. The loss is ``sum of weight * (policy
    loss + kl_coef * KL - entropy_coef * entropy)`` with the weights of
    :func:`~sapo_megatron.objective.reduce.token_weights`; shares of all pieces add up to the loss
    of the global mini-batch. Without a valid token it is zero and still has a gradient (of zero),
    so a backward pass runs on every rank. Collective over ``cp_group`` for gspo and for masking by
    sequence.
    """
    assert batch.old_logprob is not None, "old_logprob is set before the first update"
    assert algorithm.kl_coef == 0 or batch.ref_logprob is not None, "kl_coef needs ref_logprob"
    assert algorithm.entropy_coef == 0 or entropy is not None, "entropy_coef needs entropy"
    mask = batch.mask
    log_ratio = logprob - batch.old_logprob
    sequence_log_ratio = None
    if algorithm.loss_type == "gspo":
        means = sequence_mean(log_ratio, mask, batch.sequence_ids, batch.lengths, cp_group)
        sequence_log_ratio = means[batch.sequence_ids]

    token_loss = _policy_token_loss(batch, logprob, log_ratio, sequence_log_ratio, algorithm)
    metrics = Metrics()
    if correction is not None:
        multiplier, metrics = correction_weights(batch, logprob, correction, cp_group)
        if multiplier is not None:
            token_loss = token_loss * multiplier
    weights = token_weights(
        mask,
        batch.sequence_ids,
        batch.lengths,
        denominators,
        algorithm.loss_agg_mode,
        max_response_length,
    ).to(token_loss.dtype)
    loss = (weights * token_loss).sum()
    metrics.add("actor/pg_loss", Sum(loss.detach()))
    if batch.ref_logprob is not None:
        kl = kl_penalty(logprob, batch.ref_logprob, algorithm.kl_type, mask=mask)
        kl_loss = (weights * kl).sum()
        metrics.add("actor/kl_loss", Sum(kl_loss.detach()))
        if algorithm.kl_coef > 0:
            loss = loss + algorithm.kl_coef * kl_loss
    if entropy is not None:
        metrics.add("actor/entropy", Mean.of(entropy, mask))
        if algorithm.entropy_coef > 0:
            loss = loss - algorithm.entropy_coef * (weights * masked(entropy, mask)).sum()
    with torch.no_grad():
        metrics.update(ratio_metrics(log_ratio, batch.advantages, mask))
        if algorithm.loss_type == "sapo":
            taus = {"tau_pos": algorithm.tau_pos, "tau_neg": algorithm.tau_neg}
            metrics.update(gate_metrics(log_ratio, batch.advantages, mask, **taus))
        else:
            metrics.update(_clip_metrics(batch, log_ratio, sequence_log_ratio, algorithm))
    return loss, metrics


def _policy_token_loss(
    batch: PackedBatch,
    logprob: Tensor,
    log_ratio: Tensor,
    sequence_log_ratio: Tensor | None,
    algorithm: AlgorithmConfig,
) -> Tensor:
    mask, advantages = batch.mask, batch.advantages
    if algorithm.loss_type == "sapo":
        return sapo_token_loss(
            log_ratio,
            advantages,
            tau_pos=algorithm.tau_pos,
            tau_neg=algorithm.tau_neg,
            mask=mask,
        )
    low, high = algorithm.clip_range
    clip = {"clip_ratio_low": low, "clip_ratio_high": high, "mask": mask}
    match algorithm.loss_type:
        case "grpo":
            return grpo_token_loss(
                log_ratio, advantages, clip_ratio_c=algorithm.clip_ratio_c, **clip
            )
        case "gspo":
            return gspo_token_loss(log_ratio, sequence_log_ratio, advantages, **clip)
        case "cispo":
            return cispo_token_loss(log_ratio, logprob, advantages, **clip)
        case _:
            raise ValueError(f"loss_type: expected a known loss, got {algorithm.loss_type!r}")


@torch.no_grad()
def ratio_metrics(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Metrics:
    """``ratio/*`` and ``actor/ppo_kl``: how far the policy has moved from the one that sampled.

    Tensors of one shape; ``log_ratio`` in nats; over the tokens where ``mask`` is True.
    """
    log_ratio = safe_log_ratio(log_ratio, mask)
    ratio = log_ratio.exp()
    metrics = Metrics()
    # mean(log pi_old - log pi_theta): the k1 estimate of KL(pi_old || pi_theta), as the tokens
    # were drawn from pi_old; positive on average.
    metrics.add("actor/ppo_kl", Mean.of(-log_ratio, mask))
    metrics.add("ratio/mean", Mean.of(ratio, mask))
    metrics.add("ratio/min", Min.of(ratio, mask))
    metrics.add("ratio/max", Max.of(ratio, mask))
    metrics.add("ratio/log_var", Variance.of(log_ratio, mask))
    metrics.add("ratio/ess", EffectiveSampleSize.of(ratio, mask))
    metrics.add("ratio/hist_pos", Histogram.of(ratio, RATIO_EDGES, mask & (advantages > 0)))
    metrics.add("ratio/hist_neg", Histogram.of(ratio, RATIO_EDGES, mask & (advantages < 0)))
    return metrics


@torch.no_grad()
def gate_metrics(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, tau_pos: float, tau_neg: float
) -> Metrics:
    """``sapo/gate_*`` and ``sapo/weight_*``; arguments as in :func:`ratio_metrics`."""
    ratio = safe_log_ratio(log_ratio, mask).exp()
    positive, negative = mask & (advantages > 0), mask & (advantages < 0)
    tau = token_temperature(advantages.to(ratio.dtype), tau_pos, tau_neg)
    gate, weight = sapo_gate(ratio, tau), sapo_weight(ratio, tau)
    metrics = Metrics()
    metrics.add("sapo/gate_mean", Mean.of(gate, mask))
    metrics.add("sapo/gate_pos_mean", Mean.of(gate, positive))
    metrics.add("sapo/gate_neg_mean", Mean.of(gate, negative))
    metrics.add("sapo/weight_mean", Mean.of(weight, mask))
    metrics.add("sapo/hist_weight_pos", Histogram.of(weight, WEIGHT_EDGES, positive))
    metrics.add("sapo/hist_weight_neg", Histogram.of(weight, WEIGHT_EDGES, negative))
    return metrics


def _clip_metrics(
    batch: PackedBatch,
    log_ratio: Tensor,
    sequence_log_ratio: Tensor | None,
    algorithm: AlgorithmConfig,
) -> Metrics:
    """Which share of the tokens a clipped loss silences."""
    mask, advantages = batch.mask, batch.advantages
    per_token = sequence_log_ratio is None
    ratio = safe_log_ratio(log_ratio if per_token else sequence_log_ratio, mask).exp()
    low, high = algorithm.clip_range
    if algorithm.loss_type == "cispo":
        clipped = (ratio < 1 - low) | (ratio > 1 + high)
    else:
        clipped = outside_clip(ratio, advantages, low, high)
    metrics = Metrics()
    metrics.add("actor/clip_fraction", Mean.of(clipped, mask))
    if algorithm.clip_ratio_c is not None:
        dual = mask & (advantages < 0) & (ratio > algorithm.clip_ratio_c)
        metrics.add("actor/dual_clip_fraction", Mean.of(dual, mask))
    return metrics
