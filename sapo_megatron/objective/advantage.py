"""Rewards of a group -> advantages of its responses."""

import torch
from torch import Tensor

NOISE = 1e-6
"""Rewards of a group that lie closer than this, relative to the largest of them, count as equal:
equal rewards that took different roads through fp32 differ by about 1e-7."""
TINY = 1e-30
"""Rewards below it are zero: the square of their spread would underflow."""


def group_advantages(rewards: Tensor, estimator: str) -> Tensor:
    """Advantages of N groups of G responses: ``rewards`` [N, G] -> [N, G], same float dtype.

    ``grpo``: ``(R - mean) / std`` (arXiv 2402.03300, section 4.1.2), with the sample standard
    deviation (divisor G - 1) that TRL, verl and ms-swift use and no epsilon: a reward scale cancels
    exactly. ``dr_grpo``: ``R - mean`` (arXiv 2503.20783). ``rloo``: ``R`` minus the mean of the
    other G - 1 (arXiv 2402.14740). A group whose rewards are all equal gets exactly zero.

    Raises ValueError for an unknown estimator, for rewards that are not [N, G] with G >= 2, and
    for a reward that is not finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards: expected [groups, responses] with at least 2 responses, got shape "
            f"{list(rewards.shape)}"
        )
    if not rewards.isfinite().all():
        raise ValueError("rewards: expected finite numbers, got NaN or inf; check the verifier")
    exact = rewards.double()
    centered = exact - exact.mean(dim=1, keepdim=True)
    group_size = rewards.shape[1]
    match estimator:
        case "grpo":
            advantages = centered / exact.std(dim=1, keepdim=True)
        case "dr_grpo":
            advantages = centered
        case "rloo":
            advantages = centered * (group_size / (group_size - 1))
        case _:
            raise ValueError(f"adv_estimator: expected grpo, dr_grpo or rloo, got {estimator!r}")
    advantages = torch.where(zero_std(rewards).unsqueeze(1), 0.0, advantages)
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def zero_std(rewards: Tensor) -> Tensor:
    """Which groups of ``rewards`` [N, G] have nothing to compare, all rewards equal: bool [N]."""
    rewards = rewards.double()
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= NOISE * rewards.abs().amax(dim=1).clamp(min=TINY)
