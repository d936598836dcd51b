"""Servers that follow the policy, against servers without a model; tests/on_vllm has real ones."""

from types import SimpleNamespace

import fakevllm
import pytest
import torch.distributed as dist
from fakevllm import EOS, FakeVllm, logprob
from tiny import ARCH

from sapo_megatron.architecture import parse_architecture
from sapo_megatron.config import RolloutConfig, RunFailed, UserError
from sapo_megatron.engine import Following
from sapo_megatron.rollout.generate import Request, SamplingParams
from sapo_megatron.rollout.vllm.engine import VllmEngine

PROBE = (5, 9, 2, 7)
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=6, eos_id=EOS, seed=3)
REQUESTS = [Request(uid=uid, prompt_tokens=(5, 9, 2 + uid)) for uid in range(4)]
ROUND = ["wake_up", "load", "forget", "probe", "sample", "sleep"]


@pytest.fixture(autouse=True)
def world(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def server():
    with FakeVllm() as one:
        one.description["sleep_mode"] = True
        yield one


def following(folder, *servers, **changes):
    """A policy that never trains unless told to, and what it has saved."""
    policy = SimpleNamespace(
        updates=0,
        groups=SimpleNamespace(world=dist.group.WORLD),
        checkpoint=SimpleNamespace(save=lambda folder: folder.mkdir(exist_ok=True)),
        logprobs=lambda tokens, layout: tuple(map(logprob, tokens[1:])),
    )
    config = RolloutConfig(
        engine="vllm",
        servers=tuple(s.url for s in servers),
        max_prompt_length=16,
        max_response_length=6,
        server_timeout_s=5.0,
        **changes,
    )
    engine = VllmEngine(config.servers, config, parse_architecture(ARCH))
    engine.check()
    return policy, Following(
        policy,
        engine,
        folder / "weights",
        probe=PROBE,
        tolerance=1e-3,
        layout={},
        colocate=config.colocate,
    )


def rollout(engine):
    with engine.serving(record=True) as metrics:
        samples = engine.generate(REQUESTS, PARAMS)
    assert [s.uid for s in samples] == [r.uid for r in REQUESTS]
    return metrics.values()


def calls(server):
    """What the server was asked to do, one after the other and each once."""
    found = []
    for path, body in server.calls:
        name = {"/sleep?level=2": "sleep", "/wake_up": "wake_up", "/reset_prefix_cache": "forget"}
        if body.get("method") == "sapo_load":
            found.append("load")
        elif "prompt_logprobs" in body:
            found.append("probe")
        elif "seed" in body:
            found += [] if found[-1] == "sample" else ["sample"]
        elif path in name:
            found.append(name[path])
    return found


def test_servers_elsewhere_get_weights_that_have_changed_and_stay_awake(tmp_path, server):
    policy, engine = following(tmp_path, server)
    assert "time/sync" in rollout(engine)
    assert rollout(engine) == {}
    policy.updates += 1
    rollout(engine)
    assert calls(server) == ROUND[1:5] * 2  # the same weights twice


def test_colocated_servers_sleep_after_every_rollout_and_get_weights_before(tmp_path, server):
    policy, engine = following(tmp_path, server, colocate=True)
    for _ in range(2):  # an evaluation, whose weights are the same
        assert "rollout/probe_diff" in rollout(engine)
        assert server.asleep
    policy.updates += 1
    rollout(engine)
    assert calls(server) == ROUND * 3
    assert engine.age == 0


def test_a_colocated_server_that_is_back_is_woken_before_it_gets_weights(tmp_path, server):
    with FakeVllm() as away:
        away.description["sleep_mode"] = True
        _, engine = following(tmp_path, server, away, colocate=True)
        rollout(engine)
    server.fault = fakevllm.after(0.1)
    with engine.serving(record=True), FakeVllm(away.port) as back:
        back.description["sleep_mode"] = back.asleep = True
        engine.generate(REQUESTS * 4, PARAMS)
        assert calls(back)[:4] == ROUND[:4]
        assert back.asleep
    assert server.asleep


def test_a_colocated_server_that_cannot_sleep(tmp_path, server):
    server.description["sleep_mode"] = False
    with pytest.raises(UserError, match=f"^{server.url}: sleep_mode: .* --enable-sleep-mode$"):
        following(tmp_path, server, colocate=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"detail": "Not Found"}), "got HTTP 404; .* --enable-sleep-mode"),
        ((500, b"used more memory"), "got HTTP 500: used more memory; .* --enable-sleep-mode"),
        (fakevllm.HANG_UP, "got RemoteProtocolError .* --enable-sleep-mode"),
    ],
)
def test_a_colocated_server_that_does_not_sleep_ends_the_run(tmp_path, server, answer, message):
    _, engine = following(tmp_path, server, colocate=True)
    server.fault = lambda path, body, own: answer if "/sleep" in path else own()
    with pytest.raises(RunFailed, match=f"^{server.url}: /sleep: expected .* {message}"):
        rollout(engine)


def test_a_colocated_server_that_does_not_wake_ends_the_run(tmp_path, server):
    _, engine = following(tmp_path, server, colocate=True)
    server.fault = lambda path, body, own: (500, b"CUDA OOM") if path == "/wake_up" else own()
    with pytest.raises(RunFailed, match=r"got HTTP 500: CUDA OOM; .* --gpu-memory-utilization"):
        rollout(engine)
