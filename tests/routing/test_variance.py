"""Var[log r] split into weights and router, against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapo_megatron.routing.variance import split_metrics

NAMES = ("total", "weights", "router", "cov", "router_share")


def split(z, a, mask=None, *, layers_flipped=None, context=None, num_layers=0):
    z, a = (torch.as_tensor(x, dtype=torch.float64) for x in (z, a))
    return split_metrics(
        z,
        a,
        torch.ones(len(z), dtype=torch.bool) if mask is None else torch.as_tensor(mask),
        layers_flipped=None if layers_flipped is None else torch.as_tensor(layers_flipped),
        context=None if context is None else torch.as_tensor(context, dtype=torch.float64),
        num_layers=num_layers,
        prefix="variance",
        rest="weights",
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
    total, weights = expected[:2]
    assert metrics.values()["variance/replay_removes"] == pytest.approx(1 - weights / total)


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
    context = torch.rand(z.shape, generator=generator) / 3

    def measured(piece):
        return split(
            z[piece],
            a[piece],
            mask[piece],
            layers_flipped=layers_flipped[piece],
            context=context[piece],
            num_layers=3,
        )

    merged = measured(slice(cut))
    merged.update(measured(slice(cut, None)))
    expected = measured(slice(None)).values()
    if not expected["variance/total"] > 1e-3:
        for name in [n for n in expected if "router_share" in n or "removes" in n]:
            del expected[name]  # a ratio of rounding errors
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
        context=[0, 0.3, 0.1, 0],
        num_layers=1,
    )
    clean = split([1.0, 4.0], [0.5, 3.0], layers_flipped=[0, 0], context=[0, 0.1], num_layers=1)
    assert garbage.values() == pytest.approx(clean.values(), nan_ok=True)


def test_variance_by_the_number_of_layers_that_changed():
    metrics = split(
        [1.0, 3.0, 0.0, 4.0, 0.0, 6.0, 0.0, 8.0],
        [0.0] * 8,
        [True] * 7 + [False],
        layers_flipped=[0, 0, 1, 1, 3, 4, 4, 4],
        context=[0] * 8,
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
    values = split([0.0], [0.0], layers_flipped=[num_layers], context=[0], num_layers=num_layers)
    values = values.values()
    shares = [n for n in values if n.startswith("variance/by_layers_share/")]
    assert shares[-1].endswith(f"/{last}")
    assert values[shares[-1]] == 1
    assert sum(values[name] for name in shares) == 1


def test_a_model_without_experts_has_no_buckets():
    assert not any("by_layers" in name for name in split([1.0], [0.0]).values())
