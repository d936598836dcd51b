"""A metric's value does not depend on how its batch was cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapo_megatron.metrics import (
    Covariance,
    EffectiveSampleSize,
    Histogram,
    Max,
    MaxViolation,
    Mean,
    Metrics,
    Min,
    Points,
    Share,
    Std,
    Sum,
    Variance,
)
from tests.support.gloo import run_ranks

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
PAIRS = st.lists(st.tuples(*[st.floats(-8.0, 8.0, width=32)] * 2), min_size=1, max_size=20)


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


def cov(x, y):
    return np.mean((x - x.mean()) * (y - y.mean()))


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS, cut=st.integers(0, 20))
def test_pieces_of_pairs_merge_to_the_whole(pairs, cut):
    a, b = torch.tensor(pairs).T
    x, y = a.double().numpy(), b.double().numpy()
    covariance = Covariance.of(a[:cut], b[:cut]).merge(Covariance.of(a[cut:], b[cut:]))
    assert covariance.value() == pytest.approx(cov(x, y), rel=1e-9, abs=1e-9)
    assume(np.var(x + y) > 1e-3)
    share = Share.of(a[:cut], b[:cut]).merge(Share.of(a[cut:], b[cut:]))
    assert share.value() == pytest.approx((np.var(y) + cov(x, y)) / np.var(x + y), abs=1e-6)
    assert share.value() + Share.of(b, a).value() == pytest.approx(1, abs=1e-6)


def test_masked_pairs_do_not_count():
    a = torch.tensor([1.0, math.nan, 2.0, 4.0])
    b = torch.tensor([0.5, 1.0, math.inf, -1.0])
    mask = torch.tensor([True, False, False, True])
    assert Covariance.of(a, b, mask).value() == Covariance.of(a[mask], b[mask]).value()
    assert Share.of(a, b, mask).value() == Share.of(a[mask], b[mask]).value()
    assert Points.of(a, b, mask).pairs() == Points.of(a[mask], b[mask]).pairs()


def test_a_share_of_no_variance_is_nan():
    x = torch.tensor([0.1, 0.7, 2.3])
    assert math.isnan(Share.of(0 * x, 0 * x).value())
    assert math.isnan(Share.of(0.3 - x.double(), x).value())
    assert math.isnan(Share.of(x[:0], x[:0]).value())
    assert Share.of(0 * x, x).value() == 1
    assert Share.of(x, 0 * x).value() == 0


def test_max_violation_leaves_idle_layers_out():
    counts = torch.tensor([[6, 0, 0], [0, 0, 0], [2, 2, 2]])
    assert MaxViolation(counts).value() == 1.0
    assert MaxViolation(counts).merge(MaxViolation(counts.flip(1))).value() == 0.25
    assert math.isnan(MaxViolation(torch.zeros(2, 3, dtype=torch.int64)).value())


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([0, 1, 255, 257, 900]),
    cut=st.floats(0, 1),
    seed=st.integers(0, 99),
    few=st.booleans(),
)
def test_points_are_the_same_in_any_pieces_and_order(n, cut, seed, few):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, generator=generator)
    if few:  # many pairs alike
        x, y = x.round(), y.round()
    shuffled = torch.randperm(n, generator=generator)
    first, second = shuffled[: int(n * cut)], shuffled[int(n * cut) :]
    whole = Points.of(x, y)
    merged = Points.of(x[first], y[first]).merge(Points.of(x[second], y[second]))
    assert merged.pairs() == whole.pairs()
    assert len(whole.pairs()) == min(n, Points.MOST)
    assert {tuple(p) for p in whole.pairs()} <= set(zip(x.tolist(), y.tolist(), strict=True))


def test_the_points_kept_are_an_even_sample():
    x = torch.arange(40_000) / 40_000
    kept = Points.of(x, 1 - x)
    assert torch.histc(kept.x, bins=4, min=0, max=1).tolist() == pytest.approx([64] * 4, abs=28)


def test_a_nan_shows():
    assert math.isnan(Mean.of(torch.tensor([1.0, math.nan])).value())
    assert math.isnan(Max.of(torch.tensor([1.0, math.nan])).value())


def test_gradients_do_not_leak_into_metrics():
    x = torch.ones(3, requires_grad=True)
    metrics = [kind.of(x) for kind in EXPECTED]
    metrics += [kind.of(x, x) for kind in (Covariance, Share, Points)]
    for metric in metrics:
        assert not any(v.requires_grad for v in vars(metric).values())


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


def bag_of(x):
    bag = Metrics()
    for kind in EXPECTED:
        bag.add(kind.__name__, kind.of(x))
    bag.add("sum", Sum(x.sum()))
    bag.add("covariance", Covariance.of(x, x.square()))
    bag.add("share", Share.of(x, x.square()))
    bag.add("load", MaxViolation(torch.bincount(x.long(), minlength=9)[None]))
    bag.add("histogram", Histogram.of(x, (0.0, 1.0, 2.0)))
    bag.add("points", Points.of(x, x.square()))
    return bag


def test_to_host_changes_no_value():
    bag = bag_of(torch.tensor([0.25, 1.5, 3.0]))
    host = bag.to_host()
    assert host.values() == bag.values()
    assert host.histograms()["histogram"].counts.tolist() == [1, 2]
    assert host.points()["points"].pairs() == bag.points()["points"].pairs()
    assert not {"histogram", "points"} & host.values().keys()
    assert "sum" in host
    assert "else" not in host
    assert all(
        isinstance(v, float)
        for m in host._metrics.values()
        for v in vars(m).values()
        if not isinstance(m, Histogram | Points | MaxViolation)
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
