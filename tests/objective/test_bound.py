"""The paper's bound on what SAPO's gate does within a sequence, against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.metrics import Metrics
from sapo_megatron.objective import bound
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.sample import Temperatures
from tests.support.gloo import run_ranks


def measured(sequences, advantages, *, tau_pos=1.0, tau_neg=1.05):
    """Of whole sequences of log-ratios, None where a token does not count."""
    flat = [z for sequence in sequences for z in sequence]
    sizes = torch.tensor([len(sequence) for sequence in sequences])
    r = Ratio.of(
        torch.tensor([math.nan if z is None else z for z in flat], dtype=torch.float64),
        torch.repeat_interleave(torch.tensor(advantages), sizes),
        torch.tensor([z is not None for z in flat]),
    )
    return bound_metrics(
        r,
        Temperatures(tau_pos, tau_neg),
        torch.repeat_interleave(torch.arange(len(sequences)), sizes),
        torch.tensor([sum(z is not None for z in sequence) for sequence in sequences]),
    )


def sech2(x):
    return math.cosh(x) ** -2


@pytest.mark.parametrize(("advantage", "tau"), [(0.5, 0.8), (-0.5, 1.6), (0.0, 1.6)])
def test_two_tokens_by_hand(advantage, tau):
    """Log-ratios m - h and m + h: a variance of h^2 around m."""
    m, h = 0.3, 0.5
    metrics = measured([[m - h, None, m + h]], [advantage], tau_pos=0.8, tau_neg=1.6)
    at_mean = sech2(tau * m / 2)
    gates = (sech2(tau * (m - h) / 2) + sech2(tau * (m + h) / 2)) / 2
    weights = sum(sech2(tau * (math.exp(z) - 1) / 2) for z in (m - h, m + h)) / 2
    assert metrics.values() == pytest.approx(
        {
            "sapo/bound_lhs": abs(gates - at_mean),
            "sapo/bound_rhs": tau**2 / 4 * h**2,
            "sapo/bound_violations": 0,
            "sapo/gate_distance": abs(weights - at_mean),
            "sapo/seq_var": h**2,
            "sapo/small_dispersion_share": 0,
        }
    )
    (pair,) = metrics.points()["sapo/bound_points"].pairs()
    assert pair == pytest.approx([tau**2 / 4 * h**2, abs(gates - at_mean)])


def test_around_one_the_distance_is_that_of_tanh():
    """With m = 0, mean g - g(0) = -tanh^2(tau h / 2), and the bound is its first term."""
    for tau, h in ((1.0, 2.0), (3.0, 0.1), (0.2, 5.0)):
        values = measured([[-h, h]], [1.0], tau_pos=tau).values()
        assert values["sapo/bound_lhs"] == pytest.approx(math.tanh(tau * h / 2) ** 2)
        assert values["sapo/bound_rhs"] == pytest.approx((tau * h / 2) ** 2)


def test_one_token_has_no_dispersion():
    values = measured([[1.5], [-3.0, None]], [1.0, -1.0]).values()
    assert values["sapo/bound_lhs"] == values["sapo/bound_rhs"] == values["sapo/seq_var"] == 0
    assert values["sapo/small_dispersion_share"] == 1
    expected = [
        abs(sech2(tau * (math.exp(z) - 1) / 2) - sech2(tau * z / 2))
        for z, tau in ((1.5, 1.0), (-3.0, 1.05))
    ]
    assert values["sapo/gate_distance"] == pytest.approx(sum(expected) / 2)


def test_sequences_are_averaged_not_tokens():
    metrics = measured([[-0.1, 0.1] * 3, [-0.3, 0.3]], [1.0, 1.0])
    values = metrics.values()
    assert values["sapo/seq_var"] == pytest.approx((0.01 + 0.09) / 2)
    assert values["sapo/small_dispersion_share"] == 0.5
    histogram = metrics.histograms()["sapo/hist_seq_var"]
    bins = [i for i, n in enumerate(histogram.counts.tolist()) for _ in range(n)]
    assert [(histogram.edges[i], histogram.edges[i + 1]) for i in bins] == [
        (pytest.approx(0.01), pytest.approx(0.012)),
        (pytest.approx(0.09), pytest.approx(0.092)),
    ]


def test_sequences_without_a_valid_token_are_left_out():
    some = [[0.1, -0.4], [0.2, 0.9, -0.3]]
    alone = measured(some, [1.0, -1.0])
    among = measured([[None], *some, [None, None]], [1.0, 1.0, -1.0, 0.0])
    assert among.values() == pytest.approx(alone.values(), rel=1e-14)
    for metrics in (alone, among):
        assert metrics.histograms()["sapo/hist_seq_var"].counts.sum() == 2
        assert len(metrics.points()["sapo/bound_points"].pairs()) == 2
    nothing = measured([[None, None]], [1.0])
    assert nothing.values()["sapo/bound_violations"] == 0
    assert math.isnan(nothing.values()["sapo/seq_var"])


WIDE = st.lists(st.floats(-20.0, 20.0), min_size=1, max_size=8)
TAU = st.floats(0.1, 10.0)


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.tuples(WIDE, st.sampled_from([1.0, -1.0])), min_size=1, max_size=6),
    tau_pos=TAU,
    tau_neg=TAU,
)
def test_the_bound_holds(sequences, tau_pos, tau_neg):
    values = measured(*zip(*sequences, strict=True), tau_pos=tau_pos, tau_neg=tau_neg).values()
    assert values["sapo/bound_violations"] == 0
    assert values["sapo/bound_lhs"] <= values["sapo/bound_rhs"] + 1e-12
    assert values["sapo/bound_lhs"] <= 1


def test_a_violation_would_be_counted(monkeypatch):
    """With a gate three times as steep, small dispersions break the bound and large ones do not."""
    gate = bound._gate_of_log_ratio
    monkeypatch.setattr(bound, "_gate_of_log_ratio", lambda z, tau: gate(3 * z, tau))
    sequences = [[-0.1, 0.1], [-5.0, 5.0], [0.7], [None], [-0.2, 0.2]]
    metrics = measured(sequences, [1.0, 1.0, -1.0, 1.0, -1.0])
    assert metrics.values()["sapo/bound_violations"] == 2
    metrics.update(measured(sequences[:1], [1.0]))
    assert metrics.values()["sapo/bound_violations"] == 3


# Sequences of 4, 2 and 3 tokens. The second has its valid token on one rank only; of the third,
# nothing counts.
Z = torch.tensor([0.3, -0.2, 0.9, 0.1, 0.4, math.nan, 0.7, math.inf, 0.0], dtype=torch.float64)
COUNTS = torch.tensor([True] * 5 + [False] * 4)
SEQUENCE_IDS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
ADVANTAGES = torch.tensor([1.0] * 4 + [-1.0] * 5)
LENGTHS = torch.tensor([4, 1, 0])


def bound_of(rows, cp_group=None):
    return bound_metrics(
        Ratio.of(Z[rows], ADVANTAGES[rows], COUNTS[rows]),
        Temperatures(0.9, 1.3),
        SEQUENCE_IDS[rows],
        LENGTHS,
        cp_group,
    )


def assert_alike(got, expected):
    """In values, histogram and points; sums in another order differ by their rounding."""
    assert got.values() == pytest.approx(expected.values(), rel=1e-9, abs=1e-12, nan_ok=True)
    histograms = [m.histograms()["sapo/hist_seq_var"].counts.tolist() for m in (got, expected)]
    assert histograms[0] == histograms[1]
    points = [sorted(m.points()["sapo/bound_points"].pairs()) for m in (got, expected)]
    np.testing.assert_allclose(*points, rtol=1e-9, atol=1e-12)


def bound_on_a_rank():
    rank = dist.get_rank()
    metrics = bound_of([[0, 3, 4, 8], [1, 2, 5, 6, 7]][rank], dist.group.WORLD)
    return len(metrics.values()), metrics.gather()


def test_context_parallel_ranks_see_whole_sequences():
    (first, metrics), (second, same) = run_ranks(2, bound_on_a_rank)
    assert first > 0
    assert second == 0, "a sequence counts once"
    for gathered in (metrics, same):
        assert_alike(gathered, bound_of(slice(None)))


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(
        st.lists(st.none() | st.floats(-2.0, 2.0), min_size=1, max_size=4), min_size=1, max_size=6
    ),
    cut=st.integers(0, 6),
)
def test_micro_batches_merge_to_the_whole(sequences, cut):
    advantages = [(-1.0) ** i for i in range(len(sequences))]
    merged = Metrics()
    for piece in (slice(cut), slice(cut, None)):
        if sequences[piece]:
            merged.update(measured(sequences[piece], advantages[piece]))
    assert_alike(merged, measured(sequences, advantages))
