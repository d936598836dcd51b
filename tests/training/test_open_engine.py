"""Which engine a recipe gets, and what of the recipe reaches it."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sapo_megatron.data.endings import Endings
from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.policy.parallel import Nodes
from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.generate import InProcess
from sapo_megatron.sample import Prompt, Sample
from sapo_megatron.training import engine as engines
from sapo_megatron.training.engine import Following, open_engine
from sapo_megatron.training.handover import OverFolder
from tests.support.fakevllm import EOS, FakeVllm
from tests.support.tiny import ARCH, write_recipe

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def server():
    with FakeVllm() as one:
        yield one


class Decoder:
    """Stands in for the training engine's; what it gives are sevens."""

    def __init__(self, model):
        pass

    def generating(self):
        return contextlib.nullcontext()

    @staticmethod
    def generate(decoder, requests, params, *, batch_size):
        assert batch_size == len(requests), "in one batch"
        assert (params.temperature, params.top_p, params.stop_ids) == (1.0, 1.0, (EOS, 7))
        return [
            Sample(
                uid=r.uid,
                prompt_tokens=r.prompt_tokens,
                response_tokens=[7] * params.max_new_tokens,
                rollout_logprobs=[],
                truncated=True,
            )
            for r in requests
        ]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens the engine of the recipe with these settings of its rollout and its routing."""
    monkeypatch.setattr(engines, "MegatronDecoder", Decoder)
    monkeypatch.setattr(engines, "generate", Decoder.generate)

    def opened(problems=((2, 3),), *, router_replay="disabled", aside=None, **rollout):
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
            logprobs=lambda samples, cut: (samples, cut),
            aside=aside,
        )
        inputs = SimpleNamespace(
            arch=parse_architecture(ARCH),
            model=tmp_path / "model",
            endings=Endings(stop_ids=(EOS, 7), turn_id=EOS),
            problems=[Prompt(uid=9, text="", answer="", tokens=tokens) for tokens in problems],
        )
        own = recipe.rollout.vllm_python
        nodes = Nodes(firsts=(0,), number=0, local=0, peers=None) if own else None
        return open_engine(recipe, inputs, policy, tmp_path / "run", nodes)

    return opened


def test_in_process_unless_told(opened, monkeypatch):
    monkeypatch.setattr(engines, "MegatronDecoder", lambda model: "decoder")
    with opened(generation_batch_size=7) as engine:
        assert isinstance(engine, InProcess)
        assert vars(engine) == {"_decoder": "decoder", "_batch_size": 7, "_version": 0}


def test_servers_of_the_recipe_are_looked_at_first(opened, server):
    with opened(engine="vllm", servers=[server.url]) as engine:
        assert isinstance(engine, Following)
    assert [body["method"] for _, body in server.calls if "method" in body] == ["sapo_describe"]


def test_colocated_servers_start_while_the_trainer_is_aside(opened, server):
    server.description["sleep_mode"] = True
    seen = []

    @contextlib.contextmanager
    def aside(what):
        yield lambda: seen.append((what, len(server.calls)))
        seen.append((server.asleep, len(server.calls)))

    settings = {"colocate": True, "colocate_offload": "weights", "aside": aside}
    with opened(engine="vllm", servers=[server.url], **settings):
        calls = len(server.calls)
    assert seen == [("weights", 0), ({"weights", "kv_cache"}, calls)]


@pytest.mark.parametrize("returned", [True, False])
def test_routes_are_looked_at_where_a_server_returns_them(opened, server, returned):
    server.description["routed_experts"] = returned
    with opened(engine="vllm", servers=[server.url]) as engine:
        assert engine._servers._fleet.with_routes is returned


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
        def __init__(self, recipe, model, folder, weights):
            assert weights.parent == Path("/dev/shm")
            self.urls, self.exited = [server.url], lambda url: None
            self.started = (recipe.rollout.vllm_python, model.name, folder.name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            ended.append(self.started)

    monkeypatch.setattr("sapo_megatron.rollout.vllm.servers.LocalServers", Local)
    with opened(engine="vllm", vllm_python="python"):
        assert ended == []
    assert ended == [("python", "model", "servers")]
    server.description["hidden_size"] = 64
    with pytest.raises(UserError), opened(engine="vllm", vllm_python="python"):
        raise AssertionError("opened")
    assert len(ended) == 2, "also where they turn out not to fit"


@pytest.mark.parametrize(
    ("problems", "longest", "prompts", "tokens"),
    [
        ([(2, 3, 4), (4,)], (16, 6), [(4,), (2, 3, 4)], 5),  # the server makes one more
        ([(2,) * n for n in range(12, 0, -1)], (16, 99), [(2,) * n for n in range(1, 9)], 32),
        ([(2, 3, 4)], (3, 2), [(2, 3, 4)], 1),
        ([(2, 3, 4)], (3, 1), [(2, 3)], 1),
    ],
)
def test_the_probe_answers_the_shortest_held_out_prompts(
    opened, server, monkeypatch, problems, longest, prompts, tokens
):
    seen = []
    monkeypatch.setattr(OverFolder, "load", lambda self, probe, version: seen.append(probe) or 0.0)
    server.description["max_model_len"] = sum(longest)
    lengths = dict(zip(("max_prompt_length", "max_response_length"), longest, strict=True))
    with (
        opened(problems, engine="vllm", servers=[server.url], **lengths) as engine,
        engine.serving(version=0, record=False),
    ):
        (probe,) = seen
    assert [s.uid for s in probe.samples] == list(range(len(prompts)))
    assert [s.prompt_tokens for s in probe.samples] == prompts
    assert [s.response_tokens for s in probe.samples] == [[7] * tokens] * len(prompts)
    assert probe.logprobs == (probe.samples, "cut")
    assert probe.tolerance == 1e-3


def test_where_no_server_answers_the_run_ends(opened):
    with FakeVllm() as gone:
        url = gone.url
    with (
        pytest.raises((UserError, RunFailed), match=url),
        opened(engine="vllm", servers=[url], server_timeout_s=0.3),
    ):
        raise AssertionError("opened")
