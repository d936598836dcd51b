"""Metrics that know their own reduction.

A metric is a set of sufficient statistics; merging two of them is exact, so a value does not
depend on how a batch was cut into ranks and micro-batches. Statistics may be 0-dim tensors until
:meth:`Metrics.to_host` brings all of them to the host in one transfer.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.splitmix import splitmix64

Scalar = float | Tensor


@dataclass(frozen=True)
class Metric:
    """Sufficient statistics that add up; subclasses say what they amount to."""

    def merge(self, other: Self) -> Self:
        """The metric of both batches together."""
        assert type(self) is type(other), f"cannot merge {type(self)} with {type(other)}"
        names = [f.name for f in fields(self)]
        return type(self)(*(getattr(self, n) + getattr(other, n) for n in names))

    def value(self) -> float:
        """What the statistics amount to; NaN without any entry, unless the class says otherwise."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Metric):
    """A plain sum, 0 of nothing."""

    total: Scalar

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True)
class Mean(Metric):
    """A sum over a count."""

    total: Scalar
    count: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Mean":
        """The mean of ``x`` over the entries where ``mask`` is True."""
        x, count = _select(x, mask)
        return cls(x.sum(), count)

    def value(self) -> float:
        return _ratio(self.total, self.count)


@dataclass(frozen=True)
class _Moments(Metric):
    """Count, sum and sum of squares of a series."""

    count: Scalar
    total: Scalar
    squares: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Self:
        """The moments of ``x`` over the entries where ``mask`` is True."""
        x, count = _select(x, mask)
        return cls(count, x.sum(), x.square().sum())


class Variance(_Moments):
    """Population variance."""

    def value(self) -> float:
        return max(_covariance(self.count, self.total, self.total, self.squares), 0.0)


class Std(Variance):
    """Population standard deviation."""

    def value(self) -> float:
        return math.sqrt(super().value())


class EffectiveSampleSize(_Moments):
    """Kish's effective sample size of weights w as a share of n: (sum w)^2 / (n sum w^2)."""

    def value(self) -> float:
        return _ratio(float(self.total) ** 2, float(self.count) * float(self.squares))


@dataclass(frozen=True)
class _PairMoments(Metric):
    """Count, sums and sums of products of two series."""

    count: Scalar
    x: Scalar
    y: Scalar
    xx: Scalar
    xy: Scalar
    yy: Scalar

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Self:
        """The moments of ``x`` and ``y``, of one shape, over the pairs where ``mask`` is True."""
        x, count = _select(x, mask)
        y, _ = _select(y, mask)
        products = (x.square().sum(), (x * y).sum(), y.square().sum())
        return cls(count, x.sum(), y.sum(), *products)


class Covariance(_PairMoments):
    """Population covariance of two series."""

    def value(self) -> float:
        return _covariance(self.count, self.x, self.y, self.xy)


class Correlation(_PairMoments):
    """Pearson's correlation of two series; NaN where one of them is constant."""

    def value(self) -> float:
        spread = [
            _covariance(self.count, self.x, self.x, self.xx),
            _covariance(self.count, self.y, self.y, self.yy),
        ]
        if min(spread) <= 0:
            return math.nan
        return _covariance(self.count, self.x, self.y, self.xy) / math.sqrt(math.prod(spread))


class Share(_PairMoments):
    """The part of the variance of a + b that b explains, with x = b and y = a + b.

    (Var b + Cov(a, b)) / Var(a + b), that is Cov(x, y) / Var y: the shares of a and b add up to
    one, and either can lie outside [0, 1] where a and b cancel.
    """

    @classmethod
    def of(cls, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Self:
        """The share of ``b`` in ``a + b`` over the entries where ``mask`` is True."""
        return super().of(b, a.double() + b.double(), mask)

    def value(self) -> float:
        variance = _covariance(self.count, self.y, self.y, self.yy)
        # Sums of a constant y leave no exact zero; what is below their rounding counts as none.
        if variance <= 1e-13 * _ratio(self.yy, self.count):
            return math.nan
        return self._part() / variance

    def _part(self) -> float:
        return _covariance(self.count, self.x, self.y, self.xy)


class Removed(Share):
    """What of the variance of a + b is gone without b: 1 - Var a / Var(a + b)."""

    def _part(self) -> float:
        return 2 * super()._part() - _covariance(self.count, self.x, self.x, self.xx)


@dataclass(frozen=True)
class Max(Metric):
    """The largest entry; -inf of nothing."""

    largest: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Max":
        """The largest entry of ``x`` where ``mask`` is True."""
        x = x.detach() if mask is None else torch.where(mask, x.detach(), -math.inf)
        return cls(x.max() if x.numel() else -math.inf)

    def merge(self, other: "Max") -> "Max":
        return Max(_extreme(self.largest, other.largest, torch.maximum, max))

    def value(self) -> float:
        return float(self.largest)


@dataclass(frozen=True)
class Min(Metric):
    """The smallest entry; inf of nothing."""

    smallest: Scalar

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Min":
        """The smallest entry of ``x`` where ``mask`` is True."""
        x = x.detach() if mask is None else torch.where(mask, x.detach(), math.inf)
        return cls(x.min() if x.numel() else math.inf)

    def merge(self, other: "Min") -> "Min":
        return Min(_extreme(self.smallest, other.smallest, torch.minimum, min))

    def value(self) -> float:
        return float(self.smallest)


@dataclass(frozen=True)
class MaxViolation(Metric):
    """How far the busiest expert of a layer is above the mean load; the mean over the layers.

    max_e load / mean_e load - 1, so 0 is a perfect balance. Layers without tokens do not count.
    """

    counts: Tensor
    """int64 [L, E]: the tokens that each of E experts got in each of L layers."""

    def value(self) -> float:
        load = self.counts.double()
        load = load[load.sum(-1) > 0]
        return float((load.amax(-1) / load.mean(-1) - 1).mean())


@dataclass(frozen=True)
class Histogram(Metric):
    """Counts between fixed edges; what falls outside counts in the first or last bin."""

    edges: tuple[float, ...]
    counts: Tensor
    """int64 [len(edges) - 1]."""

    @classmethod
    def of(cls, x: Tensor, edges: tuple[float, ...], mask: Tensor | None = None) -> "Histogram":
        """The counts of the entries of ``x`` where ``mask`` is True; ``edges`` ascend."""
        x = x.detach() if mask is None else x.detach()[mask]
        inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=x.device)
        bins = torch.bucketize(x.double(), inner, right=True)
        return cls(edges, torch.bincount(bins, minlength=len(edges) - 1))

    def merge(self, other: "Histogram") -> "Histogram":
        assert self.edges == other.edges, "histograms with different edges do not merge"
        return Histogram(self.edges, self.counts + other.counts)


@dataclass(frozen=True)
class Points(Metric):
    """Pairs for a scatter plot, at most ``MOST`` of them.

    Those with the smallest hash stay, so the sample is even and the same in whatever order and
    pieces the pairs arrive. Pairs that are not finite have no place in a plot and are left out.
    """

    MOST: ClassVar[int] = 256

    x: Tensor
    """fp64 [n]."""
    y: Tensor
    """fp64 [n]."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor | None = None) -> "Points":
        """The pairs of ``x`` and ``y`` where ``mask`` is True."""
        x, y = x.detach().double(), y.detach().double()
        plotted = x.isfinite() & y.isfinite()
        if mask is not None:
            plotted &= mask
        return cls(*cls._sample(x[plotted], y[plotted]))

    def merge(self, other: "Points") -> "Points":
        pairs = torch.cat([self.x, other.x]), torch.cat([self.y, other.y])
        return Points(*self._sample(*pairs))

    def pairs(self) -> list[list[float]]:
        """``[x, y]`` of each point."""
        return torch.stack([self.x, self.y], dim=1).tolist()

    @classmethod
    def _sample(cls, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        key = splitmix64(splitmix64(x.view(torch.int64)) ^ y.view(torch.int64))
        kept = torch.argsort(key)[: cls.MOST]
        return x[kept], y[kept]


Span = tuple[str, float, float]
"""Where (a rank or a server), when it began (:func:`now`), and its seconds."""


@dataclass(frozen=True)
class Spans(Metric):
    """When something was done, and where; as a value, the seconds of where it took most."""

    spans: tuple[Span, ...] = ()

    @classmethod
    def since(cls, began: float) -> "Spans":
        """One on this rank, from :func:`now` of then."""
        return cls(((this_rank(), began, now() - began),))

    def value(self) -> float:
        seconds: defaultdict[str, float] = defaultdict(float)
        for where, _, duration in self.spans:
            seconds[where] += duration
        return max(seconds.values(), default=0.0)


class Metrics:
    """A bag of named metrics."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Merge a metric with what ``name`` already holds, which is one of the same kind."""
        held = self._metrics.get(name)
        self._metrics[name] = metric if held is None else held.merge(metric)

    def update(self, other: "Metrics") -> None:
        """Add all metrics of another bag."""
        for name, metric in other._metrics.items():
            self.add(name, metric)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that the block takes on this rank, unless it fails."""
        began = now()
        yield
        self.add(name, Spans.since(began))

    def average_sums(self, share: float) -> None:
        """Turn each sum over the pieces of an update into a mean over updates, in place.

        A rank holds a piece of every update and counts it as ``share`` of one, 1 / the number of
        such ranks. Merged over the ranks, totals are those of whole updates and the counts of each
        update add up to 1; merged over k updates they add up to k.
        """
        for name, metric in self._metrics.items():
            if isinstance(metric, Sum):
                self._metrics[name] = Mean(metric.total, share)

    def finite(self, name: str) -> bool:
        """Whether ``name`` is absent here or finite."""
        return name not in self or math.isfinite(self._metrics[name].value())

    def __contains__(self, name: str) -> bool:
        return name in self._metrics

    def __getitem__(self, name: str) -> Metric:
        return self._metrics[name]

    def to_host(self) -> "Metrics":
        """The same bag with plain floats: one transfer for all scalars of a device.

        There may be several devices: what a rollout says of its responses was never on a GPU.
        """
        scalars = {
            (name, f.name): value
            for name, m in self._metrics.items()
            for f in fields(m)
            if isinstance(value := getattr(m, f.name), Tensor) and value.dim() == 0
        }
        floats: dict[tuple[str, str], float] = {}
        for device in {value.device for value in scalars.values()}:
            here = {place: value for place, value in scalars.items() if value.device == device}
            stacked = torch.stack([value.double() for value in here.values()])
            floats.update(zip(here, stacked.tolist(), strict=True))
        bag = Metrics()
        for name, m in self._metrics.items():
            values = (floats.get((name, f.name), getattr(m, f.name)) for f in fields(m))
            bag._metrics[name] = type(m)(*(v.cpu() if isinstance(v, Tensor) else v for v in values))
        return bag

    def gather(self, group: dist.ProcessGroup | None = None) -> "Metrics":
        """The bags of all ranks merged, on every rank, in rank order (so all agree to the bit).

        Collective over ``group``.
        """
        mine = self.to_host()
        bags: list[Metrics] = [mine] * dist.get_world_size(group)
        # The caller's group, whose backend carries host objects: all of its ranks call, with an
        # empty bag where they have nothing to say.
        dist.all_gather_object(bags, mine, group=group)
        merged = Metrics()
        for bag in bags:
            merged.update(bag)
        return merged

    def values(self) -> dict[str, float]:
        """The value of every name that is neither a histogram nor points."""
        shapes = (Histogram, Points)
        return {n: m.value() for n, m in self._metrics.items() if not isinstance(m, shapes)}

    def histograms(self) -> dict[str, Histogram]:
        """The histogram of every name that holds one."""
        return {n: m for n, m in self._metrics.items() if isinstance(m, Histogram)}

    def spans(self) -> dict[str, tuple[Span, ...]]:
        """The spans of every name that holds some, which has a value as well."""
        return {n: m.spans for n, m in self._metrics.items() if isinstance(m, Spans)}

    def points(self) -> dict[str, Points]:
        """The points of every name that holds some."""
        return {n: m for n, m in self._metrics.items() if isinstance(m, Points)}


_EPOCH = time.time() - time.monotonic()


def now() -> float:
    """Seconds since 1970 by a clock that is never set; as good as those of the machines agree."""
    return _EPOCH + time.monotonic()


def this_rank() -> str:
    """This process, as spans name it."""
    return f"rank {dist.get_rank() if dist.is_initialized() else 0}"


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


def _covariance(count: Scalar, x: Scalar, y: Scalar, xy: Scalar) -> float:
    """Population covariance from a count and the sums of x, of y and of their products."""
    return _ratio(xy, count) - _ratio(x, count) * _ratio(y, count)
