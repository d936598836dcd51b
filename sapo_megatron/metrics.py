"""Metrics that know their own reduction.

A metric is a set of sufficient statistics; merging two of them is exact, so a value does not
depend on how a batch was cut into ranks and micro-batches. Statistics may be 0-dim tensors until
:meth:`Metrics.to_host` brings all of them to the host in one transfer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

Scalar = float | Tensor


@dataclass(frozen=True)
class Metric:
    """Sufficient statistics that add up; subclasses say what they amount to."""

    def merge(self, other: Self) -> Self:
        assert type(self) is type(other), f"cannot merge {type(self)} with {type(other)}"
        names = [f.name for f in fields(self)]
        return type(self)(*(getattr(self, n) + getattr(other, n) for n in names))

    def value(self) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Metric):
    total: Scalar

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True)
class Mean(Metric):
    total: Scalar
    count: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Mean":
        """Mean of ``x`` over the entries where ``mask`` is True."""
        x, count = _select(x, mask)
        return cls(x.sum(), count)

    def value(self) -> float:
        return _ratio(self.total, self.count)


@dataclass(frozen=True)
class Variance(Metric):
    """Population variance."""

    count: Scalar
    total: Scalar
    squares: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Variance":
        """Population variance of ``x`` over the entries where ``mask`` is True."""
        x, count = _select(x, mask)
        return cls(count, x.sum(), x.square().sum())

    def value(self) -> float:
        mean = _ratio(self.total, self.count)
        return max(_ratio(self.squares, self.count) - mean * mean, 0.0)


@dataclass(frozen=True)
class Std(Variance):
    """Population standard deviation."""

    def value(self) -> float:
        return math.sqrt(super().value())


@dataclass(frozen=True)
class EffectiveSampleSize(Metric):
    """Kish's effective sample size of weights w as a share of n: (sum w)^2 / (n sum w^2)."""

    count: Scalar
    total: Scalar
    squares: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "EffectiveSampleSize":
        """Of the weights ``x`` where ``mask`` is True."""
        x, count = _select(x, mask)
        return cls(count, x.sum(), x.square().sum())

    def value(self) -> float:
        return _ratio(float(self.total) ** 2, float(self.count) * float(self.squares))


@dataclass(frozen=True)
class Max(Metric):
    largest: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Max":
        """Largest entry of ``x`` where ``mask`` is True; -inf where there is none."""
        x = x.detach() if mask is None else torch.where(mask, x.detach(), -math.inf)
        return cls(x.max() if x.numel() else -math.inf)

    def merge(self, other: "Max") -> "Max":
        return Max(_extreme(self.largest, other.largest, torch.maximum, max))

    def value(self) -> float:
        return float(self.largest)


@dataclass(frozen=True)
class Min(Metric):
    smallest: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Min":
        """Smallest entry of ``x`` where ``mask`` is True; inf where there is none."""
        x = x.detach() if mask is None else torch.where(mask, x.detach(), math.inf)
        return cls(x.min() if x.numel() else math.inf)

    def merge(self, other: "Min") -> "Min":
        return Min(_extreme(self.smallest, other.smallest, torch.minimum, min))

    def value(self) -> float:
        return float(self.smallest)


@dataclass(frozen=True)
class Histogram(Metric):
    """Counts between fixed edges; what falls outside counts in the first or last bin."""

    edges: tuple[float, ...]
    counts: Tensor
    """int64 [len(edges) - 1]."""

    @classmethod
    def of(cls, x: Tensor, edges: tuple[float, ...], mask: Tensor | None = None) -> "Histogram":
        x = x.detach() if mask is None else x.detach()[mask]
        inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=x.device)
        bins = torch.bucketize(x.double(), inner, right=True)
        return cls(edges, torch.bincount(bins, minlength=len(edges) - 1))

    def merge(self, other: "Histogram") -> "Histogram":
        assert self.edges == other.edges, "histograms with different edges do not merge"
        return Histogram(self.edges, self.counts + other.counts)


class Metrics:
    """A bag of named metrics. ``bag.add(name, metric)`` merges with what the name already holds."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, metric: Metric) -> None:
        held = self._metrics.get(name)
        self._metrics[name] = metric if held is None else held.merge(metric)

    def update(self, other: "Metrics") -> None:
        for name, metric in other._metrics.items():
            self.add(name, metric)

    def average_sums(self, share: float) -> None:
        """Turn sums into means over updates: ``share`` is this bag's part of one update."""
        for name, metric in self._metrics.items():
            if isinstance(metric, Sum):
                self._metrics[name] = Mean(metric.total, share)

    def finite(self, name: str) -> bool:
        """Whether ``name`` is absent here or finite."""
        return name not in self or math.isfinite(self._metrics[name].value())

    def __contains__(self, name: str) -> bool:
        return name in self._metrics

    def to_host(self) -> "Metrics":
        """The same bag with plain floats: one device-to-host transfer for all scalars."""
        tensors = [
            getattr(m, f.name)
            for m in self._metrics.values()
            for f in fields(m)
            if isinstance(getattr(m, f.name), Tensor) and getattr(m, f.name).dim() == 0
        ]
        stacked = torch.stack([t.double() for t in tensors]).tolist() if tensors else []
        floats = iter(stacked)
        bag = Metrics()
        for name, m in self._metrics.items():
            values = [getattr(m, f.name) for f in fields(m)]
            bag._metrics[name] = type(m)(
                *(
                    next(floats)
                    if isinstance(v, Tensor) and v.dim() == 0
                    else (v.cpu() if isinstance(v, Tensor) else v)
                    for v in values
                )
            )
        return bag

    def gather(self, group: dist.ProcessGroup | None = None) -> "Metrics":
        """The bags of all ranks merged, on every rank, in rank order (so all agree to the bit).

        Collective over ``group``, which carries host objects: every rank of it must call, with an
        empty bag where it has nothing to say.
        """
        mine = self.to_host()
        bags: list[Metrics] = [mine] * dist.get_world_size(group)
        dist.all_gather_object(bags, mine, group=group)
        merged = Metrics()
        for bag in bags:
            merged.update(bag)
        return merged

    def values(self) -> dict[str, float]:
        """Name to value, without the histograms."""
        return {n: m.value() for n, m in self._metrics.items() if not isinstance(m, Histogram)}

    def histograms(self) -> dict[str, Histogram]:
        return {n: m for n, m in self._metrics.items() if isinstance(m, Histogram)}


def _select(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` in fp64 with zeros where ``mask`` is False, and the number of entries that count."""
    x = x.detach().double()
    if mask is None:
        return x, torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device)
    return torch.where(mask, x, 0.0), mask.sum().double()


def _extreme(a: Scalar, b: Scalar, of_tensors: Callable, of_floats: Callable) -> Scalar:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return of_tensors(a, b)
    return of_floats(float(a), float(b))


def _ratio(total: Scalar, count: Scalar) -> float:
    return float(total) / float(count) if float(count) else math.nan
