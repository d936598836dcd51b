"""The policy loss of one micro-batch, and what it says about itself."""

from collections.abc import Callable
from dataclasses import dataclass

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
    cispo_loss,
    clipped_loss,
    outside_clip,
    vespo_loss,
    vespo_weight,
)
from sapo_megatron.objective.correction import correction_weights
from sapo_megatron.objective.kl import kl_penalty
from sapo_megatron.objective.ratio import Ratio, masked, safe_log_ratio
from sapo_megatron.objective.reduce import sequence_mean, sequence_sum, token_weights
from sapo_megatron.objective.sapo import sapo_gate, sapo_loss, sapo_weight, token_temperature
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig, LossType
from sapo_megatron.sample import Denominators, PackedBatch, Temperatures

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
    so a backward pass runs on every rank. Collective over ``cp_group`` for a loss of sequences and
    for masking by sequence.
    """
    assert batch.old_logprob is not None, "old_logprob is set before the first update"
    assert algorithm.kl_coef == 0 or batch.ref_logprob is not None, "kl_coef needs ref_logprob"
    assert algorithm.entropy_coef == 0 or entropy is not None, "entropy_coef needs entropy"
    mask, whole = batch.mask, (batch.mask, batch.sequence_ids, batch.lengths)
    log_ratio = logprob - batch.old_logprob
    kind = LOSSES[algorithm.loss_type]
    own = r = Ratio.of(log_ratio, batch.advantages, mask, logprob)
    if kind.of_sequences:
        own = r.of_sequences(kind.of_sequences(r.log_ratio, *whole, cp_group)[batch.sequence_ids])

    token_loss = kind.of_tokens(own, algorithm)
    metrics = Metrics()
    if correction is not None:
        multiplier, metrics = correction_weights(batch, logprob, correction, cp_group)
        if multiplier is not None:
            token_loss = token_loss * multiplier
    weights = token_weights(*whole, denominators, algorithm.loss_agg_mode, max_response_length)
    weights = weights.to(token_loss.dtype)
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
    metrics.update(ratio_metrics(r))
    metrics.update(kind.metrics(own, algorithm))
    return loss, metrics


@torch.no_grad()
def ratio_metrics(r: Ratio) -> Metrics:
    """How far the policy has moved from the one that sampled: ``ratio/*`` and ``actor/ppo_kl``."""
    metrics = Metrics()
    # mean(log pi_old - log pi_theta): the k1 estimate of KL(pi_old || pi_theta), as the tokens
    # were drawn from pi_old; positive on average.
    metrics.add("actor/ppo_kl", Mean.of(-r.log_ratio, r.mask))
    metrics.add("ratio/mean", Mean.of(r.ratio, r.mask))
    metrics.add("ratio/min", Min.of(r.ratio, r.mask))
    metrics.add("ratio/max", Max.of(r.ratio, r.mask))
    metrics.add("ratio/log_var", Variance.of(r.log_ratio, r.mask))
    metrics.add("ratio/ess", EffectiveSampleSize.of(r.ratio, r.mask))
    metrics.add("ratio/hist_pos", Histogram.of(r.ratio, RATIO_EDGES, r.advantages > 0))
    metrics.add("ratio/hist_neg", Histogram.of(r.ratio, RATIO_EDGES, r.advantages < 0))
    return metrics


@torch.no_grad()
def sequence_ess(
    batch: PackedBatch, logprob: Tensor, cp_group: dist.ProcessGroup | None = None
) -> EffectiveSampleSize:
    """Of sequences, each of which weighs the product of its tokens' pi / pi_rollout.

    ``logprob`` is log pi. Each factor and the product are within exp(+-``MAX_LOG_RATIO``). All
    context-parallel ranks count all sequences of the micro-batch, which leaves the share as it is.
    Collective over ``cp_group``.
    """
    log_ratio = safe_log_ratio(logprob - batch.rollout_logprob, batch.mask)
    sums = sequence_sum(log_ratio, batch.mask, batch.sequence_ids, batch.lengths, cp_group)
    return EffectiveSampleSize.of(safe_log_ratio(sums, None).exp(), batch.lengths > 0)


@torch.no_grad()
def gate_metrics(r: Ratio, temperatures: Temperatures) -> Metrics:
    """What the gate makes of tokens: ``sapo/gate_*``, ``sapo/weight_mean`` and histograms of w."""
    positive, negative = r.advantages > 0, r.advantages < 0
    tau = token_temperature(r.advantages, temperatures)
    gate, weight = sapo_gate(r.ratio, tau), sapo_weight(r.ratio, tau)
    metrics = Metrics()
    metrics.add("sapo/gate_mean", Mean.of(gate, r.mask))
    metrics.add("sapo/gate_pos_mean", Mean.of(gate, positive))
    metrics.add("sapo/gate_neg_mean", Mean.of(gate, negative))
    metrics.add("sapo/weight_mean", Mean.of(weight, r.mask))
    metrics.add("sapo/hist_weight_pos", Histogram.of(weight, WEIGHT_EDGES, positive))
    metrics.add("sapo/hist_weight_neg", Histogram.of(weight, WEIGHT_EDGES, negative))
    return metrics


@torch.no_grad()
def clip_metrics(r: Ratio, algorithm: AlgorithmConfig) -> Metrics:
    """The share of the tokens that clipping silences, ``actor/clip_fraction``, and dual clip's."""
    metrics = Metrics()
    outside = outside_clip(r.ratio, r.advantages, *algorithm.clip_range)
    metrics.add("actor/clip_fraction", Mean.of(outside, r.mask))
    if algorithm.clip_ratio_c is not None:
        dual = (r.advantages < 0) & (r.ratio > algorithm.clip_ratio_c)
        metrics.add("actor/dual_clip_fraction", Mean.of(dual, r.mask))
    return metrics


@torch.no_grad()
def cispo_metrics(r: Ratio, algorithm: AlgorithmConfig) -> Metrics:
    """The share of the tokens whose weight is clipped, ``actor/clip_fraction``."""
    metrics = Metrics()
    low, high = algorithm.clip_range
    metrics.add("actor/clip_fraction", Mean.of((r.ratio < 1 - low) | (r.ratio > 1 + high), r.mask))
    return metrics


@torch.no_grad()
def vespo_metrics(r: Ratio) -> Metrics:
    """Means over tokens of a sequence's W and of the weight phi(W) that it gets: ``vespo/*``."""
    metrics = Metrics()
    metrics.add("vespo/w_mean", Mean.of(r.ratio, r.mask))
    metrics.add("vespo/phi_mean", Mean.of(vespo_weight(r), r.mask))
    return metrics


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss: what it makes of a ratio."""

    of_tokens: Callable[[Ratio, AlgorithmConfig], Tensor]
    """The loss of each token, of the ratio's shape, not reduced."""
    metrics: Callable[[Ratio, AlgorithmConfig], Metrics]
    """What it says of itself, beside :func:`ratio_metrics`."""
    of_sequences: Callable[..., Tensor] | None = None
    """What makes the log-ratio of a sequence of its tokens', where the ratio is
    :meth:`~sapo_megatron.objective.ratio.Ratio.of_sequences`."""


LOSSES: dict[LossType, PolicyLoss] = {
    "sapo": PolicyLoss(
        lambda r, a: sapo_loss(r, a.temperatures), lambda r, a: gate_metrics(r, a.temperatures)
    ),
    "grpo": PolicyLoss(lambda r, a: clipped_loss(r, *a.clip_range, a.clip_ratio_c), clip_metrics),
    "gspo": PolicyLoss(
        lambda r, a: clipped_loss(r, *a.clip_range), clip_metrics, of_sequences=sequence_mean
    ),
    "cispo": PolicyLoss(lambda r, a: cispo_loss(r, *a.clip_range), cispo_metrics),
    "vespo": PolicyLoss(
        lambda r, a: vespo_loss(r), lambda r, a: vespo_metrics(r), of_sequences=sequence_sum
    ),
}
"""Which loss goes by which name; everything else that names losses looks here."""
