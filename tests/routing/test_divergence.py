"""Which experts changed between two readings of the same tokens, and that no cut changes it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.metrics import Metrics
from sapo_megatron.routing.divergence import (
    compare,
    flips,
    load_metrics,
    router_shift,
    token_metrics,
    total_variation,
)
from sapo_megatron.sample import Routes

CHOSEN = st.permutations(range(6)).map(lambda experts: experts[:3])


@given(pairs=st.lists(st.tuples(CHOSEN, CHOSEN), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_flips_are_differences_of_sets(pairs):
    old, new = torch.tensor(pairs, dtype=torch.int16).unbind(1)
    assert flips(old, new).tolist() == [len(set(o) - set(n)) for o, n in pairs]


def test_total_variation_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]])
    q = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.25, 0.5, 0.25]])
    assert total_variation(p, q).tolist() == total_variation(q, p).tolist() == [0.5, 1.0, 0.0]


def test_the_shift_is_that_of_the_old_experts():
    old = torch.tensor([0.5, 0.25, 0.25])
    new = torch.tensor([0.25, 0.25, 0.5])
    for experts, expected in (([0, 1], math.log(2) / 2), ([1], 0), ([2, 0], math.log(2))):
        got = router_shift(old, new, torch.tensor(experts, dtype=torch.int16))
        assert got.item() == pytest.approx(expected)


def test_a_probability_of_zero_shifts_by_a_finite_amount():
    one, zero, first = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0])
    least = -math.log(torch.finfo(torch.float32).tiny)
    assert router_shift(one, zero, first).item() == pytest.approx(least)
    assert router_shift(zero, one, first).item() == pytest.approx(least)
    assert router_shift(zero, zero, first).item() == 0


# Four tokens, the third of which does not count, in layers 3 and 7; two of four experts each. The
# router probabilities of tokens 1 and 3 are kept. Written by layer, and brought into their order.
MASK = torch.tensor([True, True, False, True])
KEPT = torch.tensor([1, 3])
OLD = Routes(
    experts=torch.tensor([[[2, 3]] * 2, [[0, 1]] * 2, [[0, 1]] * 2, [[0, 1]] * 2]),
    probs=torch.full((2, 2, 4), 0.25),
)
NEW = Routes(
    experts=torch.tensor(
        [[[3, 2], [0, 2], [2, 3], [2, 3]], [[2, 3], [3, 1], [0, 1], [0, 1]]]
    ).transpose(0, 1),
    probs=torch.tensor(
        [
            [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]],
            [[0.25, 0.25, 0.25, 0.25], [0.0625, 0.0625, 0.375, 0.5]],
        ]
    ).transpose(0, 1),
)


def test_two_readings_by_hand():
    found = compare(OLD, NEW, layers=(3, 7), mask=MASK, kept=KEPT, prefix="routing")
    assert found.metrics.values() == pytest.approx(
        {
            "routing/slot_flip": 1 / 3,
            "routing/router_flip": 1 / 2,
            "routing/slot_flip/layer_3": 1 / 2,
            "routing/slot_flip/layer_7": 1 / 6,
            "routing/tv": 0.21875,
            "routing/tv/layer_3": 0.25,
            "routing/tv/layer_7": 0.1875,
        }
    )
    assert found.layers_flipped.tolist() == [0, 2, 1, 1]
    assert found.shift.tolist() == pytest.approx([math.log(2), math.log(4)])


@pytest.mark.parametrize(
    ("old", "new"),
    [(Routes(experts=OLD.experts), NEW), (OLD, Routes(experts=NEW.experts))],
    ids=["old", "new"],
)
def test_probabilities_are_compared_where_both_readings_have_them(old, new):
    found = compare(old, new, layers=(3, 7), mask=MASK, kept=KEPT, prefix="routing")
    assert found.shift is None
    assert found.metrics.values().keys() == {
        "routing/router_flip",
        "routing/slot_flip",
        "routing/slot_flip/layer_3",
        "routing/slot_flip/layer_7",
    }


def test_the_share_of_a_replay_that_was_replaced():
    replaced = torch.tensor([[2, 0], [1, 0], [2, 2], [0, 1]], dtype=torch.uint8)
    new = dataclasses.replace(NEW, replaced=replaced)
    found = compare(OLD, new, layers=(3, 7), mask=MASK, kept=KEPT, prefix="routing")
    assert found.metrics.values()["routing/replay_replaced"] == pytest.approx(4 / 12)


def test_tokens_by_hand():
    layers_flipped = torch.tensor([0, 2, 1, 3])
    shift = torch.tensor([0.0, 3 * math.log(2)])
    metrics = token_metrics(layers_flipped, MASK, shift, num_layers=3, prefix="routing")
    assert metrics.values() == pytest.approx(
        {
            "routing/token_flip_share": 2 / 3,
            "routing/layers_flipped": 5 / 3,
            "routing/shift_factor": 0.75,
        }
    )
    histogram = metrics.histograms()["routing/hist_layers_flipped"]
    assert histogram.edges == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert histogram.counts.tolist() == [1, 0, 1, 1]
    without = token_metrics(layers_flipped, MASK, None, num_layers=3, prefix="routing")
    assert "routing/shift_factor" not in without


def test_load_by_hand():
    """Twice the mean load in one layer, balance in another, and a layer of another rank."""
    routes = Routes(
        experts=torch.tensor(
            [[[0, 1], [0, 1]], [[0, 2], [2, 3]], [[3, 2], [3, 2]]], dtype=torch.int16
        )
    )
    metrics = load_metrics(
        routes,
        layers=(1, 4),
        places=(0, 2),
        num_layers=3,
        num_experts=4,
        mask=torch.tensor([True, True, False]),
        prefix="routing",
    )
    assert metrics.values() == {
        "routing/max_violation": 0.5,
        "routing/max_violation/layer_1": 1.0,
        "routing/max_violation/layer_4": 0.0,
    }


LAYERS, TOKENS, TOPK, EXPERTS = (0, 2, 5), 12, 2, 5


def reading(seed):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(TOKENS, len(LAYERS), EXPERTS, generator=generator).softmax(-1)
    return Routes(experts=probs.topk(TOPK).indices.to(torch.int16), probs=probs)


def part(routes, stage, tokens, kept):
    """What the routers of a stage see of some tokens, with the probabilities of ``kept``."""
    return Routes(
        experts=routes.experts[tokens][:, stage], probs=routes.probs[tokens[kept]][:, stage]
    )


def measured(old, new, mask, pieces, stages):
    """All there is to say of two readings, from ``pieces`` of the tokens in ``stages`` of layers.

    Both are lists of indices. As between ranks, a token's layers add up over the stages.
    """
    metrics = Metrics()
    for tokens in pieces:
        counts = mask[tokens]
        kept = (counts & (tokens % 2 == 0)).nonzero().flatten()
        layers_flipped = torch.zeros(len(tokens), dtype=torch.int32)
        shift = torch.zeros(len(kept))
        for stage in stages:
            layers = [LAYERS[place] for place in stage.tolist()]
            was, now = (part(routes, stage, tokens, kept) for routes in (old, new))
            found = compare(was, now, layers=layers, mask=counts, kept=kept, prefix="routing")
            metrics.update(found.metrics)
            layers_flipped += found.layers_flipped
            shift += found.shift
            load = load_metrics(
                now,
                layers=layers,
                places=stage.tolist(),
                num_layers=len(LAYERS),
                num_experts=EXPERTS,
                mask=counts,
                prefix="routing",
            )
            metrics.update(load)
        of_tokens = token_metrics(
            layers_flipped, counts, shift, num_layers=len(LAYERS), prefix="routing"
        )
        metrics.update(of_tokens)
    return metrics


def parts_of(numbers):
    """Which part each thing is in -> the indices of each of three parts, some of them empty."""
    return [(torch.tensor(numbers) == part).nonzero().flatten() for part in range(3)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    mask=st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS),
    piece_of=st.lists(st.integers(0, 2), min_size=TOKENS, max_size=TOKENS),
    stage_of=st.lists(st.integers(0, 2), min_size=len(LAYERS), max_size=len(LAYERS)),
)
def test_no_cut_into_tokens_and_layers_changes_anything(seed, mask, piece_of, stage_of):
    old, new, mask = reading(seed), reading(seed + 1000), torch.tensor(mask)
    everything = [torch.arange(TOKENS)], [torch.arange(len(LAYERS))]
    whole = measured(old, new, mask, *everything)
    merged = measured(old, new, mask, parts_of(piece_of), parts_of(stage_of))
    # Shifts are sums over layers in fp32.
    assert merged.values() == pytest.approx(whole.values(), rel=1e-6, nan_ok=True)
    name = "routing/hist_layers_flipped"
    counts = [metrics.histograms()[name].counts.tolist() for metrics in (merged, whole)]
    assert counts[0] == counts[1]
