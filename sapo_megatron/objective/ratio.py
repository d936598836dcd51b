"""The importance ratio as every loss and metric takes it: masked, in fp32, clamped, then exp."""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20: exp(20) is 5e8, far beyond every gate and clip range, and its
square is still finite in fp32."""


def safe_log_ratio(log_ratio: Tensor, mask: Tensor | None) -> Tensor:
    """The log-ratio as every loss takes it: zero where masked, at least fp32, clamped.

    The order matters: garbage on padding must be gone before anything nonlinear, because a
    gradient of zero times inf is NaN; and beyond 88.7 exp overflows fp32, which would leave a
    finite loss with a NaN gradient. A NaN on a valid token stays NaN, for the caller to see.
    """
    return masked(log_ratio, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def safe_advantages(advantages: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    """Advantages without gradient, in the shape and dtype of ``like``, zero where masked."""
    return masked(advantages.detach().to(like.dtype).expand_as(like), mask)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` in fp32 (fp64 stays fp64), zero where ``mask`` is False."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if mask is None else torch.where(mask, x, 0.0)
