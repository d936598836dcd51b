"""The importance ratio as every loss and metric takes it: masked, in fp32, clamped, then exp."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20: exp(20) is 5e8, far beyond every gate and clip range, and its
square is still finite in fp32."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The importance ratio r of tokens, and what losses and metrics take beside it.

    Tensors of one shape, in fp32 (fp64 stays fp64). The log-ratio and the advantage of a masked
    token are 0, whatever stood there.
    """

    log_ratio: Tensor
    """log r = log pi_theta - log pi_old, nats, within +-``MAX_LOG_RATIO``."""
    ratio: Tensor
    """r = exp(log r)."""
    advantages: Tensor
    """Without gradient."""
    mask: Tensor
    """bool, which tokens count."""
    logprob: Tensor | None = None
    """log pi_theta as it came, nats, for a loss that is not a function of r alone."""

    @classmethod
    def of(
        cls,
        log_ratio: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        logprob: Tensor | None = None,
    ) -> "Ratio":
        """The ratio of a log-ratio as it comes, of any shape, and advantages that broadcast to it.

        ``mask``: of the same shape; None: all tokens count.
        """
        log_ratio = safe_log_ratio(log_ratio, mask)
        advantages = advantages.detach().to(log_ratio.dtype).expand_as(log_ratio)
        return cls(
            log_ratio=log_ratio,
            ratio=log_ratio.exp(),
            advantages=masked(advantages, mask),
            mask=torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask,
            logprob=logprob,
        )

    def of_sequences(self, sequence_log_ratio: Tensor) -> "Ratio":
        """The same tokens, each with the ratio s of its sequence and the gradient s d log pi.

        ``sequence_log_ratio``: for each token, what its whole sequence makes of its tokens'
        log-ratios, such as their mean; taken as a constant.
        """
        sequence = safe_log_ratio(sequence_log_ratio.detach(), self.mask)
        log_ratio = sequence + self.log_ratio - self.log_ratio.detach()
        return replace(self, log_ratio=log_ratio, ratio=log_ratio.exp())

    def flatten(self) -> "Ratio":
        """The same tokens as vectors [T], without their log-probs."""
        return Ratio(
            log_ratio=self.log_ratio.flatten(),
            ratio=self.ratio.flatten(),
            advantages=self.advantages.flatten(),
            mask=self.mask.flatten(),
        )


def safe_log_ratio(log_ratio: Tensor, mask: Tensor | None) -> Tensor:
    """The log-ratio as every loss takes it: zero where masked, at least fp32, clamped.

    The order matters: garbage on padding must be gone before anything nonlinear, because a
    gradient of zero times inf is NaN; and beyond 88.7 exp overflows fp32, which would leave a
    finite loss with a NaN gradient. A NaN on a valid token stays NaN, for the caller to see.
    """
    return masked(log_ratio, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` in fp32 (fp64 stays fp64), zero where ``mask`` is False."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if mask is None else torch.where(mask, x, 0.0)
