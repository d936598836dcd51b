"""SAPO: the soft adaptive gate in place of hard clipping (arXiv 2511.20347, equations 5 to 8).

    J = E[ 1/G sum_i 1/|y_i| sum_t f(r_it) A_i ]        f(r) = 4/tau sigmoid(tau (r - 1))

The gradient of a token is ``w(r) r A d log pi`` with ``w = f'``: at r = 1, w is 1 for every tau and
the update is the plain policy gradient; away from it w falls smoothly to zero. f(1) = 2/tau, so
loss values of different temperatures do not compare; their gradients do.
"""

import torch
from torch import Tensor

from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.sample import Temperatures


def sapo_token_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    mask: Tensor | None = None,
) -> Tensor:
    """``-f(r) A`` of every token, zero where ``mask`` is False; not reduced.

    ``log_ratio``: any shape, log pi_theta - log pi_old in nats. ``advantages`` broadcasts with it
    and carries no gradient. ``mask``: bool, same shape as ``log_ratio``. The temperature is
    ``tau_pos`` where the advantage is positive and ``tau_neg`` elsewhere (equation 6). Computed in
    fp32; fp64 stays fp64. Masked entries may hold anything, NaN and inf included.

    Raises ValueError unless both temperatures are finite and > 0.
    """
    return sapo_loss(Ratio.of(log_ratio, advantages, mask), Temperatures(tau_pos, tau_neg))


def sapo_loss(r: Ratio, temperatures: Temperatures) -> Tensor:
    """:func:`sapo_token_loss` of a ratio: the loss of each token, of its shape."""
    return sapo_gate(r.ratio, token_temperature(r.advantages, temperatures)) * -r.advantages


def sapo_gate(ratio: Tensor, tau: float | Tensor) -> Tensor:
    """f(r) = 4/tau sigmoid(tau (r - 1)), equation 6; between 0 and 4/tau.

    As 1 - q with q = sigmoid(-tau (r - 1)): of q, autograd's slope q (1 - q) keeps its digits
    however large r is, where that of p = sigmoid(tau (r - 1)) has none left once p rounds to 1. At
    the other end r >= 0 bounds q: in fp32, f and its slope are right to about 1e-7 exp(tau).
    """
    return (1 - torch.sigmoid(-tau * (ratio - 1))) * (4 / tau)


def sapo_weight(ratio: Tensor, tau: float | Tensor) -> Tensor:
    """w(r) = f'(r) = sech^2(tau (r - 1) / 2), equation 8: the share of r A that a token keeps."""
    x = tau * (ratio - 1)
    return 4 * torch.sigmoid(x) * torch.sigmoid(-x)


def token_temperature(advantages: Tensor, temperatures: Temperatures) -> Tensor:
    """tau of each token, of the shape and dtype of ``advantages``."""
    positive = advantages.new_full((), temperatures.pos)
    return torch.where(advantages > 0, positive, temperatures.neg)
