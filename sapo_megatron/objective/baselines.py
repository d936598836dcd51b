"""The losses SAPO is compared with: GRPO's clipping, GSPO, CISPO.

All take the log-ratio ``log pi_theta - log pi_old`` of each token in nats and return the loss of
each token, same shape, zero where ``mask`` is False, not reduced. They follow SAPO's order of
operations (:class:`~sapo_megatron.objective.ratio.Ratio`): masked first, fp32 (fp64 stays fp64),
clamped, then exp. Clip ranges are distances from a ratio of 1.
"""

import torch
from torch import Tensor

from sapo_megatron.objective.ratio import Ratio, masked


def grpo_token_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)``: PPO's clip as GRPO uses it (arXiv 2402.03300).

    ``clip_ratio_high > clip_ratio_low`` is clip-higher (DAPO, arXiv 2503.14476).
    ``clip_ratio_c`` is dual clip (arXiv 1912.09729): where A < 0 the objective is at
    least ``c A``, so a token whose ratio exceeds c has no gradient.
    """
    r = Ratio.of(log_ratio, advantages, mask)
    return clipped_loss(r, clip_ratio_low, clip_ratio_high, clip_ratio_c)


def gspo_token_loss(
    log_ratio: Tensor,
    sequence_log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float = 3e-4,
    clip_ratio_high: float = 4e-4,
    mask: Tensor | None = None,
) -> Tensor:
    """GSPO in its token form (arXiv 2507.18071, equations 7 and 14).

    The ratio of every token is its sequence's ``s = exp(mean_t log r_t)``; it carries the token's
    gradient, ``s d log pi``, so that the token mean over a sequence has the gradient of ``s``.

    ``sequence_log_ratio``: for each token, the mean log-ratio of its whole sequence
    (:func:`~sapo_megatron.objective.reduce.sequence_mean`, which sees all context-parallel ranks);
    taken as a constant.
    """
    r = Ratio.of(log_ratio, advantages, mask).of_sequences(sequence_log_ratio)
    return clipped_loss(r, clip_ratio_low, clip_ratio_high)


def cispo_token_loss(
    log_ratio: Tensor,
    logprob: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float = 1.0,
    clip_ratio_high: float = 0.28,
    mask: Tensor | None = None,
) -> Tensor:
    """``-stop_gradient(clip(r, 1 - low, 1 + high)) A log pi`` (arXiv 2506.13585, equation 4).

    The clip bounds the weight of a token and never silences it. ``logprob``: log pi_theta of each
    token; the only argument that receives gradient.
    """
    r = Ratio.of(log_ratio, advantages, mask, logprob)
    return cispo_loss(r, clip_ratio_low, clip_ratio_high)


def outside_clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """True where :func:`grpo_token_loss` and :func:`gspo_token_loss` clip a token's gradient."""
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


def clipped_loss(r: Ratio, low: float, high: float, bound: float | None = None) -> Tensor:
    """:func:`grpo_token_loss` of a ratio, and with that of the sequences :func:`gspo_token_loss`.

    ``low`` and ``high``: the clip range; ``bound``: ``clip_ratio_c``. The loss of each token.
    """
    clipped = r.ratio.clamp(1 - low, 1 + high)
    objective = torch.minimum(r.ratio * r.advantages, clipped * r.advantages)
    if bound is not None:
        dual = torch.maximum(objective, bound * r.advantages)
        objective = torch.where(r.advantages < 0, dual, objective)
    return -objective


def cispo_loss(r: Ratio, low: float, high: float) -> Tensor:
    """:func:`cispo_token_loss` of a ratio that has its log-probs: the loss of each token."""
    assert r.logprob is not None, "cispo weighs log pi"
    weight = r.ratio.detach().clamp(1 - low, 1 + high)
    return -weight * r.advantages * masked(r.logprob, r.mask)
