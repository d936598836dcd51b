"""Swaps of a token and of its context, and shares of the variance with an interval by sequences."""

import math

import numpy as np
import pytest
import torch

from sapo_megatron.routing.variance import (
    LEAST_SWAPS,
    Estimate,
    Swaps,
    context_flipped,
    other_order_metrics,
    split_metrics,
)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_context_is_what_stands_before_a_token_in_its_sequence():
    """Sequences of 4, 1 and 3 tokens; of the first the second and third changed."""
    found = context_flipped(
        torch.tensor([0, 2, 1, 0, 1, 1, 0, 0]),
        torch.tensor([0, 1, 2, 3, 0, 0, 1, 2]),
        torch.tensor([0, 0, 0, 0, 1, 2, 2, 2]),
        torch.tensor([0, 4, 5, 8], dtype=torch.int32),
    )
    assert found.tolist() == [0, 0, 1 / 2, 2 / 3, 0, 0, 1, 1 / 2]


def split(z, a, layers_flipped, context):
    mask = torch.ones(len(z), dtype=torch.bool)
    flipped = torch.tensor(layers_flipped)
    settings = {"num_layers": 2, "prefix": "variance", "rest": "weights"}
    found = split_metrics(z, a, mask, layers_flipped=flipped, context=context, **settings)
    return {name.removeprefix("variance/"): value for name, value in found.values().items()}


def test_own_and_inherited_swaps_by_hand():
    """b is 2, -2 where a token swaps, 1, -1 where its context does, and 0 elsewhere."""
    a, b = tensor(1, -1, 1, -1, 0, 0), tensor(2, -2, 1, -1, 0, 0)
    found = split(a + b, a, [1, 2, 0, 0, 0, 0], tensor(0, 0.05, 0.06, 1, 0, 0))
    # z = 3, -3, 2, -2, 0, 0: Var z = 26 / 6, Cov(b, z) = (12 + 4) / 6, Var a = 4 / 6.
    assert found["router_share_own"] == pytest.approx(12 / 26)
    assert found["router_share_inherited"] == pytest.approx(4 / 26)
    assert found["router_share"] == pytest.approx(16 / 26)
    assert found["replay_removes"] == pytest.approx(22 / 26)
    by_context = {n: v for n, v in found.items() if n.startswith("by_context")}
    assert by_context == pytest.approx(
        {
            "by_context/0": 2.0,
            "by_context/0-5%": 0.0,
            "by_context/5-20%": 0.0,
            "by_context/20-100%": 0.0,
            "by_context_share/0": 1 / 2,
            "by_context_share/0-5%": 1 / 6,
            "by_context_share/5-20%": 1 / 6,
            "by_context_share/20-100%": 1 / 6,
        }
    )


def test_both_orders_by_hand():
    """Var z = 5, b = (1, -1, 0, 0) and in the other order (0, 0, 1, -1)."""
    z = tensor(3, -3, 1, -1)
    other = tensor(0, 0, 1, -1)
    mask = torch.ones(4, dtype=torch.bool)
    found = other_order_metrics(z, tensor(2, -2, 1, -1), other, mask, prefix="variance").values()
    assert found["variance/router_share_other_order"] == pytest.approx(2 / 20)
    assert found["variance/router_share_both_orders"] == pytest.approx((6 + 2) / 2 / 20)


def drawn(seed, sequences=300, length=6):
    """z, a, swaps and sequence of tokens, of which those of a sequence have much in common."""
    generator = np.random.default_rng(seed)
    ids = np.repeat(np.arange(sequences), length)
    scale = np.exp(0.3 * generator.standard_normal(sequences))[ids]
    a = scale * generator.standard_normal(len(ids))
    swapped = generator.random(len(ids)) < 0.3 * scale
    b = swapped * scale * (2 * generator.standard_normal(sequences)[ids] + 0.5 * a)
    numbers = (a + b, a, swapped.astype(np.int64), ids)
    return tuple(map(torch.from_numpy, numbers))


def swaps(z, a, flipped, ids, mask=None, count=None):
    return Swaps.of(
        z,
        a,
        torch.ones(len(z), dtype=torch.bool) if mask is None else mask,
        layers_flipped=flipped,
        sequence_ids=ids,
        num_sequences=int(ids.max()) + 1 if count is None else count,
    )


def test_the_shares_are_those_of_the_tokens():
    z, a, flipped, ids = drawn(0)
    found = swaps(z, a, flipped, ids)
    assert found.value() == flipped.sum()
    share = np.cov(z - a, z, bias=True)
    assert found.shares()["router_share"].value == pytest.approx(
        share[0, 1] / share[1, 1], rel=1e-12
    )
    removed = 1 - a.var(correction=0) / z.var(correction=0)
    assert found.shares()["replay_removes"].value == pytest.approx(removed.item(), rel=1e-12)


def test_what_is_masked_is_no_swap_and_fillers_are_no_sequence():
    z, a, flipped, ids = drawn(1)
    mask = ids < 200
    z[~mask], a[~mask] = math.nan, math.inf
    found = swaps(z, a, flipped, ids, mask, count=310)
    expected = swaps(z[mask], a[mask], flipped[mask], ids[mask])
    assert found.products.tolist() == expected.products.tolist()
    assert math.isnan(swaps(z, a, flipped, ids).value())


def test_pieces_of_whole_sequences_merge_to_the_whole():
    z, a, flipped, ids = drawn(2)
    halves = [swaps(z[part], a[part], flipped[part], ids[part]) for part in (ids < 70, ids >= 70)]
    merged, whole = halves[0].merge(halves[1]), swaps(z, a, flipped, ids)
    assert merged.products.flatten().tolist() == pytest.approx(whole.products.flatten().tolist())


def resampled(z, a, ids, share, draws=2000):
    """2.5 and 97.5 percent of the shares of sequences drawn with replacement."""
    generator = np.random.default_rng(7)
    b = z - a
    columns = torch.stack([torch.ones_like(z), b, z, b * b, b * z, z * z], dim=1)
    sums = columns.new_zeros(int(ids.max()) + 1, 6).index_add_(0, ids, columns).numpy()
    found = []
    for _ in range(draws):
        n, b, z, bb, bz, zz = sums[generator.integers(0, len(sums), len(sums))].sum(0)
        var_b, cov, var_z = bb / n - b * b / n**2, bz / n - b * z / n**2, zz / n - z * z / n**2
        found.append(share(var_b, cov, var_z))
    return np.quantile(found, [0.025, 0.975])


@pytest.mark.parametrize("seed", [3, 4])
def test_the_interval_is_that_of_drawing_whole_sequences(seed):
    z, a, flipped, ids = drawn(seed, sequences=4000)
    found = swaps(z, a, flipped, ids)
    for estimate, share in (
        (found.shares()["router_share"], lambda var_b, cov, var_z: cov / var_z),
        (found.shares()["replay_removes"], lambda var_b, cov, var_z: (2 * cov - var_b) / var_z),
    ):
        low, high = resampled(z, a, ids, share)
        width = high - low
        assert abs(estimate.low - low) + abs(estimate.high - high) < 0.15 * width
        alone = swaps(z, a, flipped, torch.arange(len(z))).shares()["router_share"]
        assert alone.high - alone.low < 0.8 * width, "tokens of a sequence are not independent"


def test_an_interval_holds_what_is_true_as_often_as_it_says():
    truth = swaps(*drawn(99, sequences=200_000)).shares()["router_share"].value
    held = [swaps(*drawn(seed)).shares()["router_share"] for seed in range(300)]
    share = sum(found.low <= truth <= found.high for found in held) / len(held)
    assert 0.91 < share < 0.99


def test_a_share_of_next_to_nothing_may_be_anything():
    """One sequence has all of the variance: whether there is any cannot be told."""
    z, a = tensor(0, 0, 0, 2), tensor(0, 0, 0, 1)
    many = torch.tensor([0, 0, 0, LEAST_SWAPS])
    assert swaps(z, a, many, torch.arange(4)).shares() == {}
    assert swaps(z, a, many, torch.zeros(4, dtype=torch.int64)).shares() == {}, "one sequence"
    assert swaps(0 * z, 0 * a, many, torch.arange(4)).shares() == {}


def test_no_share_of_few_swaps():
    z, a, flipped, ids = drawn(5)
    few = flipped * (flipped.cumsum(0) < LEAST_SWAPS)
    assert swaps(z, a, few, ids).value() == LEAST_SWAPS - 1
    assert swaps(z, a, few, ids).shares() == {}
    few[0] += 1
    assert len(swaps(z, a, few, ids).shares()) == 2


def test_an_estimate_in_words():
    assert str(Estimate(0.0091, 0.004, 0.0162)) == "0.9% (0.4 to 1.6)"
