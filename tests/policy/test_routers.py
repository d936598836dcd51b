"""A router that is watched, and one that is told what to choose."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import nn
from torch.utils.checkpoint import checkpoint

from sapo_megatron.errors import UserError
from sapo_megatron.policy.routers import (
    LayerRouter,
    ModelRouters,
    check_routes,
    graded,
    padded_experts,
)

# Scores of two micro-batches of two tokens and of three; two of four experts are chosen.
SCORES = [
    torch.tensor([[4.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]]),
    torch.tensor([[1.0, 3.0, 4.0, 2.0], [2.0, 1.0, 4.0, 3.0], [4.0, 3.0, 1.0, 2.0]]),
]
CHOSEN = [[[0, 3], [3, 2]], [[2, 1], [2, 3], [0, 1]]]
OTHERS = [
    torch.tensor([[1, 2], [0, 3]], dtype=torch.int16),
    torch.tensor([[0, 3], [2, 0], [1, 3]], dtype=torch.int16),
]


def upstream(number=3, expert_bias=None, **changes):
    """What a LayerRouter reads of megatron-core's router."""
    config = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": False} | changes
    return SimpleNamespace(
        layer_number=number, config=SimpleNamespace(**config), expert_bias=expert_bias
    )


def choose(scores, topk, num_groups=None, group_topk=None):
    return torch.topk(scores, topk, dim=1)


def ask(router, scores):
    return router.get_replay_topk(scores, 2, None, None, choose)


def test_an_idle_router_passes_the_question_on():
    asked = []

    def answer(scores, topk, num_groups=None, group_topk=None):
        asked.append((scores, topk, num_groups, group_topk))
        return "values", "experts"

    router = LayerRouter(upstream())
    assert router.get_replay_topk("scores", 8, 4, 2, answer) == ("values", "experts")
    assert asked == [("scores", 8, 4, 2)]
    assert router.experts == router.probs == []


def test_the_list_of_the_process_stays_as_it_is():
    before = list(RouterReplay.global_router_replay_instances)
    LayerRouter(upstream())
    assert RouterReplay.global_router_replay_instances == before


def test_recording_changes_nothing_and_keeps_the_order_of_micro_batches():
    router = LayerRouter(upstream())
    router.begin(None, True, None)
    for scores, chosen in zip(SCORES, CHOSEN, strict=True):
        values, experts = ask(router, scores)
        assert experts.tolist() == chosen
        assert values.tolist() == [[4.0, 3.0]] * len(scores)
    assert [experts.tolist() for experts in router.experts] == CHOSEN
    assert {experts.dtype for experts in router.experts} == {torch.int16}
    assert router.probs == []


BIAS = torch.tensor([0.0, 3.0, -2.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda logits: logits.softmax(-1)),
        ({"moe_router_pre_softmax": True}, lambda logits: logits.softmax(-1)),
        (
            {"moe_router_score_function": "sigmoid"},
            lambda logits: logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True),
        ),
        (
            {"moe_router_score_function": "sigmoid", "expert_bias": BIAS},
            lambda logits: logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True),
        ),
    ],
    ids=["softmax after top-k", "softmax before top-k", "sigmoid", "sigmoid with bias"],
)
def test_probabilities_of_the_rows_that_are_kept(changes, expected):
    """Asked by megatron-core itself: scores are logits, probabilities or biased, as it likes."""
    router = LayerRouter(upstream(**changes))
    rows = [torch.tensor([1]), torch.tensor([0, 2])]
    router.begin(None, True, rows.__getitem__)
    for logits in SCORES:
        topk_routing_with_score_function(
            logits.clone().requires_grad_(),
            2,
            use_pre_softmax=changes.get("moe_router_pre_softmax", False),
            score_function=changes.get("moe_router_score_function", "softmax"),
            expert_bias=changes.get("expert_bias"),
            router_replay=router,
        )
    for probs, logits, kept in zip(router.probs, SCORES, rows, strict=True):
        assert not probs.requires_grad
        torch.testing.assert_close(probs, expected(logits)[kept])
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(kept)))


def test_replay_gathers_current_scores_with_their_gradient():
    router = LayerRouter(upstream())
    router.begin(OTHERS, False, None)
    for scores, told in zip(SCORES, OTHERS, strict=True):
        scores = scores.clone().requires_grad_()
        values, experts = ask(router, scores)
        assert experts.dtype == torch.int64, "as top-k gives them"
        assert experts.tolist() == told.tolist()
        torch.testing.assert_close(values, scores.gather(1, told.long()))
        (grad,) = torch.autograd.grad(values.sum(), scores)
        assert grad.tolist() == nn.functional.one_hot(told.long(), 4).sum(1).tolist()
    assert router.experts == []


@pytest.mark.parametrize("changes", [{}, {"moe_router_score_function": "sigmoid"}])
def test_replaying_its_own_choice_is_routing_as_ever(changes):
    """Through megatron-core, bias and all: the same experts with the same weights."""
    bias = BIAS if changes else None
    router = LayerRouter(upstream(expert_bias=bias, **changes))

    def route():
        function = changes.get("moe_router_score_function", "softmax")
        return topk_routing_with_score_function(
            SCORES[1], 2, score_function=function, expert_bias=bias, router_replay=router
        )

    router.begin(None, True, None)
    weights, chosen = route()
    own = router.experts
    router.begin(own, False, None)
    replayed_weights, replayed = route()
    assert torch.equal(replayed_weights, weights)
    assert torch.equal(replayed, chosen)
    assert chosen.sum(1).tolist() == [2, 2, 2]


ROUTERS = {
    "softmax after top-k": {},
    "softmax before top-k": {"use_pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid with bias": {"score_function": "sigmoid", "expert_bias": BIAS.repeat(2)},
    "groups": {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
}
"""Ways to route that megatron-core knows, for 8 experts of which 3 or 4 are chosen."""


def routing(arguments, threshold=0.0):
    """A LayerRouter of megatron-core's router, and what that computes of logits."""
    router = LayerRouter(
        upstream(
            expert_bias=arguments.get("expert_bias"),
            moe_router_score_function=arguments.get("score_function", "softmax"),
            moe_router_pre_softmax=arguments.get("use_pre_softmax", False),
        ),
        threshold,
    )

    def route(logits, told):
        router.begin([told], True, None)
        topk = told.shape[1]
        return topk_routing_with_score_function(logits, topk, router_replay=router, **arguments)

    return router, route


def shares(logits, arguments):
    """What experts are weighted by: positive, and without the bias."""
    sigmoid = arguments.get("score_function") == "sigmoid"
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def random_routes(tokens, topk, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    told = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :topk].to(torch.int16)
    return logits, told


@pytest.mark.parametrize("name", ROUTERS)
def test_the_gradient_reaches_experts_that_the_router_would_not_choose(name):
    arguments = ROUTERS[name]
    logits, told = random_routes(6, 4)
    router, route = routing(arguments)
    logits.requires_grad_()
    weights, _ = route(logits, told)
    outside = (router.experts[0][:, :, None] != told[:, None, :]).all(1)
    assert outside.double().mean() > 0.25
    slopes = torch.rand(weights.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    (got,) = torch.autograd.grad((slopes * weights).sum(), logits)

    share = shares(logits, arguments).gather(1, told.long())
    if not arguments.get("use_pre_softmax"):
        share = share / share.sum(1, keepdim=True)
    (expected,) = torch.autograd.grad((slopes.gather(1, told.long()) * share).sum(), logits)
    assert (expected.gather(1, told.long()) != 0).all()
    # The probabilities pass through fp32 in megatron-core's softmax.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("threshold", "experts", "replaced"),
    [
        (0.1, [5, 0, 3], 0),
        (0.25, [5, 0, 3], 0),  # 0.0625 is just that share of 0.25
        (0.3, [0, 3, 1], 1),
        (0.6, [0, 1, 2], 2),
        (1.0, [0, 1, 2], 2),
    ],
)
def test_a_graded_replay_keeps_what_is_close_to_the_routers_own(threshold, experts, replaced):
    probs = torch.tensor([[0.28, 0.26, 0.25, 0.08, 0.06, 0.0625, 0.0075]], dtype=torch.float64)
    own, told = torch.tensor([[0, 1, 2]]), torch.tensor([[5, 0, 3]])
    got, went = graded(told, own, probs, threshold)
    assert (got.tolist(), went.tolist()) == ([experts], [replaced])
    assert graded(told, own, probs * float("nan"), threshold)[0].equal(told)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_graded_replay_under_every_way_to_route(name, threshold):
    """Token by token, in plain Python; and its weights are those of a replay of what it used."""
    arguments = ROUTERS[name]
    logits, told = random_routes(40, 4, seed=3)
    router, route = routing(arguments, threshold)
    weights, chosen = route(logits, told)
    own, probs = router.experts[0].tolist(), shares(logits, arguments).tolist()
    used = []
    for mine, theirs, prob, went in zip(
        own, told.tolist(), probs, router.replaced[0].tolist(), strict=True
    ):
        least = threshold * min(prob[e] for e in mine)
        kept = [e for e in theirs if prob[e] >= least]
        used.append((kept + [e for e in mine if e not in kept])[:4])
        assert went == 4 - len(kept)
    assert chosen.tolist() == [[e in experts for e in range(8)] for experts in used]
    assert 0 < router.replaced[0].double().mean() < 4
    same, _ = routing(arguments)[1](logits, torch.tensor(used))
    assert torch.equal(weights, same)


def test_under_replay_it_records_what_it_would_have_chosen():
    router = LayerRouter(upstream())
    router.begin(OTHERS, True, lambda batch: torch.tensor([batch]))
    told = [ask(router, scores)[1].tolist() for scores in SCORES]
    assert told == [experts.tolist() for experts in OTHERS]
    assert [experts.tolist() for experts in router.experts] == CHOSEN
    for batch, probs in enumerate(router.probs):
        torch.testing.assert_close(probs, SCORES[batch][[batch]].softmax(-1))


# What is left of OTHERS where an expert needs 0.3 of the probability of the weaker own one.
GRADED = [[[2, 0], [3, 2]], [[3, 2], [2, 0], [1, 3]]]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("replay", "threshold", "expected"),
    [(OTHERS, 0.0, [e.tolist() for e in OTHERS]), (OTHERS, 0.3, GRADED), (None, 0.0, CHOSEN)],
    ids=["told", "graded", "free"],
)
def test_recomputation_is_of_its_own_micro_batch(use_reentrant, replay, threshold, expected):
    """Two forwards before two backwards, as pipeline parallelism has them."""
    router = LayerRouter(upstream(), threshold)
    router.begin(replay, True, None)
    used = []

    def layer(scores):
        values, experts = ask(router, scores)
        used.append(experts.tolist())
        return values.square()

    inputs = [scores.clone().requires_grad_() for scores in SCORES]
    outputs = [checkpoint(layer, x, use_reentrant=use_reentrant) for x in inputs]
    for output in outputs:
        output.sum().backward()
    assert used == expected * 2
    assert len(router.replaced) == (2 if threshold else 0), "counted once"
    for x, experts in zip(inputs, expected, strict=True):
        chosen = nn.functional.one_hot(torch.tensor(experts), 4).sum(1)
        torch.testing.assert_close(x.grad, 2 * x.detach() * chosen)
    assert [experts.tolist() for experts in router.experts] == CHOSEN, "recorded once"


def test_each_pass_begins_with_its_first_micro_batch():
    router = LayerRouter(upstream())
    for _ in range(2):
        router.begin(OTHERS, True, None)
        assert ask(router, SCORES[0])[1].tolist() == OTHERS[0].tolist()
        assert len(router.experts) == 1
    router.reset()
    assert ask(router, SCORES[0])[1].tolist() == CHOSEN[0]
    assert router.experts == []


def test_routes_of_another_micro_batch_do_not_pass():
    router = LayerRouter(upstream(number=3))
    router.begin(OTHERS[::-1], False, None)
    expected = "layer 2, micro-batch 0: routes of 3 tokens for 2"
    with pytest.raises(AssertionError, match=expected):
        ask(router, SCORES[0])


class Router(TopKRouter):
    """One of megatron-core's in name only."""

    def __init__(self, number):
        nn.Module.__init__(self)
        vars(self).update(vars(upstream(number)))


def model():
    """The layers 0, 2 and 3 of a model whose layer 1 and layer 5 other ranks have."""
    chunks = [nn.ModuleList([Router(4)]), nn.ModuleList([Router(3), nn.Linear(1, 1), Router(1)])]
    config = SimpleNamespace(num_moe_experts=4, moe_router_topk=2)
    routers = ModelRouters(chunks, config, moe_layers=(0, 1, 2, 3, 5))
    upstreams = (chunks[1][2], chunks[1][0], chunks[0][0])
    return routers, [router.router_replay for router in upstreams]


def test_the_routers_of_a_model_stand_in_the_order_of_its_layers():
    routers, layers = model()
    assert routers.layers == (0, 2, 3)
    assert routers.places == [0, 2, 3]
    replay = [torch.stack([told, told.flip(0), told.roll(1, 1)], dim=1) for told in OTHERS]
    with routers.watching(replay=replay, record=True, keep=lambda batch: torch.tensor([0])) as seen:
        for batch, scores in enumerate(SCORES):
            told = [ask(layer, (i + 1) * scores)[1] for i, layer in enumerate(layers)]
            assert torch.stack(told, dim=1).tolist() == replay[batch].tolist()
        assert seen == []
    for routes, chosen in zip(seen, CHOSEN, strict=True):
        assert [layer.tolist() for layer in routes.experts.unbind(1)] == [chosen] * 3
    for routes, scores in zip(seen, SCORES, strict=True):
        expected = [((i + 1) * scores[[0]]).softmax(-1) for i in range(3)]
        torch.testing.assert_close(routes.probs, torch.stack(expected, dim=1))


def test_a_pass_that_fails_leaves_the_routers_idle():
    routers, layers = model()

    def a_pass():
        with routers.watching(record=True):
            ask(layers[0], SCORES[0])
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        a_pass()
    assert ask(layers[0], SCORES[0])[1].tolist() == CHOSEN[0]
    assert layers[0].experts == []


def test_routes_of_too_few_layers_do_not_pass():
    routers, _ = model()
    with pytest.raises(AssertionError, match="every layer"):
        routers.begin(replay=[torch.stack([told] * 2, dim=1) for told in OTHERS])


def test_padding_gets_different_experts_in_turn():
    experts = torch.tensor([[[5, 1]], [[-1, -1]], [[-1, -1]], [[0, 6]], [[-1, -1]]])
    experts = experts.expand(-1, 3, -1).to(torch.int16)
    fed = torch.tensor([True, False, False, True, False])
    got = padded_experts(experts, fed, 7)
    assert got.dtype == torch.int16
    for layer in range(3):
        assert got[:, layer].tolist() == [[5, 1], [2, 3], [4, 5], [0, 6], [1, 2]]


@pytest.mark.parametrize(("num_experts", "topk"), [(8, 1), (8, 8), (7, 3), (60, 4), (5, 4)])
def test_padding_is_valid_and_spread(num_experts, topk):
    tokens = 4 * num_experts
    nowhere = torch.full((tokens, 2, topk), -1, dtype=torch.int16)
    got = padded_experts(nowhere, torch.zeros(tokens, dtype=torch.bool), num_experts)
    check_routes(got, tokens=tokens, layers=2, topk=topk, num_experts=num_experts)
    load = torch.bincount(got.flatten().long(), minlength=num_experts)
    assert set(load.tolist()) == {2 * 4 * topk}


def routes(token=None, experts=(0, 1)):
    """Five tokens in three layers; in layer 1, one of them has these experts."""
    found = torch.tensor([4, 2], dtype=torch.int16).repeat(5, 3, 1)
    if token is not None:
        found[token, 1] = torch.tensor(experts, dtype=torch.int16)
    return found


FITS = {"tokens": 5, "layers": 3, "topk": 2, "num_experts": 6}


@pytest.mark.parametrize("experts", [(0, 5), (5, 0)])
def test_routes_that_fit(experts):
    check_routes(routes(3, experts), **FITS)
    check_routes(routes()[:0], **FITS | {"tokens": 0})


@pytest.mark.parametrize(
    ("found", "changes", "parts"),
    [
        (routes(), {"tokens": 4}, ["= [4, 3, 2]", "got [5, 3, 2]"]),
        (routes(), {"layers": 4}, ["= [5, 4, 2]", "got [5, 3, 2]"]),
        (routes(), {"topk": 1}, ["= [5, 3, 1]", "got [5, 3, 2]"]),
        (routes()[0], {}, ["= [5, 3, 2]", "got [3, 2]"]),
        (routes(3, (0, 6)), {}, ["from 0 to 5", "got [0, 6]", "token 3", "layer 1"]),
        (routes(4, (-1, 2)), {}, ["from 0 to 5", "got [-1, 2]", "token 4", "layer 1"]),
        (routes(2, (3, 3)), {}, ["2 different experts", "got [3, 3]", "token 2", "layer 1"]),
    ],
)
def test_routes_that_do_not_fit(found, changes, parts):
    with pytest.raises(UserError) as caught:
        check_routes(found, **FITS | changes)
    message = str(caught.value)
    assert message.startswith("routes: expected ")
    assert message.endswith("; they must come from the model that is trained")
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_experts_alike_at_a_distance_are_found():
    experts = torch.tensor([[[3, 1, 0, 3]]], dtype=torch.int16)
    with pytest.raises(UserError, match="4 different experts"):
        check_routes(experts, tokens=1, layers=1, topk=4, num_experts=6)
