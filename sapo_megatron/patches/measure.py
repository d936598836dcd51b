"""What a host's dashboard gets of a micro-batch: sums and counts, which every host can add up.

Hosts reduce what a loss function reports by adding or averaging; a variance does neither. So
log r comes as its first two moments, and ``ratio/log_var`` is made of them where a host lets one
finish (:func:`log_variance`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.loss import gate_metrics, ratio_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.sample import Temperatures

PER_TOKEN = (
    "ratio/mean",
    "ratio/log_mean",
    "ratio/log_square",
    "sapo/gate_mean",
    "sapo/weight_mean",
)
"""What is a mean over valid tokens."""
PER_SEQUENCE = (
    "sapo/bound_lhs",
    "sapo/bound_rhs",
    "sapo/gate_distance",
    "sapo/seq_var",
    "sapo/small_dispersion_share",
)
"""What is a mean over sequences with a valid token."""


@dataclass(frozen=True)
class Part:
    """A micro-batch's part of a mean, 0-dim fp64."""

    total: Tensor
    count: Tensor

    def pair(self) -> Tensor:
        """``[total, count]``."""
        return torch.stack([self.total, self.count])


class Measured(NamedTuple):
    """What :func:`measure` returns."""

    means: dict[str, Part]
    """All of ``PER_TOKEN`` and ``PER_SEQUENCE``, and ``sapo/gate_pos_mean`` and
    ``sapo/gate_neg_mean``, whose counts are the tokens with such an advantage."""
    violations: Tensor
    """``sapo/bound_violations``: the number of sequences, 0-dim fp64."""
    ratio_min: Tensor
    """inf without a valid token."""
    ratio_max: Tensor
    """-inf without a valid token."""


@torch.no_grad()
def measure(
    r: Ratio,
    temperatures: Temperatures,
    sequence_ids: Tensor,
    lengths: Tensor,
    cp_group: dist.ProcessGroup | None = None,
) -> Measured:
    """What tokens [T] give; arguments as in :func:`~sapo_megatron.objective.bound.bound_metrics`.

    With a ``cp_group`` its ranks hold parts of the same sequences; what is per sequence comes from
    its first rank alone. Collective over it.
    """
    bag = ratio_metrics(r)
    bag.update(gate_metrics(r, temperatures))
    bag.update(bound_metrics(r, temperatures, sequence_ids, lengths, cp_group))

    def number(name: str, statistic: str) -> Tensor:
        x = getattr(bag[name], statistic) if name in bag else 0.0
        return torch.as_tensor(x, dtype=torch.float64, device=r.mask.device)

    names = {*PER_TOKEN, *PER_SEQUENCE, "sapo/gate_pos_mean", "sapo/gate_neg_mean"}
    means = {name: Part(number(name, "total"), number(name, "count")) for name in sorted(names)}
    count = number("ratio/log_var", "count")
    means["ratio/log_mean"] = Part(number("ratio/log_var", "total"), count)
    means["ratio/log_square"] = Part(number("ratio/log_var", "squares"), count)
    return Measured(
        means=means,
        violations=number("sapo/bound_violations", "total"),
        ratio_min=number("ratio/min", "smallest"),
        ratio_max=number("ratio/max", "largest"),
    )


def measure_rows(r: Ratio, temperatures: Temperatures) -> Measured:
    """What sequences give that are whole, one per row: [B, S]."""
    rows = torch.arange(len(r.mask), device=r.mask.device)
    sequence_ids = rows.repeat_interleave(r.mask.shape[1])
    return measure(r.flatten(), temperatures, sequence_ids, r.mask.sum(1))


def log_variance(report: Mapping[str, Any]) -> float:
    """``ratio/log_var``, nats^2, from the reduced ``ratio/log_mean`` and ``ratio/log_square``."""
    return max(float(report["ratio/log_square"]) - float(report["ratio/log_mean"]) ** 2, 0.0)
