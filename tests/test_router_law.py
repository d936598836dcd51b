"""The study of router variance: its sums, its margins, its routers, and its command for folders."""

import argparse
import json

import numpy as np
import pytest
import torch
import yaml

from benchmarks.studies.router_law import folder, margins, measure, routers
from sapo_megatron.commands.qualify.models import make_model
from sapo_megatron.errors import UserError
from tests.support.gloo import run_ranks

BYTES = {"vocab_size": 256, "max_position_embeddings": 64}
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n" for i in range(400))


def sums(a, b):
    """Of one sequence with these a and b, each token of it with a swap in one of two layers."""
    row = np.zeros(len(measure.COLUMNS))
    a, b = np.array(a), np.array(b)
    values = {"tokens": len(a), "token_layers": 2 * len(a), "swaps": len(a), "flipped": len(a)}
    values |= {"a": a.sum(), "b": b.sum(), "aa": a @ a, "bb": b @ b, "ab": a @ b}
    for name, value in values.items():
        row[measure.C[name]] = value
    return row


def test_numbers_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 50)) * [[[0.3]], [[0.2]]]
    b += 0.1 * a
    found = measure.numbers(np.sum([sums(*row) for row in zip(a, b, strict=True)], axis=0))
    a, b, z = a.ravel(), b.ravel(), (a + b).ravel()
    assert found["var_a"] == pytest.approx(a.var())
    assert found["share"] == pytest.approx(np.cov(b, z, bias=True)[0, 1] / z.var())
    assert found["replay_removes"] == pytest.approx(1 - a.var() / z.var())
    assert found["c"] == pytest.approx(b.var() / a.std())
    assert found["router_flip"] == 0.5
    assert found["kl"] == pytest.approx(-z.mean())


def test_an_interval_holds_what_it_is_of():
    rng = np.random.default_rng(1)
    rows = np.array([sums(rng.normal(size=20), rng.normal(size=20)) for _ in range(200)])
    value, low, high = measure.point(rows)["share"]
    assert low < 0.5 < high
    assert low < value < high
    assert high - low < 0.1


@pytest.mark.parametrize("groups", [1, 2])
def test_the_margin_is_where_the_set_changes(groups):
    """Moving the scores against each other by a margin, and by no less, changes somebody's set."""
    torch.manual_seed(groups)
    scores = torch.randn(200, 8)

    def sets(scores):
        if groups > 1:
            best = margins._of_groups(scores, 2, groups).argmax(1)
            own = torch.arange(8)[None] // 4 == best[:, None]
            scores = scores.masked_fill(~own, -torch.inf)
        return scores.topk(2, dim=1).indices

    experts = sets(scores)
    edge = margins.boundary(scores, experts, 2, groups, 1)
    found = edge.margins(scores, 2, groups)
    assert all(bool((m > 0).all()) for m in found)
    for factor, changed in ((0.99, False), (1.01, True)):
        moved = scores.double().clone()
        rows = torch.arange(200)
        moved[rows, edge.inside] -= factor * found[0]
        same = (sets(moved).sort(1).values == experts.sort(1).values).all(1)
        # With groups the group may go first, by the same loss of its sum.
        alone = found[0] < found[-1] if groups > 1 else torch.ones(200, dtype=torch.bool)
        assert bool((same[alone] != changed).all())


def test_flips_are_foretold_from_margins():
    """Uniform margins and known slopes: half of the tokens fall by 2 e, of a density of 1."""
    rng = np.random.default_rng(2)
    tokens = 200_000
    margin = rng.uniform(size=(1, tokens))
    slope = np.where(np.arange(tokens) % 2, 2.0, -2.0)[None]
    found = margins.Margins(
        margin=margin,
        slope=slope,
        inside=np.zeros((1, tokens), dtype=int),
        outside=np.ones((1, tokens), dtype=int),
        sequence=np.arange(tokens) // 100,
        layers=1,
    ).foretold(0.01)
    rate, low, high = found["rate"]
    assert low < 0.01 < high
    assert rate == pytest.approx(0.01, rel=0.05)
    assert found["whole"] == pytest.approx(0.01, rel=0.1)


def choose(scores, k):
    return scores.topk(k, dim=1)


def router_of(kind):
    router = routers.ROUTERS[kind].__new__(routers.ROUTERS[kind])
    router.layer, router._threshold = 0, 0.0
    router.reset()
    return router


def weights_of(kind, scores, told=None):
    router = router_of(kind)
    if told is not None:
        router.begin([told], False, None)
    values, experts = router.get_replay_topk(
        scores, 2, default_compute_topk=lambda s, k, **_: choose(s, k)
    )
    return values.softmax(1), experts


def test_a_vanishing_weight_vanishes_at_the_boundary():
    scores = torch.tensor([[3.0, 2.0 + 1e-5, 2.0, 1.0]])
    weights, experts = weights_of("vanishing", scores)
    assert experts.tolist() == [[0, 1]]
    assert weights[0, 1] < 2e-5
    weights, _ = weights_of("vanishing", scores, torch.tensor([[0, 2]]))
    assert weights[0, 1] < 2e-5


def test_a_router_that_is_told_some_chooses_the_rest():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    _, experts = weights_of("told", scores, torch.tensor([[-1, -1], [2, 1]]))
    assert experts.tolist() == [[0, 1], [2, 1]]


def stable(scores, k, **_):
    values, experts = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], experts[:, :k]


@pytest.mark.parametrize("last_first", [False, True])
def test_a_rounded_router_ties(monkeypatch, last_first):
    scores = torch.tensor([[1.0, 1.001, 1.002, 3.0]])
    monkeypatch.setattr(routers.Rounded, "last_first", last_first)
    values, experts = router_of("rounded").get_replay_topk(scores, 2, default_compute_topk=stable)
    assert values.tolist() == [[3.0, 1.0]]
    assert experts.tolist() == [[3, 2 if last_first else 0]]


def of_folder(model, text, out, recipe=None):
    """What a rank of the command comes to."""
    return folder.of_folder(
        argparse.Namespace(model=model, recipe=recipe, text=text, length=32, blocks=1, out=out)
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    place = tmp_path_factory.mktemp("router-law")
    make_model("qwen3-moe", place / "model", **BYTES)
    (place / "text").write_text(TEXT)
    return place


@pytest.fixture(scope="module")
def on_one_process(tiny):
    return run_ranks(1, of_folder, tiny / "model", tiny / "text", None)[0]


def test_the_command_tells_c_of_a_folder(on_one_process):
    points = on_one_process["points"]
    assert list(points) == [f"{e:g}" for e in folder.SIZES]
    shares = [p["share"][0] for p in points.values()]
    growth = points["1"]["var_a"][0] / points["0.1"]["var_a"][0]
    assert growth == pytest.approx(100, rel=0.3)
    assert points["1"]["swaps"] > 400
    assert shares[-1] < 0.5
    assert on_one_process["c"][0] > 0
    told = folder.told(on_one_process)
    assert f"c {on_one_process['c'][0]:.3g}" in told


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"pipeline_model_parallel_size": 2}, id="PP2"),
        pytest.param({"expert_model_parallel_size": 2}, id="EP2", marks=pytest.mark.slow),
        pytest.param({"tensor_model_parallel_size": 2}, id="TP2", marks=pytest.mark.slow),
        pytest.param({"context_parallel_size": 2}, id="CP2", marks=pytest.mark.slow),
    ],
)
def test_a_layout_tells_the_same(tiny, on_one_process, layout):
    path = tiny / f"{next(iter(layout))}.yaml"
    recipe = {
        "model": {"path": str(tiny / "model"), "params_dtype": "float32"},
        "data": {"train": {"tasks": [{"name": "chain_sum"}]}},
        "parallel": layout,
    }
    path.write_text(yaml.safe_dump(recipe))
    found, other = run_ranks(2, of_folder, tiny / "model", tiny / "text", None, path)
    assert other is None
    for e, expected in on_one_process["points"].items():
        got = found["points"][e]
        assert got["tokens"] == expected["tokens"]
        assert got["swaps"] == pytest.approx(expected["swaps"], rel=0.02, abs=3)
        for name in ("var_a", "share"):
            assert got[name][0] == pytest.approx(expected[name][0], rel=0.1, abs=0.01), (e, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "model.path"),
        ({"text": "nowhere"}, "--text: cannot read"),
        ({"length": 100_000}, "--length: expected at most the 4096 tokens"),
        ({"length": 2048}, "--text: expected more than"),
    ],
)
def test_mistakes_are_one_line(tiny, capsys, changes, message):
    values = {"model": tiny / "model", "text": tiny / "text", "length": 32} | changes
    model = str(values.pop("model"))
    words = [f"--{name}={value}" for name, value in values.items()]
    assert folder.main([model, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_a_tokenizer_is_one_of_bytes(tiny, tmp_path):
    make_model("qwen3-moe", tmp_path / "model")
    with pytest.raises(UserError, match="expected a tokenizer"):
        of_folder(tmp_path / "model", tiny / "text", None)


def test_json(tiny, on_one_process):
    assert json.loads(json.dumps(on_one_process)) == on_one_process
