"""The losses SAPO is compared with: GRPO's clipping, GSPO, CISPO, VESPO.

They take the :class:`~sapo_megatron.objective.ratio.Ratio` of tokens and return the loss of each
token, same shape, zero where the mask is False, not reduced. Clip ranges, ``low`` and ``high``, are
distances from a ratio of 1.
"""

import torch
from torch import Tensor

from sapo_megatron.objective.ratio import Ratio, masked

VESPO_K, VESPO_LAMBDA = (2.0, 3.0), (3.0, 2.0)
"""Shape of :func:`vespo_weight` where A >= 0 and where A < 0, as its authors set it."""


def clipped_loss(r: Ratio, low: float, high: float, bound: float | None = None) -> Tensor:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)``: PPO's clip as GRPO uses it (arXiv 2402.03300).

    ``high > low`` is clip-higher (DAPO, arXiv 2503.14476). ``bound`` is dual clip (arXiv
    1912.09729): where A < 0 the objective is at least ``bound A``, so a token whose ratio exceeds
    it has no gradient.

    Of a ratio :meth:`~sapo_megatron.objective.ratio.Ratio.of_sequences` it is GSPO in its token
    form (arXiv 2507.18071, equations 7 and 14): the token mean over a sequence has the gradient of
    the sequence's ratio.
    """
    clipped = r.ratio.clamp(1 - low, 1 + high)
    objective = torch.minimum(r.ratio * r.advantages, clipped * r.advantages)
    if bound is not None:
        dual = torch.maximum(objective, bound * r.advantages)
        objective = torch.where(r.advantages < 0, dual, objective)
    return -objective


def outside_clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """True where :func:`clipped_loss` clips a token's gradient."""
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


def cispo_loss(r: Ratio, low: float, high: float) -> Tensor:
    """``-stop_gradient(clip(r, 1 - low, 1 + high)) A log pi`` (arXiv 2506.13585, equation 4).

    The clip bounds the weight of a token and never silences it; of ``r``, ``logprob`` alone
    receives gradient.
    """
    assert r.logprob is not None, "cispo weighs log pi"
    weight = r.ratio.detach().clamp(1 - low, 1 + high)
    return -weight * r.advantages * masked(r.logprob, r.mask)


def vespo_loss(r: Ratio) -> Tensor:
    """``-stop_gradient(phi(W)) A log pi`` (arXiv 2602.10693), phi being :func:`vespo_weight`.

    Of ``r``, a ratio :meth:`~sapo_megatron.objective.ratio.Ratio.of_sequences`, ``logprob`` alone
    receives gradient.
    """
    assert r.logprob is not None, "vespo weighs log pi"
    return -vespo_weight(r) * r.advantages * masked(r.logprob, r.mask)


@torch.no_grad()
def vespo_weight(r: Ratio) -> Tensor:
    """phi(W) = W^k exp(lambda (1 - W)) with W the product of a sequence's ratios; phi(1) = 1.

    Each factor of W, and W itself, is within exp(+-``MAX_LOG_RATIO``), as in the authors' code.
    """
    k, rate = (
        torch.where(r.advantages >= 0, r.ratio.new_full((), pos), neg)
        for pos, neg in (VESPO_K, VESPO_LAMBDA)
    )
    return (k * r.log_ratio + rate * (1 - r.ratio)).exp()
