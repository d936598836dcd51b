"""Var[log r] split into weights and router, and the paper's bound, against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.routing import variance
from sapo_megatron.routing.variance import split_metrics
from tests.support.gloo import run_ranks

NAMES = ("total", "weights", "router", "cov", "router_share")


def split(z, a, mask=None, *, layers_flipped=None, num_layers=0, repeated=None):
    z, a = (torch.as_tensor(x, dtype=torch.float64) for x in (z, a))
    return split_metrics(
        z,
        a,
        torch.ones(len(z), dtype=torch.bool) if mask is None else torch.as_tensor(mask),
        layers_flipped=None if layers_flipped is None else torch.as_tensor(layers_flipped),
        num_layers=num_layers,
        repeated=torch.zeros(len(z)) if repeated is None else torch.as_tensor(repeated),
    )


def parts(metrics):
    values = metrics.values()
    return {name: values[f"variance/{name}"] for name in NAMES}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, -1, 3, -3], [0, 0, 0, 0], (5, 5, 0, 0, 0)),
        ([0, 0, 0, 0], [1, -1, 3, -3], (5, 0, 5, 0, 1)),
        ([1, 1, -1, -1], [2, -2, 2, -2], (5, 1, 4, 0, 0.8)),
        ([2, -2], [1, -1], (9, 4, 1, 4, 1 / 3)),
        ([2, -2], [-1, 1], (1, 4, 1, -4, -1)),
        ([7, 9], [5, 5], (1, 1, 0, 0, 0)),
    ],
    ids=["weights", "router", "independent", "together", "against each other", "shifted"],
)
def test_parts_by_hand(a, b, expected):
    """Numbers that fp64 holds exactly: what is zero is exactly zero."""
    metrics = split(np.add(a, b), a)
    assert parts(metrics) == dict(zip(NAMES, expected, strict=True))
    assert metrics.values()["variance/noise"] == 0


LOG_RATIO = st.floats(-5.0, 5.0, width=32)
TOKENS = st.lists(st.tuples(LOG_RATIO, LOG_RATIO, st.booleans()), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS)
def test_the_parts_add_up_to_the_variance(tokens):
    z, a, mask = map(list, zip(*tokens, strict=True))
    assume(any(mask))
    found = parts(split(z, a, mask))
    total = np.var(np.array(z)[mask])
    assert found["total"] == pytest.approx(total, abs=1e-12)
    assert found["weights"] == pytest.approx(np.var(np.array(a)[mask]), abs=1e-12)
    assert found["weights"] + found["router"] + found["cov"] == pytest.approx(total, abs=1e-11)
    assume(total > 1e-3)
    share = (found["router"] + found["cov"] / 2) / total
    assert found["router_share"] == pytest.approx(share, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(tokens=TOKENS, seed=st.integers(0, 99), cut=st.integers(0, 20))
def test_pieces_merge_to_the_whole(tokens, seed, cut):
    z, a, mask = (torch.tensor(x) for x in zip(*tokens, strict=True))
    generator = torch.Generator().manual_seed(seed)
    layers_flipped = torch.randint(0, 4, z.shape, generator=generator)
    repeated = torch.randn(z.shape, generator=generator)

    def measured(piece):
        return split(
            z[piece],
            a[piece],
            mask[piece],
            layers_flipped=layers_flipped[piece],
            num_layers=3,
            repeated=repeated[piece],
        )

    merged = measured(slice(cut))
    merged.update(measured(slice(cut, None)))
    expected = measured(slice(None)).values()
    if not expected["variance/total"] > 1e-3:
        del expected["variance/router_share"]  # a ratio of rounding errors
    for name, value in expected.items():
        got = merged.values()[name]
        assert got == pytest.approx(value, rel=1e-6, abs=1e-10, nan_ok=True), name


def test_what_is_masked_does_not_count():
    mask = [True, False, True, False]
    garbage = split(
        [1.0, math.nan, 4.0, math.inf],
        [0.5, math.inf, 3.0, math.nan],
        mask,
        layers_flipped=[0, 1, 0, 0],
        num_layers=1,
        repeated=[0.5, math.nan, -0.5, -math.inf],
    )
    clean = split([1.0, 4.0], [0.5, 3.0], layers_flipped=[0, 0], num_layers=1, repeated=[0.5, -0.5])
    assert garbage.values() == pytest.approx(clean.values(), nan_ok=True)
    assert clean.values()["variance/noise"] == 0.25


def test_variance_by_the_number_of_layers_that_changed():
    metrics = split(
        [1.0, 3.0, 0.0, 4.0, 0.0, 6.0, 0.0, 8.0],
        [0.0] * 8,
        [True] * 7 + [False],
        layers_flipped=[0, 0, 1, 1, 3, 4, 4, 4],
        num_layers=4,
    )
    by_layers = {n: x for n, x in metrics.values().items() if "by_layers" in n}
    assert by_layers == pytest.approx(
        {
            "variance/by_layers/0": 1.0,
            "variance/by_layers/1": 4.0,
            "variance/by_layers/2": math.nan,
            "variance/by_layers/3-4": 8.0,
            "variance/by_layers_share/0": 2 / 7,
            "variance/by_layers_share/1": 2 / 7,
            "variance/by_layers_share/2": 0.0,
            "variance/by_layers_share/3-4": 3 / 7,
        },
        nan_ok=True,
    )


@pytest.mark.parametrize(
    ("num_layers", "last"),
    [(1, "1"), (2, "2"), (3, "3-4"), (8, "5-8"), (9, "9-16"), (17, "17+"), (61, "17+")],
)
def test_buckets_go_as_far_as_the_model(num_layers, last):
    values = split([0.0], [0.0], layers_flipped=[num_layers], num_layers=num_layers).values()
    shares = [n for n in values if n.startswith("variance/by_layers_share/")]
    assert shares[-1].endswith(f"/{last}")
    assert values[shares[-1]] == 1
    assert sum(values[name] for name in shares) == 1


def test_a_model_without_experts_has_no_buckets():
    assert not any("by_layers" in name for name in split([1.0], [0.0]).values())


def bound(sequences, advantages, *, tau_pos=1.0, tau_neg=1.05):
    """Of whole sequences of log-ratios, None where a token does not count."""
    flat = [z for sequence in sequences for z in sequence]
    sizes = torch.tensor([len(sequence) for sequence in sequences])
    return bound_metrics(
        torch.tensor([math.nan if z is None else z for z in flat], dtype=torch.float64),
        torch.repeat_interleave(torch.tensor(advantages), sizes),
        torch.tensor([z is not None for z in flat]),
        torch.repeat_interleave(torch.arange(len(sequences)), sizes),
        torch.tensor([sum(z is not None for z in sequence) for sequence in sequences]),
        tau_pos=tau_pos,
        tau_neg=tau_neg,
    )


def sech2(x):
    return math.cosh(x) ** -2


@pytest.mark.parametrize(("advantage", "tau"), [(0.5, 0.8), (-0.5, 1.6), (0.0, 1.6)])
def test_two_tokens_by_hand(advantage, tau):
    """Log-ratios m - h and m + h: a variance of h^2 around m."""
    m, h = 0.3, 0.5
    metrics = bound([[m - h, None, m + h]], [advantage], tau_pos=0.8, tau_neg=1.6)
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
        values = bound([[-h, h]], [1.0], tau_pos=tau).values()
        assert values["sapo/bound_lhs"] == pytest.approx(math.tanh(tau * h / 2) ** 2)
        assert values["sapo/bound_rhs"] == pytest.approx((tau * h / 2) ** 2)


def test_one_token_has_no_dispersion():
    values = bound([[1.5], [-3.0, None]], [1.0, -1.0]).values()
    assert values["sapo/bound_lhs"] == values["sapo/bound_rhs"] == values["sapo/seq_var"] == 0
    assert values["sapo/small_dispersion_share"] == 1
    expected = [
        abs(sech2(tau * (math.exp(z) - 1) / 2) - sech2(tau * z / 2))
        for z, tau in ((1.5, 1.0), (-3.0, 1.05))
    ]
    assert values["sapo/gate_distance"] == pytest.approx(sum(expected) / 2)


def test_sequences_are_averaged_not_tokens():
    metrics = bound([[-0.1, 0.1] * 3, [-0.3, 0.3]], [1.0, 1.0])
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
    alone = bound(some, [1.0, -1.0])
    among = bound([[None], *some, [None, None]], [1.0, 1.0, -1.0, 0.0])
    assert among.values() == pytest.approx(alone.values(), rel=1e-14)
    for metrics in (alone, among):
        assert metrics.histograms()["sapo/hist_seq_var"].counts.sum() == 2
        assert len(metrics.points()["sapo/bound_points"].pairs()) == 2
    nothing = bound([[None, None]], [1.0])
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
    values = bound(*zip(*sequences, strict=True), tau_pos=tau_pos, tau_neg=tau_neg).values()
    assert values["sapo/bound_violations"] == 0
    assert values["sapo/bound_lhs"] <= values["sapo/bound_rhs"] + 1e-12
    assert values["sapo/bound_lhs"] <= 1


def test_a_violation_would_be_counted(monkeypatch):
    """With a gate three times as steep, small dispersions break the bound and large ones do not."""
    gate = variance._gate_of_log_ratio
    monkeypatch.setattr(variance, "_gate_of_log_ratio", lambda z, tau: gate(3 * z, tau))
    sequences = [[-0.1, 0.1], [-5.0, 5.0], [0.7], [None], [-0.2, 0.2]]
    metrics = bound(sequences, [1.0, 1.0, -1.0, 1.0, -1.0])
    assert metrics.values()["sapo/bound_violations"] == 2
    metrics.update(bound(sequences[:1], [1.0]))
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
        *(x[rows] for x in (Z, ADVANTAGES, COUNTS, SEQUENCE_IDS)),
        LENGTHS,
        tau_pos=0.9,
        tau_neg=1.3,
        cp_group=cp_group,
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
            merged.update(bound(sequences[piece], advantages[piece]))
    assert_alike(merged, bound(sequences, advantages))
