"""The variance of a log-ratio split into the router and the rest.

Two of a token's log-probs are compared, each at the experts that its routers chose, and a third one
stands between them: the new log-prob at the old experts.

    z = new at new experts - old at old experts = a + b
    a = new at old experts - old at old experts
    b = new at new experts - new at old experts      router

    Var z = Var a + Var b + 2 Cov(a, b)

Of the current and the old policy (``variance/*``) z is log r and a what the weights change. Of the
training and the rollout engine (``rollout_train/variance/*``) a is numerics, and staleness where
the rollout's weights are older. Only the sets of experts are held in a: how the new router weighs
the old experts is no swap, and counts there.

The router's share of Var z is Cov(b, z) / Var z = (Var b + Cov(a, b)) / Var z, which is 0 where the
routers choose alike and adds up to 1 with the share of a. Replaying the old experts leaves a of z,
so it removes 1 - Var a / Var z, which is another number: the covariance goes whole.

All logarithms are natural, so variances are in nats^2; all variances are population variances.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.metrics import Covariance, Mean, Metric, Metrics, Removed, Share, Variance

BUCKETS = (
    ("0", 0, 0),
    ("1", 1, 1),
    ("2", 2, 2),
    ("3-4", 3, 4),
    ("5-8", 5, 8),
    ("9-16", 9, 16),
    ("17+", 17, 1 << 30),
)
"""Name, least and greatest number of layers whose experts changed."""

CONTEXTS = (("0", 0.0), ("0-5%", 0.05), ("5-20%", 0.2), ("20-100%", 1.0))
"""Name and greatest share of the tokens of a context that changed."""
LEAST_SWAPS = 400
"""Below it a share hangs on a few tokens, and says nothing of a run."""


def split_metrics(
    z: Tensor,
    a: Tensor,
    mask: Tensor,
    *,
    layers_flipped: Tensor | None,
    context: Tensor | None,
    num_layers: int,
    prefix: str,
    rest: str,
) -> Metrics:
    """``PREFIX/*`` of a micro-batch's tokens ``[T]``, by the names of the module docstring.

    ``layers_flipped`` int [T] of ``num_layers`` with experts, and ``context`` fp64 [T] of
    :func:`context_flipped` (None: there are no experts); ``rest``: what a is called.
    ``PREFIX/cov`` is 2 Cov(a, b), so that rest, router and cov add up to total.
    """
    z, a = z.double(), a.double()
    b = z - a
    metrics = Metrics()
    metrics.add(f"{prefix}/total", Variance.of(z, mask))
    metrics.add(f"{prefix}/{rest}", Variance.of(a, mask))
    metrics.add(f"{prefix}/router", Variance.of(b, mask))
    metrics.add(f"{prefix}/cov", Covariance.of(2 * a, b, mask))
    metrics.add(f"{prefix}/router_share", Share.of(a, b, mask))
    metrics.add(f"{prefix}/replay_removes", Removed.of(a, b, mask))
    if layers_flipped is None or context is None:
        return metrics
    own = torch.where(layers_flipped > 0, b, 0.0)
    metrics.add(f"{prefix}/router_share_own", Share.of(z - own, own, mask))
    metrics.add(f"{prefix}/router_share_inherited", Share.of(a + own, b - own, mask))
    for name, least, greatest in BUCKETS:
        if least <= num_layers:
            inside = (layers_flipped >= least) & (layers_flipped <= greatest)
            metrics.add(f"{prefix}/by_layers/{name}", Variance.of(z, mask & inside))
            metrics.add(f"{prefix}/by_layers_share/{name}", Mean.of(inside, mask))
    beyond = -1.0
    for name, most in CONTEXTS:
        inside = (context > beyond) & (context <= most)
        metrics.add(f"{prefix}/by_context/{name}", Variance.of(z, mask & inside))
        metrics.add(f"{prefix}/by_context_share/{name}", Mean.of(inside, mask))
        beyond = most
    return metrics


def other_order_metrics(
    z: Tensor, a: Tensor, other_b: Tensor, mask: Tensor, *, prefix: str
) -> Metrics:
    """The router's share where it moves first, and the mean of both orders.

    ``other_b`` [T]: old at new experts - old at old experts.
    """
    z, a, other_b = z.double(), a.double(), other_b.double()
    b = (z - a + other_b) / 2
    metrics = Metrics()
    metrics.add(f"{prefix}/router_share_other_order", Share.of(z - other_b, other_b, mask))
    metrics.add(f"{prefix}/router_share_both_orders", Share.of(z - b, b, mask))
    return metrics


def context_flipped(
    layers_flipped: Tensor,
    position_ids: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The share of the tokens before each in its sequence whose experts changed: fp64 [T].

    Their keys and values are what a token inherits; 0 for the first token of a sequence. Vectors
    as in :class:`~sapo_megatron.sample.PackedBatch`. Collective over ``cp_group``.
    """
    starts = cu_seqlens.long()[sequence_ids]
    size = 1 if cp_group is None else cp_group.size()
    changed = torch.zeros(len(position_ids) * size, dtype=torch.float64, device=starts.device)
    changed[starts + position_ids] = (layers_flipped > 0).double()
    if size > 1:
        # Context parallel: each rank has some tokens of every sequence of the same micro-batch.
        dist.all_reduce(changed, group=cp_group)
    before = changed.cumsum(0) - changed
    return (before[starts + position_ids] - before[starts]) / position_ids.clamp(min=1)


@dataclass(frozen=True)
class Estimate:
    """A share of a variance, and where it lies with 95 percent confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Swaps(Metric):
    """How many swaps there were, and what shares of the variance they stand for.

    A swap is a token whose set of experts changed in a layer. Tokens of a sequence are not
    independent, so what counts for an interval is how sequences differ: all that it takes is the
    sum over sequences of v v^T, with v = (1, swaps, tokens, sums of b, z, b^2, b z, z^2).
    """

    products: Tensor
    """fp64 [8, 8]."""

    @classmethod
    def of(
        cls,
        z: Tensor,
        a: Tensor,
        mask: Tensor,
        *,
        layers_flipped: Tensor,
        sequence_ids: Tensor,
        num_sequences: int,
        cp_group: dist.ProcessGroup | None = None,
    ) -> "Swaps":
        """Of a micro-batch's tokens ``[T]``. Collective over ``cp_group``, whose first rank counts.

        The others have the sums of nothing.
        """
        z, a = (torch.where(mask, x.double(), 0.0) for x in (z, a))
        b = z - a
        one = mask.double()
        rows = torch.stack([one, layers_flipped * one, one, b, z, b * b, b * z, z * z], dim=1)
        sums = rows.new_zeros(num_sequences, 8).index_add_(0, sequence_ids, rows)
        if cp_group is not None:
            # Context parallel: each rank has some tokens of every sequence of the same micro-batch.
            dist.all_reduce(sums, group=cp_group)
            if cp_group.rank() > 0:
                sums = torch.zeros_like(sums)
        sums[:, 0] = (sums[:, 0] > 0).double()
        return cls(sums.T @ sums)

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> "Swaps":
        """The inverse of ``products.flatten().tolist()``."""
        return cls(torch.tensor(numbers, dtype=torch.float64).view(8, 8))

    def value(self) -> float:
        """The number of swaps; NaN where a log-prob was not finite."""
        return float(self.products[0, 1]) if bool(self.products.isfinite().all()) else math.nan

    def shares(self) -> dict[str, Estimate]:
        """``router_share``, Cov(b, z) / Var z, and ``replay_removes``, 1 - Var a / Var z.

        None below ``LEAST_SWAPS``, nor where it cannot be told that z varies at all.
        """
        if not self.value() >= LEAST_SWAPS or self.products[0, 0] < 2:
            return {}
        found = {
            "router_share": self._estimate(0.0, 1.0),
            "replay_removes": self._estimate(-1.0, 2.0),
        }
        return {name: estimate for name, estimate in found.items() if estimate is not None}

    def _estimate(self, of_var_b: float, of_cov: float) -> Estimate | None:
        """A multiple of Var b and one of Cov(b, z), added up and divided by Var z.

        With Fieller's interval: the shares s at which the sum over sequences of their parts of
        (numerator - s Var z) is within 1.96 of its standard deviations from 0.
        """
        sequences, _, tokens, b, z = self.products[0, :5].tolist()
        b, z = b / tokens, z / tokens
        # What a sequence adds to n Var b, n Cov(b, z), n Var z is one of these rows times its v.
        centred = torch.tensor(
            [
                [0, 0, b * b, -2 * b, 0, 1, 0, 0],
                [0, 0, b * z, -z, -b, 0, 1, 0],
                [0, 0, z * z, 0, -2 * z, 0, 0, 1],
            ],
            dtype=torch.float64,
        )
        numerator = torch.tensor([of_var_b, of_cov, 0.0], dtype=torch.float64)
        totals = centred @ self.products[0]
        spread = centred @ self.products @ centred.T * (1.96**2 * sequences / (sequences - 1))
        top, bottom = float(numerator @ totals), float(totals[2])
        square = bottom**2 - float(spread[2, 2])
        middle = top * bottom - float((spread @ numerator)[2])
        rest = top**2 - float(numerator @ spread @ numerator)
        if square <= 0:  # any share would do
            return None
        half = math.sqrt(max(middle**2 - square * rest, 0.0))
        return Estimate(top / bottom, (middle - half) / square, (middle + half) / square)
