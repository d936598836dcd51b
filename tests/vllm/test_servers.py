"""Rollouts on real vLLM servers, against transformers."""

import json
import os
import signal
import threading
from contextlib import closing
from types import SimpleNamespace

import psutil
import pytest
import torch

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.vllm import fleet
from sapo_megatron.rollout.vllm.client import Server
from sapo_megatron.rollout.vllm.engine import VllmEngine
from sapo_megatron.rollout.vllm.fleet import Probe
from sapo_megatron.rollout.vllm.servers import LocalServers
from sapo_megatron.sample import Sample
from tests.support.fakevllm import sampled
from tests.support.families import make_model
from tests.support.tiny import ROOT, write_recipe

SIZES = json.loads((ROOT / "recipes" / "tiny-moe" / "config.json").read_text())
EOS = SIZES["eos_token_id"]
ROUNDS = 3


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two servers of the model of the tiny recipe, and that model with other weights."""
    folder = tmp_path_factory.mktemp("served")
    models = [make_model("qwen3-moe", folder / "0", **SIZES)]
    models += [changed(models[0], folder / str(i), seed=i) for i in range(1, ROUNDS)]
    recipe = load(
        write_recipe(
            folder,
            rollout={
                "engine": "vllm",
                "vllm_python": os.environ["SAPO_VLLM_PYTHON"],
                "num_servers": 2,
                "max_prompt_length": 300,
                "max_response_length": 64,
                "server_timeout_s": 600.0,
            },
            train={"max_tokens_per_gpu": 512},
        )
    )
    with (
        LocalServers(recipe, folder / "0", folder / "servers", folder / "weights") as servers,
        closing(make_engine(recipe, folder / "0", servers)) as engine,
    ):
        yield SimpleNamespace(
            folder=folder, models=models, recipe=recipe, servers=servers, engine=engine
        )


def make_engine(recipe, model, servers, **changes):
    arch = read_architecture(model)
    return VllmEngine(servers.urls, recipe.rollout, arch, exited=servers.exited, **changes)


def check(*args, **changes):
    with closing(make_engine(*args, **changes)) as engine:
        engine.check()


def changed(model, folder, seed):
    """The model after what an update may do to it."""
    generator = torch.Generator().manual_seed(seed)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.2 * weight.std() * noise)
    model.save_pretrained(folder, max_shard_size="50KB")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    model.load_state_dict(state)
    return other


def tokens(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, SIZES["vocab_size"], (number,), generator=generator).tolist())


@torch.no_grad()
def distribution(model, sequence, temperature=1.0):
    """``[S, V]`` fp64 log-probs of what follows each token."""
    logits = model(torch.tensor([sequence])).logits[0].double()
    return (logits / temperature).log_softmax(-1)


def probe_of(model):
    samples, logprobs = [], []
    for uid in range(4):
        prompt, response = tokens(10 + uid, seed=9), tokens(40, seed=20 + uid)
        rows = distribution(model, prompt + response)[len(prompt) - 1 : -1]
        logprobs += rows.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()
        samples.append(
            Sample(
                uid=uid,
                prompt_tokens=prompt,
                response_tokens=list(response),
                rollout_logprobs=[],
                truncated=True,
            )
        )
    return Probe(samples=samples, logprobs=tuple(logprobs), tolerance=1e-4)


def bring(served, number):
    """Load one of the models; its probe differs by rounding alone."""
    probe = probe_of(served.models[number])
    differences = served.engine.load(served.folder / str(number), probe, number)
    assert list(differences) == list(served.servers.urls)
    assert max(differences.values()) < 1e-5
    return served.models[number]


def params(temperature, top_p=1.0, stop_ids=(EOS,), new=24, seed=5):
    return SamplingParams(
        temperature=temperature, top_p=top_p, max_new_tokens=new, stop_ids=stop_ids, seed=seed
    )


def requests(number, length=12):
    return [Request(uid=i, prompt_tokens=tokens(length, seed=i % 4)) for i in range(number)]


def worst(model, samples, temperature):
    """Largest difference of the samples' log-probs from the model's, nats."""
    found = []
    for s in samples:
        rows = distribution(model, s.prompt_tokens + tuple(s.response_tokens), temperature or 1.0)
        rows = rows[len(s.prompt_tokens) - 1 : -1]
        exact = rows.gather(-1, torch.tensor(s.response_tokens)[:, None])[:, 0]
        found.append((torch.tensor(s.rollout_logprobs, dtype=torch.float64) - exact).abs().max())
    return max(found).item()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.7, 0.9), (1.0, 1.0), (1.3, 0.5), (1.0, 0.9), (0.0, 1.0)]
)
def test_logprobs_have_temperature_applied_and_top_p_not(served, temperature, top_p):
    model = bring(served, 0)
    samples = sampled(served.engine, requests(16), params(temperature, top_p))
    assert [s.uid for s in samples] == list(range(16))
    assert all(len(s.response_tokens) == 24 or not s.truncated for s in samples)
    assert worst(model, samples, temperature) < 1e-4


def test_no_token_comes_from_outside_top_p(served):
    model = bring(served, 0)
    for s in sampled(served.engine, requests(16), params(1.3, 0.5)):
        rows = distribution(model, s.prompt_tokens + tuple(s.response_tokens), 1.3).exp()
        for row, token in zip(rows[len(s.prompt_tokens) - 1 :], s.response_tokens, strict=False):
            assert row[row > row[token]].sum() < 0.5 + 1e-4


def test_greedy_is_greedy(served):
    model = bring(served, 0)
    for s in sampled(served.engine, requests(4), params(0.0)):
        rows = distribution(model, s.prompt_tokens + tuple(s.response_tokens))
        assert s.response_tokens == rows[len(s.prompt_tokens) - 1 : -1].argmax(-1).tolist()


def test_a_seed_says_what_is_sampled(served):
    bring(served, 0)
    first, again, other = (
        [s.response_tokens for s in sampled(served.engine, requests(8), params(1.0, seed=seed))]
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    # Four prompts, each twice: every request has a seed of its own.
    assert first[:4] != first[4:]


def test_more_prompts_than_one_forward_pass_takes(served):
    """vLLM's is of 2048 tokens here; a seeded prompt that it cut in two would end a server."""
    model = bring(served, 0)
    others = [Request(uid=i, prompt_tokens=tokens(290, seed=100 + i)) for i in range(80)]
    samples = sampled(served.engine, others, params(1.0, new=4))
    assert [s.uid for s in samples] == list(range(80))
    assert worst(model, samples, 1.0) < 1e-4


def test_a_response_ends_with_a_stop_token_or_is_truncated(served):
    """Those of the request, and not what the model's own files name."""
    model = bring(served, 0)
    stops = (7, 40)
    samples = sampled(served.engine, requests(64), params(1.0, stop_ids=stops, new=64))
    for s in samples:
        assert s.truncated == (not {*stops} & {*s.response_tokens})
        assert not {*stops} & {*s.response_tokens[:-1]}
        assert len(s.response_tokens) == 64 or not s.truncated
    assert {s.response_tokens[-1] for s in samples if not s.truncated} == {*stops}
    assert any(EOS in s.response_tokens for s in samples)
    assert worst(model, samples, 1.0) < 1e-4


def test_new_weights_are_the_ones_that_sample(served):
    """Also on long prompts, which the servers have cached under the weights of before."""
    asked = requests(8, length=290)
    before = None
    for number in (1, 2, 0, 1, 1):
        model = bring(served, number)
        samples = sampled(served.engine, asked, params(0.7, 0.9))
        assert worst(model, samples, 0.7) < 1e-4
        if before is not None and before is not model:
            assert worst(before, samples, 0.7) > 0.05
        before = model


def test_a_prefix_cache_that_outlives_its_weights_would_be_seen(served, monkeypatch):
    asked = requests(8, length=290)
    bring(served, 0)
    sampled(served.engine, asked, params(0.7, 0.9))

    async def kept(server):
        pass

    monkeypatch.setattr(fleet, "_forget_prefixes", kept)
    model = bring(served, 1)  # whose probe sees nothing: log-probs of prompts are never cached
    assert worst(model, sampled(served.engine, asked, params(0.7, 0.9)), 0.7) > 1e-3


def test_vllms_own_reload_is_wrong_here_and_the_probe_sees_it(served, monkeypatch):
    right = Server.load

    async def vllms_own(server, folder, label):
        files = {"load_config": {"load_format": "auto"}}  # the servers were started with none
        for method, kwargs in (
            ("update_config", {"overrides": files}),
            ("reload_weights", {"weights_path": str(folder)}),
        ):
            await server._call("POST", "/collective_rpc", {"method": method, "kwargs": kwargs})

    bring(served, 1)
    monkeypatch.setattr(Server, "load", vllms_own)
    with pytest.raises(RunFailed, match=r"a probe to 0\.0001 nats per token after new weights"):
        bring(served, 1)  # the very weights that are there
    monkeypatch.setattr(Server, "load", right)
    bring(served, 1)


def test_what_a_server_must_be(served, tmp_path):
    served.engine.check()
    config = json.loads((served.folder / "0" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 105}))
    with pytest.raises(UserError, match=r"vocab_size: expected 105, .* got 104"):
        check(served.recipe, tmp_path, served.servers)
    with pytest.raises(UserError, match="--enable-return-routed-experts"):
        check(served.recipe, served.folder / "0", served.servers, with_routes=True)
    longer = load(
        served.folder / "recipe.yaml",
        {"rollout.max_prompt_length": "301", "train.max_tokens_per_gpu": "512"},
    )
    with pytest.raises(UserError, match=r"max_model_len: expected at least .* = 365, got 364"):
        check(longer, served.folder / "0", served.servers)


def test_every_token_has_the_log_prob_of_the_weights_that_its_version_says(served):
    """Over four updates in the middle of responses, with the prefix cache on."""
    changes = {"rollout.on_new_weights": "continue", "rollout.server_concurrency": "8"}
    recipe = load(served.folder / "recipe.yaml", changes)
    here, found = threading.Semaphore(0), []
    probes = [probe_of(model) for model in served.models]

    def arrived(sample):
        found.append(sample)
        here.release()

    asked = requests(160, length=40)  # so many that some are under way at every load
    with closing(make_engine(recipe, served.folder / "0", served.servers)) as engine:
        for version in range(5):
            number = version % ROUNDS
            engine.load(served.folder / str(number), probes[number], version)
            if version == 0:
                done = engine.begin(asked, params(1.0, new=256), arrived)
            for _ in range(8):
                assert here.acquire(timeout=300)
        done.result(timeout=500)
    assert sorted(s.uid for s in found) == [r.uid for r in asked]
    assert max(len({*s.versions}) for s in found) >= 3
    for s in found:
        assert s.versions == sorted(s.versions)
        for version in {*s.versions}:
            rows = distribution(
                served.models[version % ROUNDS], s.prompt_tokens + tuple(s.response_tokens)
            )[len(s.prompt_tokens) - 1 : -1]
            exact = rows.gather(-1, torch.tensor(s.response_tokens)[:, None])[:, 0]
            its = torch.tensor(s.versions) == version
            got = torch.tensor(s.rollout_logprobs, dtype=torch.float64)
            assert (got - exact)[its].abs().max() < 1e-4


def test_a_server_that_is_killed_leaves_its_work_to_the_other(served, caplog):
    """From here on there is one server."""
    model = bring(served, 2)
    asked = requests(200)
    victim = served.servers._processes[0]
    group = psutil.Process(victim.guard.pid).children(recursive=True)
    assert len(group) >= 3
    samples = []

    def arrived(sample):
        samples.append(sample)
        if len(samples) == 50:
            os.killpg(group[0].pid, signal.SIGKILL)

    served.engine.begin(asked, params(1.0, new=64), arrived).result(timeout=500)
    assert sorted(s.uid for s in samples) == [r.uid for r in asked]
    assert worst(model, samples, 1.0) < 1e-4
    assert f"{victim.url} is away" in caplog.text
    psutil.wait_procs(group, timeout=10)
    assert "it has ended with status" in served.servers.exited(victim.url)
    assert list(served.engine.load(served.folder / "0", probe_of(served.models[0]), 0)) == [
        served.servers.urls[1]
    ]


def test_a_damaged_file_of_weights(served, tmp_path):
    """The server is of no use afterwards."""
    for path in (served.folder / "0").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    next(tmp_path.glob("*.safetensors")).write_bytes(b"\0" * 100)
    with pytest.raises(RunFailed, match=r"sapo_load: HTTP 500: .*, and restart it"):
        served.engine.load(tmp_path, probe_of(served.models[0]), 0)


def test_servers_that_are_closed_leave_nothing_behind(served):
    """From here on there is none."""
    left = psutil.Process(served.servers._processes[1].guard.pid)
    group = [left, *left.children(recursive=True)]
    url = served.servers.urls[1]
    served.servers.close()
    gone, alive = psutil.wait_procs(group, timeout=10)
    assert len(gone) >= 4
    assert alive == []
    with pytest.raises(RunFailed, match=f"{url}: "):
        check(
            load(served.folder / "recipe.yaml", {"rollout.server_timeout_s": "1.0"}),
            served.folder / "0",
            SimpleNamespace(urls=(url,), exited=lambda url: None),
        )
