"""Which engine a recipe gets, and what of the recipe reaches it."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.generate import InProcess
from sapo_megatron.sample import Prompt
from sapo_megatron.training import engine as engines
from sapo_megatron.training.engine import PROBE_TOKENS, Following, open_engine
from tests.support.fakevllm import FakeVllm
from tests.support.tiny import ARCH, write_recipe


@pytest.fixture(autouse=True)
def world(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def server():
    with FakeVllm() as one:
        yield one


@pytest.fixture
def opened(tmp_path):
    """Opens the engine of the recipe with these settings of its rollout and its routing."""

    def opened(problems=(), *, router_replay="disabled", **rollout):
        (tmp_path / "work").mkdir(exist_ok=True)
        recipe = load(
            write_recipe(
                tmp_path / "work",
                rollout={"server_timeout_s": 5, **rollout},
                routing={"router_replay": router_replay},
            )
        )
        groups = SimpleNamespace(world=dist.group.WORLD, micro_batching=lambda recipe: "cut")
        policy = SimpleNamespace(
            updates=0,
            groups=groups,
            model=SimpleNamespace(
                weights=SimpleNamespace(listing=list, save=lambda folder: None, chunks=[]),
                chunks=[],
                groups=groups,
            ),
            logprobs=lambda tokens, cut: (tokens, cut),
        )
        inputs = SimpleNamespace(
            arch=parse_architecture(ARCH),
            model=tmp_path / "model",
            problems=[Prompt(uid=0, text="", answer="", tokens=tokens) for tokens in problems],
        )
        return open_engine(recipe, inputs, policy, tmp_path / "run")

    return opened


def test_in_process_unless_told(opened, monkeypatch):
    monkeypatch.setattr(engines, "MegatronDecoder", lambda model: "decoder")
    with opened(generation_batch_size=7) as engine:
        assert isinstance(engine, InProcess)
        assert vars(engine) == {"_decoder": "decoder", "_batch_size": 7}


def test_servers_of_the_recipe_are_looked_at_first(opened, server):
    with opened(engine="vllm", servers=[server.url]) as engine:
        assert isinstance(engine, Following)
    assert [body["method"] for _, body in server.calls if "method" in body] == ["sapo_describe"]


def test_a_server_of_another_model_is_refused(opened, server):
    server.description["hidden_size"] = 64
    with (
        pytest.raises(UserError, match=rf"^{server.url}: .*hidden_size"),
        opened(engine="vllm", servers=[server.url]),
    ):
        raise AssertionError("opened")


@pytest.mark.parametrize("replay", ["disabled", "R2", "R3"])
def test_only_r3_wants_the_routes_of_servers(opened, server, replay):
    """A server that does not return them is refused where they are wanted."""
    with pytest.raises(UserError if replay == "R3" else ZeroDivisionError) as caught:  # noqa: SIM117
        with opened(engine="vllm", servers=[server.url], router_replay=replay):
            raise ZeroDivisionError("opened")
    assert ("routed" in str(caught.value)) == (replay == "R3")


def test_servers_of_the_trainers_own_end_with_the_block(opened, server, monkeypatch):
    ended = []

    class Local:
        def __init__(self, recipe, model, folder):
            self.urls, self.exited = [server.url], lambda url: None
            self.started = (recipe.rollout.vllm_python, model.name, folder.name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            ended.append(self.started)

    monkeypatch.setattr(engines, "LocalServers", Local)
    with opened(engine="vllm", vllm_python="python"):
        assert ended == []
    assert ended == [("python", "model", "servers")]
    server.description["hidden_size"] = 64
    with pytest.raises(UserError), opened(engine="vllm", vllm_python="python"):
        raise AssertionError("opened")
    assert len(ended) == 2, "also where they turn out not to fit"


@pytest.mark.parametrize(
    ("problems", "longest", "expected"),
    [
        ([(2, 3), (4,)], 128, (2, 3, 4)),
        ([tuple(range(100))], 128, tuple(range(PROBE_TOKENS))),
        ([tuple(range(100))], 22, tuple(range(21))),  # the server makes one more
    ],
)
def test_the_probe_is_of_held_out_prompts(opened, server, monkeypatch, problems, longest, expected):
    seen = []
    monkeypatch.setattr(Following, "_share", lambda self, probe: seen.append(probe) or 0.0)
    server.description["max_model_len"] = longest
    lengths = {"max_prompt_length": longest - 6, "max_response_length": 6}
    with (
        opened(problems, engine="vllm", servers=[server.url], **lengths) as engine,
        engine.serving(record=False),
    ):
        (probe,) = seen
    assert probe.tokens == expected
    assert probe.logprobs == (expected, "cut")
    assert probe.tolerance == 1e-3


def test_where_no_server_answers_the_run_ends(opened):
    with FakeVllm() as gone:
        url = gone.url
    with (
        pytest.raises((UserError, RunFailed), match=url),
        opened(engine="vllm", servers=[url], server_timeout_s=0.3),
    ):
        raise AssertionError("opened")
