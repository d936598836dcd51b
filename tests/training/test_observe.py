"""Replay, divergence and the variance split in whole steps, under several layouts."""

import math

import pytest

from tests.support.gloo import run_ranks
from tests.support.watched import constructed, engines, steps

WATCHED = ("routing/", "rollout_train/", "variance/", "sapo/", "ratio/", "actor/")
ROUNDING = [
    f"rollout_train/variance/{name}"
    for name in ("router_share", "replay_removes", "router_share_own", "router_share_inherited")
]
"""Shares of what rounding makes of one engine and one set of weights."""
TP, PP, VPP = (
    f"parallel__{name}_model_parallel_size" for name in ("tensor", "pipeline", "virtual_pipeline")
)
CP, EP = "parallel__context_parallel_size", "parallel__expert_model_parallel_size"
FULL = {
    "parallel__recompute_granularity": "full",
    "parallel__recompute_method": "uniform",
    "parallel__recompute_num_layers": 1,
}
LAYOUTS = {
    "DP4": {},
    "TP2xCP2xEP2": {TP: 2, CP: 2, EP: 2},
    "PP2xVPP2xEP2": {PP: 2, VPP: 2, EP: 2, "train__max_tokens_per_gpu": 64},
    "TP2xPP2, recompute": {TP: 2, PP: 2, **FULL},
    "TP2xEP4, padded": {TP: 2, EP: 4, "train__packing": False},
}
ROUTED = {
    "disabled": list(LAYOUTS),
    "R2": ["DP4", "TP2xCP2xEP2", "TP2xPP2, recompute"],
    "R3": ["DP4", "PP2xVPP2xEP2"],
}
ONE_UPDATE = ["TP2xCP2xEP2", "TP2xPP2, recompute"]


@pytest.fixture(scope="module")
def whole_steps(tmp_path_factory):
    cases = {
        f"{layout}, {mode}": {**LAYOUTS[layout], "routing__router_replay": mode}
        for mode, layouts in ROUTED.items()
        for layout in layouts
    }
    one = {"routing__router_replay": "R2", "train__num_mini_batches": 1}
    cases |= {f"{layout}, one": {**LAYOUTS[layout], **one} for layout in ONE_UPDATE}
    folder = tmp_path_factory.mktemp("steps")
    return run_ranks(4, steps, folder, cases)[0]


def watched(record):
    return {
        name: value
        for name, value in record.items()
        if name.startswith(WATCHED) and isinstance(value, float) and name not in ROUNDING
    }


@pytest.mark.parametrize(
    ("mode", "layout"), [(m, layout) for m, layouts in ROUTED.items() for layout in layouts[1:]]
)
def test_the_layout_does_not_change_what_is_measured(whole_steps, mode, layout):
    expected, got = (watched(whole_steps[f"{name}, {mode}"]) for name in ("DP4", layout))
    assert expected.keys() == got.keys()
    assert len(expected) > 40
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-7, abs=1e-10), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_something_is_measured(whole_steps, layout):
    record = whole_steps[f"{layout}, disabled"]
    assert 0.01 < record["routing/slot_flip"] < 0.9
    assert record["routing/token_flip_share"] >= record["routing/slot_flip"]
    assert record["variance/router"] > 0
    assert record["routing/slot_flip/layer_3"] > 0
    assert "routing/slot_flip/layer_1" not in record, "a layer without experts"
    assert record["rollout_train/slot_flip"] == 0, "one engine, one set of weights"
    assert record["rollout_train/logprob_abs_diff"] < 1e-6
    assert record["sapo/bound_violations"] == 0


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_the_split_is_the_same_with_replay(whole_steps, mode):
    """The first update is the same with and without, so the second sees the same two policies."""
    free, replayed = (whole_steps[f"DP4, {m}"] for m in ("disabled", mode))
    names = [n for n in watched(free) if n.startswith("variance/")]
    assert len(names) > 8
    for name in names:
        assert replayed[name] == pytest.approx(free[name], rel=1e-6, abs=1e-12), name
    assert free["ratio/log_var"] == pytest.approx(free["variance/total"], rel=1e-9)
    assert replayed["ratio/log_var"] == pytest.approx(free["variance/weights"], rel=1e-6)


@pytest.mark.parametrize("layout", ONE_UPDATE)
def test_ratios_start_at_exactly_one(whole_steps, layout):
    record = whole_steps[f"{layout}, one"]
    assert record["ratio/min"] == record["ratio/max"] == 1
    assert record["ratio/log_var"] == record["routing/slot_flip"] == 0
    assert record["variance/total"] == 0
    assert record["variance/router_share"] is None
    assert record["actor/grad_norm"] > 0


@pytest.mark.parametrize("mode", ROUTED)
def test_the_parts_add_up(whole_steps, mode):
    for layout in ROUTED[mode]:
        r = whole_steps[f"{layout}, {mode}"]
        parts = r["variance/weights"] + r["variance/router"] + r["variance/cov"]
        assert parts == pytest.approx(r["variance/total"], rel=1e-12)
        share = (r["variance/router"] + r["variance/cov"] / 2) / r["variance/total"]
        assert r["variance/router_share"] == pytest.approx(share, rel=1e-9)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    return run_ranks(4, engines, tmp_path_factory.mktemp("engines"), LAYOUTS)[0]


def between(found, layout, place, mode):
    """The split between the engines, and how far they are apart with and without replay."""
    starts = tuple(f"rollout_train/{name}/" for name in ("variance", "free", "replayed"))
    values = found[f"{layout}, {place}, {mode}"].items()
    return {n.removeprefix("rollout_train/"): v for n, v in values if n.startswith(starts)}


def test_engines_are_split_on_every_so_many_rollouts(apart):
    assert apart["not due"]["rollout_train/slot_flip"] > 0
    assert not any("variance" in name for name in apart["not due"])


@pytest.mark.parametrize("mode", ["disabled", "R3"])
def test_an_engine_that_chooses_otherwise_differs_by_its_router(apart, mode):
    found = between(apart, "DP4", "choice", mode)
    assert found["variance/total"] > 1e-4
    assert found["variance/numerics"] < 1e-12 * found["variance/total"]
    assert found["variance/router_share"] == pytest.approx(1, abs=1e-6)
    assert found["variance/replay_removes"] == pytest.approx(1, abs=1e-6)
    assert found["variance/swaps"] > 20
    assert found["free/k3_kl"] > 1e-5
    assert abs(found["replayed/k3_kl"]) < 1e-12
    assert found["replayed/extreme_fraction"] == 0


@pytest.mark.parametrize("mode", ["disabled", "R3"])
def test_an_engine_with_another_head_differs_by_its_numbers(apart, mode):
    found = between(apart, "DP4", "head", mode)
    assert found["variance/numerics"] == pytest.approx(found["variance/total"], rel=1e-9)
    assert found["variance/total"] > 1e-4
    assert found["variance/swaps"] == 0
    assert abs(found["variance/router_share"]) + abs(found["variance/replay_removes"]) < 1e-9
    assert found["replayed/kl"] == pytest.approx(found["free/kl"], rel=1e-9)


@pytest.mark.parametrize("mode", ["disabled", "R3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_split_between_engines_is_one_in_every_layout_and_mode(apart, layout, mode):
    expected = between(apart, "DP4", "both", "disabled")
    found = between(apart, layout, "both", mode)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-12, nan_ok=True), name
    parts = [found[f"variance/{name}"] for name in ("numerics", "router", "cov")]
    assert min(map(abs, parts)) > 1e-5
    assert sum(parts) == pytest.approx(found["variance/total"], rel=1e-12)
    removed = 1 - parts[0] / found["variance/total"]
    assert found["variance/replay_removes"] == pytest.approx(removed, rel=1e-9)
    own = found["variance/router_share_own"], found["variance/router_share_inherited"]
    assert sum(own) == pytest.approx(found["variance/router_share"], rel=1e-9)
    assert min(map(abs, own)) > 1e-4


ORDERS = ("router_share_other_order", "router_share_both_orders")


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory):
    return run_ranks(1, constructed, tmp_path_factory.mktemp("perturbed"))[0]


@pytest.mark.parametrize("mode", ["disabled", "R2"])
def test_nothing_changed(perturbed, mode):
    values = perturbed[f"nothing, {mode}"]
    assert values["variance/total"] == values["variance/noise"] == 0
    assert math.isnan(values["variance/router_share"])


@pytest.mark.parametrize("mode", ["disabled", "R2"])
def test_a_bias_that_only_chooses_is_all_router(perturbed, mode):
    values = perturbed[f"expert bias, {mode}"]
    assert values["variance/total"] > 1e-4
    assert values["variance/weights"] == 0
    for name in ("router_share", "replay_removes", *ORDERS):
        assert values[f"variance/{name}"] == pytest.approx(1, rel=1e-12)
    assert values["routing/slot_flip"] > 0


@pytest.mark.parametrize("mode", ["disabled", "R2"])
def test_the_head_routes_nothing(perturbed, mode):
    values = perturbed[f"lm head, {mode}"]
    assert values["variance/total"] > 1e-4
    names = ("router", "router_share", "replay_removes", *ORDERS)
    assert [values[f"variance/{name}"] for name in names] == [0] * len(names)
    assert values["routing/slot_flip"] == 0


@pytest.mark.parametrize("mode", ["disabled", "R2"])
def test_what_moves_the_hidden_states_does_both(perturbed, mode):
    values = perturbed[f"attention, {mode}"]
    assert values["variance/weights"] > 0
    assert values["variance/router"] > 0
    share, other, both = (values[f"variance/{name}"] for name in ("router_share", *ORDERS))
    assert other != share
    assert both == pytest.approx((share + other) / 2, rel=1e-9)


def test_the_other_order_is_that_of_the_policies_in_each_others_place(perturbed):
    forth, back = perturbed["attention, disabled"], perturbed["backwards"]
    assert back["variance/total"] == pytest.approx(forth["variance/total"], rel=1e-5)
    for one, other in ((forth, back), (back, forth)):
        share = one["variance/router_share_other_order"]
        assert share == pytest.approx(other["variance/router_share"], rel=1e-4)


def test_weights_are_what_they_were_after_a_look_at_the_old_ones(perturbed):
    assert "variance/router_share_other_order" not in perturbed["one order"]
    assert perturbed["one order"]["weights"] == perturbed["attention, disabled"]["weights"]


def test_a_dense_model_has_no_router_share(perturbed):
    values = perturbed["dense, disabled"]
    assert values["variance/total"] > 1e-4
    assert values["variance/router"] == values["variance/router_share"] == 0
    assert not any(name.startswith("routing/") for name in values)
