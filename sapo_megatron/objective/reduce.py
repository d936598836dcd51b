"""Masks and denominators, and Megatron's loss contract.

Denominators. Every aggregation is ``sum of weight * token loss`` over all tokens of the global
mini-batch, with weights that depend on nothing but the mask, the lengths of whole sequences and
the global :class:`~sapo_megatron.sample.Denominators`. A piece of the batch (a micro-batch, a
data- or context-parallel rank) contributes its part of that one sum, so the loss and its gradient
do not depend on how the batch was cut. Sequences without a valid token are in no numerator and no
denominator.

Megatron's loss contract. With M micro-batches per data-parallel rank, dp data-parallel and cp
context-parallel ranks, megatron-core handles what a loss function returns in three places:

================================  ===========================  ===========================
 ..                                per-token loss off           per-token loss on
================================  ===========================  ===========================
schedule, 2-tuple                 ``* cp / M``                 ``* cp / M``
schedule, 3-tuple (num_tokens n)  ``/ max(n, 1) / M``          nothing
DDP's gradient scaling            ``/ (dp * cp)``              nothing (a plain sum)
``finalize_model_grads``          nothing                      ``/ sum of n``, 3-tuple only
================================  ===========================  ===========================

("per-token loss" is ``config.calculate_per_token_loss``; the schedule is ``forward_step_calc_loss``
in pipeline_parallel/schedules.py; the sum of n runs over all M, dp and cp, and a 2-tuple leaves it
at 0, which switches the division off.) :func:`megatron_loss` multiplies by the inverse, so that in
all four cases the gradient that reaches the optimizer is that of the plain sum of all pieces.

MoE auxiliary losses do not pass through the loss function; ``MoEAuxLossAutoScaler`` injects their
gradient in the backward pass, scaled by ``cp / M`` with per-token loss off: together with DDP, the
mean over M * dp micro-batches, whatever the tuple. With per-token loss on the scale is 1, and the
router multiplies its loss by the tokens it sees (``T / (tp * cp)`` under sequence and context
parallelism) and counts on finalize to divide. So there a 2-tuple leaves the auxiliary loss too
large by that number of tokens, and a 3-tuple divides it by the sum of n: an n equal to the
router's own count gives the token-weighted mean over M * dp * cp, that is 1 / cp of the other
contract's scale. (Later releases multiply by T, and an n of ``T / cp`` gives that scale itself;
``auxiliary_loss_tokens`` in policy/compat.py knows.) The default, a 2-tuple with per-token loss
off, has none of these corners.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.objective.ratio import masked
from sapo_megatron.sample import Denominators


def token_weights(
    mask: Tensor,
    sequence_ids: Tensor,
    lengths: Tensor,
    denominators: Denominators,
    mode: str,
    max_response_length: int,
) -> Tensor:
    """The weight of each token's loss in the global loss: fp64 [T], zero where masked.

    ``mask`` bool [T], ``sequence_ids`` int [T] into ``lengths`` int [S], the valid tokens of each
    whole sequence. With N and the number of tokens from ``denominators``:

    - ``seq-mean-token-mean``: ``1 / (length N)``, SAPO's and GRPO's own
    - ``token-mean``: ``1 / tokens`` (DAPO, arXiv 2503.14476)
    - ``seq-mean-token-sum-norm``: ``1 / (max_response_length N)`` (Dr. GRPO, arXiv 2503.20783)

    Raises ValueError for another ``mode``.
    """
    sequences = max(denominators.sequences, 1)
    match mode:
        case "seq-mean-token-mean":
            weights = 1 / (lengths.double().clamp(min=1)[sequence_ids] * sequences)
        case "token-mean":
            weights = torch.full_like(mask, 1 / max(denominators.tokens, 1), dtype=torch.float64)
        case "seq-mean-token-sum-norm":
            weights = torch.full_like(
                mask, 1 / (max_response_length * sequences), dtype=torch.float64
            )
        case _:
            raise ValueError(
                f"loss_agg_mode: expected seq-mean-token-mean, token-mean or "
                f"seq-mean-token-sum-norm, got {mode!r}"
            )
    return torch.where(mask, weights, 0.0)


@torch.no_grad()
def sequence_sum(
    x: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    lengths: Tensor,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum of ``x`` [T] over the valid tokens of each whole sequence: [S], without gradient.

    ``mask``, ``sequence_ids`` and ``lengths`` as in :func:`token_weights`; 0 for a sequence without
    a valid token. fp32, or fp64 for fp64 input. Collective over ``cp_group`` when it is given.
    """
    x = masked(x, mask)
    sums = x.new_zeros(lengths.shape).index_add_(0, sequence_ids, x)
    if cp_group is not None and cp_group.size() > 1:
        # Context-parallel group: its ranks hold slices of the same sequences of the same
        # micro-batch, so all of them are here with the same [S], valid tokens or not.
        dist.all_reduce(sums, group=cp_group)
    return sums


def sequence_mean(
    x: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    lengths: Tensor,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The mean that goes with :func:`sequence_sum`."""
    sums = sequence_sum(x, mask, sequence_ids, lengths, cp_group)
    return sums / lengths.to(sums.dtype).clamp(min=1)


def megatron_loss(
    loss_sum: Tensor,
    report: Any,
    *,
    num_microbatches: int,
    dp_size: int,
    cp_size: int,
    contract: Literal["2-tuple", "3-tuple"] = "2-tuple",
    calculate_per_token_loss: bool = False,
    num_tokens: int = 1,
    total_num_tokens: int | None = None,
) -> tuple[Tensor, Any] | tuple[Tensor, Tensor, Any]:
    """What a Megatron loss function returns, such that the gradient is that of the sum of pieces.

    ``loss_sum``: 0-dim, this micro-batch's share of the global loss on this rank. ``report``
    travels through the schedule untouched. ``dp_size`` counts without context parallelism. The
    other names are megatron-core's; see the module docstring for the arithmetic.

    ``num_tokens`` only matters for MoE auxiliary losses under a 3-tuple with per-token loss;
    ``total_num_tokens`` is its sum over all micro-batches and data- and context-parallel ranks
    (None: all pieces have the same). Raises ValueError for another ``contract``.
    """
    pieces = num_microbatches * dp_size * cp_size
    match contract:
        case "2-tuple":
            ddp = 1 if calculate_per_token_loss else dp_size * cp_size
            return loss_sum * (num_microbatches * ddp / cp_size), report
        case "3-tuple":
            if calculate_per_token_loss:
                divisor = num_tokens * pieces if total_num_tokens is None else total_num_tokens
            else:
                divisor = max(num_tokens, 1) * pieces
            # Fresh every time: the schedule adds these up in place, as int32.
            count = torch.tensor(num_tokens, dtype=torch.int, device=loss_sum.device)
            return loss_sum * divisor, count, report
        case _:
            raise ValueError(f"contract: expected 2-tuple or 3-tuple, got {contract!r}")
