"""The engine that samples and the engine that trains give one token two log-probs: by how much."""

import math

import torch
from torch import Tensor

from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.objective.sapo import safe_log_ratio

EXTREME = 2.0
"""A token whose probabilities differ by more than this factor is extreme (arXiv 2510.11370)."""


@torch.no_grad()
def mismatch_metrics(old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor) -> Metrics:
    """``rollout_train/*`` of a micro-batch, ``[T]`` each, nats; ``old_logprob`` of the trainer.

    The tokens were drawn from the rollout engine, so with d = log pi_train - log pi_rollout the
    mean of -d (k1) and that of exp(d) - 1 - d (k3) both estimate KL(pi_rollout || pi_train).
    """
    d = safe_log_ratio(old_logprob.double() - rollout_logprob.double(), mask)
    metrics = Metrics()
    metrics.add("rollout_train/kl", Mean.of(-d, mask))
    metrics.add("rollout_train/k3_kl", Mean.of(d.expm1() - d, mask))
    metrics.add("rollout_train/logprob_abs_diff", Mean.of(d.abs(), mask))
    metrics.add("rollout_train/extreme_fraction", Mean.of(d.abs() > math.log(EXTREME), mask))
    return metrics
