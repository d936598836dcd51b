"""KL penalty to a reference policy, one number per token."""

import torch
from torch import Tensor

from sapo_megatron.objective.ratio import MAX_LOG_RATIO, masked


def kl_penalty(
    logprob: Tensor, ref_logprob: Tensor, kind: str, *, mask: Tensor | None = None
) -> Tensor:
    """An estimate of KL(pi_theta || pi_ref) from the sampled token, nats; zero where masked.

    With ``d = log pi_theta - log pi_ref`` (John Schulman, "Approximating KL divergence"):

    - ``k1``: ``d``, unbiased. Its own gradient, d log pi, has mean zero and would regularise
      nothing, so it comes with k2's gradient.
    - ``k2``: ``d^2 / 2``. Its gradient, ``d`` times d log pi, is an unbiased sample of the gradient
      of the KL on tokens drawn from pi_theta.
    - ``k3``: ``exp(-d) - 1 + d``, GRPO's choice (arXiv 2402.03300, equation 4): unbiased, never
      negative. Its gradient, ``1 - exp(-d)`` times d log pi, agrees with k2's to first order in d.
      Below d = -20 it is held constant, so that it cannot overflow.

    Tokens count as drawn from pi_theta; after several updates on one rollout batch that is an
    approximation. fp32, or fp64 for fp64 input. Raises ValueError for another ``kind``.
    """
    d = masked(logprob - ref_logprob, mask)
    match kind:
        case "k1":
            with_gradient = d.square() / 2
            return d.detach() + with_gradient - with_gradient.detach()
        case "k2":
            return d.square() / 2
        case "k3":
            bounded = d.clamp(min=-MAX_LOG_RATIO)
            return torch.expm1(-bounded) + bounded
        case _:
            raise ValueError(f"kl_type: expected k1, k2 or k3, got {kind!r}")
