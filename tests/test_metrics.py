"""A metric's value does not depend on how its batch was cut."""

import math

import numpy as np
import pytest
import torch
from gloo import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.metrics import (
    EffectiveSampleSize,
    Histogram,
    Max,
    Mean,
    Metrics,
    Min,
    Std,
    Sum,
    Variance,
)

EXPECTED = {
    Mean: np.mean,
    Variance: np.var,
    Std: np.std,
    Max: np.max,
    Min: np.min,
    EffectiveSampleSize: lambda x: x.sum() ** 2 / (len(x) * (x**2).sum()),
}
KINDS = pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
VALUES = st.lists(st.floats(0.125, 100.0, width=32), min_size=1, max_size=20)


@KINDS
@settings(max_examples=30, deadline=None)
@given(values=VALUES, cut=st.integers(0, 20))
def test_pieces_merge_to_the_whole(kind, values, cut):
    x = torch.tensor(values)
    merged = kind.of(x[:cut]).merge(kind.of(x[cut:])).value()
    assert merged == pytest.approx(EXPECTED[kind](x.double().numpy()), rel=1e-9, abs=1e-9)


@KINDS
def test_masked_entries_do_not_count(kind):
    x = torch.tensor([3.0, math.nan, 5.0, math.inf, 4.5])
    mask = torch.tensor([True, False, True, False, True])
    assert kind.of(x, mask).value() == pytest.approx(kind.of(x[mask]).value())
    assert kind.of(x[mask]).value() == pytest.approx(EXPECTED[kind](x[mask].double().numpy()))


@pytest.mark.parametrize("kind", [Mean, Variance, Std, EffectiveSampleSize])
def test_nothing_has_no_mean(kind):
    assert math.isnan(kind.of(torch.empty(0)).value())
    assert math.isnan(kind.of(torch.ones(3), torch.zeros(3, dtype=torch.bool)).value())


def test_nothing_has_no_extremes_and_leaves_others_alone():
    nothing, something = torch.empty(0), torch.tensor([2.0, 7.0])
    assert Max.of(nothing).value() == -math.inf
    assert Max.of(nothing).merge(Max.of(something)).value() == 7.0
    assert Min.of(something).merge(Min.of(nothing)).value() == 2.0


def test_a_nan_shows():
    assert math.isnan(Mean.of(torch.tensor([1.0, math.nan])).value())
    assert math.isnan(Max.of(torch.tensor([1.0, math.nan])).value())


def test_gradients_do_not_leak_into_metrics():
    x = torch.ones(3, requires_grad=True)
    for kind in EXPECTED:
        bag = Metrics()
        bag.add("x", kind.of(x))
        bag.to_host()
    assert not Mean.of(x).total.requires_grad


def test_histograms_count_what_lies_outside_in_the_outer_bins():
    x = torch.tensor([-5.0, 0.0, 0.5, 1.0, 1.5, 9.0])
    histogram = Histogram.of(x, (0.0, 1.0, 2.0))
    assert histogram.counts.tolist() == [3, 3]
    assert histogram.merge(Histogram.of(x[:1], (0.0, 1.0, 2.0))).counts.tolist() == [4, 3]
    masked = Histogram.of(x, (0.0, 1.0, 2.0), x > 0.7)
    assert masked.counts.tolist() == [0, 3]
    with pytest.raises(AssertionError):
        histogram.merge(Histogram.of(x, (0.0, 3.0)))


def test_one_name_holds_one_kind():
    bag = Metrics()
    bag.add("x", Sum(1.0))
    bag.add("x", Sum(2.0))
    assert bag.values() == {"x": 3.0}
    with pytest.raises(AssertionError):
        bag.add("x", Max(1.0))


def bag_of(x, histogram=True):
    bag = Metrics()
    for kind in EXPECTED:
        bag.add(kind.__name__, kind.of(x))
    bag.add("sum", Sum(x.sum()))
    if histogram:
        bag.add("histogram", Histogram.of(x, (0.0, 1.0, 2.0)))
    return bag


def test_to_host_changes_no_value():
    bag = bag_of(torch.tensor([0.25, 1.5, 3.0]))
    host = bag.to_host()
    assert host.values() == bag.values()
    assert host.histograms()["histogram"].counts.tolist() == [1, 2]
    assert "histogram" not in host.values()
    assert "sum" in host
    assert "else" not in host
    assert all(
        isinstance(v, float)
        for m in host._metrics.values()
        for v in vars(m).values()
        if not isinstance(m, Histogram)
    )


DATA = torch.tensor([0.25, 1.5, 3.0, 0.75, 8.0])


def gathered(cuts):
    rank = torch.distributed.get_rank()
    bags = []
    for rank_of in cuts:
        mine = DATA[[i for i, r in enumerate(rank_of) if r == rank]]
        bag = bag_of(mine).gather() if len(mine) else Metrics().gather()
        bags.append((bag.values(), bag.histograms()["histogram"].counts.tolist()))
    return bags


def test_gather_gives_the_whole_on_every_rank():
    first, second = run_ranks(2, gathered, [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    assert first == second
    for values, counts in first:
        assert values == pytest.approx(bag_of(DATA).values())
        assert counts == [2, 3]
