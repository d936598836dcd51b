"""The client of vLLM servers against servers that misbehave; tests/on_vllm has real ones."""

import base64
import dataclasses
import io
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.metrics import now
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import RolloutConfig
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.vllm import fleet as fleet_module
from sapo_megatron.rollout.vllm import servers as servers_module
from sapo_megatron.rollout.vllm.answers import read_routes
from sapo_megatron.rollout.vllm.engine import VllmEngine
from sapo_megatron.rollout.vllm.fleet import Probe
from sapo_megatron.rollout.vllm.servers import LocalServers
from sapo_megatron.sample import Sample
from tests.support import fakevllm
from tests.support.fakevllm import EOS, HANG_UP, FakeVllm, completion, logprob, sampled
from tests.support.tiny import ARCH, TESTS, write_recipe

MODEL = parse_architecture(ARCH)
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=6, stop_ids=(EOS,), seed=3)
REQUESTS = [Request(uid=10 + i, prompt_tokens=(5, 9, 2 + i)) for i in range(24)]
SAMPLES = [
    Sample(
        uid=len(prompt),
        prompt_tokens=prompt,
        response_tokens=[2, 7],
        rollout_logprobs=[],
        truncated=True,
    )
    for prompt in ((5,), (5, 9))
]
PROBE = Probe(samples=SAMPLES, logprobs=(logprob(2), logprob(7)) * 2, tolerance=1e-3)


@pytest.fixture
def servers():
    with FakeVllm() as one, FakeVllm() as two:
        yield one, two


@pytest.fixture
def server(servers):
    return servers[0]


OPEN = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def engine(*urls, timeout_s=60.0, min_servers=1, on_new_weights="wait", **changes):
    config = RolloutConfig(
        engine="vllm",
        servers=urls,
        max_prompt_length=16,
        max_response_length=6,
        server_timeout_s=timeout_s,
        server_concurrency=4,
        min_servers=min_servers,
        on_new_weights=on_new_weights,
    )
    OPEN.append(VllmEngine(urls, config, MODEL, **changes))
    return OPEN[-1]


def loaded(*servers, **changes):
    found = engine(*(s.url for s in servers), **changes)
    found.load(TESTS, PROBE, 0)
    return found


def completions(fault):
    """``fault``, for completions alone."""
    return lambda path, body, own: fault() if "seed" in body else own()


def test_every_request_is_answered_once_in_order_and_by_seed(servers):
    for each in servers:
        each.fault = fakevllm.after(0.02)
    client = loaded(*servers)
    samples = sampled(client, REQUESTS, PARAMS)
    assert [s.uid for s in samples] == [r.uid for r in REQUESTS]
    assert [s.prompt_tokens for s in samples] == [r.prompt_tokens for r in REQUESTS]
    asked = servers[0].prompts() + servers[1].prompts()
    assert sorted(asked) == sorted(r.prompt_tokens for r in REQUESTS)
    assert min(len(each.prompts()) for each in servers) >= 4
    assert any(s.truncated for s in samples)
    assert any(not s.truncated for s in samples)
    for s in samples:
        assert s.rollout_logprobs == [logprob(t) for t in s.response_tokens]
        assert s.truncated == (s.response_tokens[-1] != EOS)
    seeds = [body["seed"] for each in servers for _, body in each.calls if "seed" in body]
    assert len(set(seeds)) == len(REQUESTS)
    again = sampled(loaded(servers[1]), REQUESTS, PARAMS)
    assert [s.response_tokens for s in again] == [s.response_tokens for s in samples]


def test_what_a_request_says(server):
    sampled(loaded(server), REQUESTS[:1], PARAMS)
    (body,) = (body for _, body in server.calls if "seed" in body)
    said = ("prompt", "max_tokens", "temperature", "top_p", "stop_token_ids", "top_k")
    assert [body[key] for key in said] == [[5, 9, 2], 6, 0.7, 0.9, [EOS], -1]


def test_each_of_several_tokens_ends_a_response(server):
    params = dataclasses.replace(PARAMS, stop_ids=(EOS, 7))
    server.fault = completions(lambda: (200, completion([9, 7])))
    (s,) = sampled(loaded(server), REQUESTS[:1], params)
    assert (s.response_tokens, s.truncated) == ([9, 7], False)
    (body,) = (body for _, body in server.calls if "seed" in body)
    # The model's own end tokens count where they are in our list alone.
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([EOS, 7], True)
    server.fault = completions(lambda: (200, completion([7, 9, EOS])))
    with pytest.raises(RunFailed, match=r"no token after one of \[1, 7\], got \[7, 9, 1\]"):
        sampled(loaded(server), REQUESTS[:1], params)


def test_a_server_that_dies_leaves_its_work_to_the_other(servers, caplog):
    dying, other = servers

    def fault(path, body, own):
        return HANG_UP if len(dying.prompts()) > 5 else own()

    dying.fault = fault
    samples = sampled(loaded(*servers), REQUESTS, PARAMS)
    assert [s.uid for s in samples] == [r.uid for r in REQUESTS]
    assert len(dying.prompts()) >= 5
    assert len(set(other.prompts())) == len(other.prompts())
    assert f"{dying.url} is away" in caplog.text


def test_a_server_that_gives_up_on_a_request_is_asked_again(server):
    first = []

    def fault(path, body, own):
        if "seed" in body and not first:
            first.append(body)
            return 200, completion([], finish_reason="abort", logprobs=None)
        return own()

    server.fault = fault
    assert len(sampled(loaded(server), REQUESTS, PARAMS)) == len(REQUESTS)


@pytest.mark.parametrize(
    "fault",
    [
        fakevllm.after(280.0),  # longer than a test may take
        completions(lambda: (503, b"overloaded")),
        completions(lambda: HANG_UP),
        completions(lambda: (200, completion([], finish_reason="abort", logprobs=None))),
    ],
    ids=["hangs", "overloaded", "hangs up", "aborts"],
)
def test_a_server_that_answers_no_request_leaves_them_to_the_other(servers, fault):
    """Though it says what it serves whenever it is asked, and so seems to be ready."""
    servers[0].fault = fault
    servers[1].fault = fakevllm.after(0.3)  # so that it has no time for all of them at once
    assert len(sampled(loaded(*servers, timeout_s=2.0), REQUESTS[:16], PARAMS)) == 16


def test_a_slow_server_is_waited_for(server, caplog, monkeypatch):
    monkeypatch.setattr(fleet_module, "PROGRESS_S", 0.1)
    with caplog.at_level("INFO"):
        _, held, found, done = under_way(server, REQUESTS[:8])
        wait_until(lambda: f"0 of 8 responses; 4 in flight at {server.url}" in caplog.text)
        held.let_go()
        done.result(timeout=60)
    assert len(found) == 8


def test_a_server_that_stays_away_ends_the_run(server):
    client = loaded(server, timeout_s=1.0)
    server.die()
    with pytest.raises(RunFailed, match=f"got 0 of 1 .{server.url}: away for 1 s: ConnectError"):
        sampled(client, REQUESTS, PARAMS)


def test_a_server_whose_process_has_ended_is_not_waited_for(server):
    client = engine(server.url, timeout_s=60.0, exited=lambda url: "it has ended with status 1")
    server.die()
    with pytest.raises(RunFailed, match=f"{server.url}: it has ended with status 1"):
        client.check()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>busy</html>", "Invalid JSON: .* got "),
        (b'{"choices": [', "Invalid JSON: .* got "),
        ([], "Input should be an object"),
        ({}, "choices: Field required"),
        ({"choices": []}, "choices: List should have at least 1 item"),
        (completion([7, EOS], token_ids=None), "choices.0.token_ids: .* got None"),
        (completion([7, EOS], token_ids=[7.5, 1]), "choices.0.token_ids.0: .* got 7.5"),
        (completion([7, EOS], token_ids=[]), "token_ids: expected at least one token"),
        (completion([7, EOS], finish_reason="error"), "finish_reason: .* got 'error'"),
        (completion([104, EOS]), "token_ids: expected ids from 0 to 103, got 104"),
        (completion([-1, EOS]), "token_ids: expected ids from 0 to 103, got -1"),
        (completion([7, EOS, 7, EOS]), r"token_ids: expected no token after one of \[1\]"),
        (
            completion([7, 8]),
            r"token_ids: expected one of \[1\] or 6 tokens, got 2 that end with 8",
        ),
        (completion([7] * 7), r"token_ids: expected one of \[1\] or 6 tokens, got 7"),
    ],
)
def test_answers_that_are_wrong(server, answer, message):
    server.fault = completions(lambda: (200, answer))
    with pytest.raises(RunFailed, match=f"^{server.url}: .*{message}") as error:
        sampled(loaded(server), REQUESTS[:1], PARAMS)
    assert "\n" not in str(error.value)
    assert len(server.prompts()) == 1


UNUSABLE = [
    (None, "expected one of each of 1 tokens, got 0"),
    ([-1.0, -1.0], "expected one of each of 1 tokens, got 2"),
    ([float("nan")], "expected numbers of at most 0, got nan"),
    ([float("-inf")], "got -inf"),
    ([0.5], "got 0.5"),
    ([-9999.0], "got -9999.0"),
    ([None], "got None"),
]


@pytest.mark.parametrize(("logprobs", "message"), UNUSABLE)
def test_a_response_without_logprobs_is_drawn_again_and_many_end_the_run(server, logprobs, message):
    answer = completion([EOS], logprobs=logprobs and {"token_logprobs": logprobs})
    spoilt = iter([True])
    server.fault = lambda path, body, own: (
        (200, answer) if "seed" in body and next(spoilt, False) else own()
    )
    client = loaded(server)
    found = []
    done = client.begin(REQUESTS, PARAMS, found.append).result(timeout=200)
    assert done.values()["rollout/redrawn"] == 1
    assert sorted(s.uid for s in found) == [r.uid for r in REQUESTS]
    sent = server.prompts()
    assert len(sent) == len(REQUESTS) + 1
    server.fault = completions(lambda: (200, answer))
    with pytest.raises(RunFailed, match=f"^{server.url}: token_logprobs: .*{message}.* at most 3"):
        sampled(client, REQUESTS, PARAMS)


def test_another_draw_has_another_seed(server):
    seeds = []

    def fault(path, body, own):
        if "seed" not in body:
            return own()
        seeds.append(body["seed"])
        return (200, completion([EOS], logprobs=None)) if len(seeds) == 1 else own()

    server.fault = fault
    sampled(loaded(server), REQUESTS[:1], PARAMS)
    assert len(set(seeds)) == len(seeds) == 2


def test_responses_to_one_prompt_come_from_one_server(servers):
    requests = [Request(uid=i, prompt_tokens=(5, 9, i // 6)) for i in range(48)]
    samples = sampled(loaded(*servers), requests, PARAMS)
    assert [s.uid for s in samples] == list(range(48))
    one, two = (s.prompts() for s in servers)
    assert len(one) + len(two) == 48
    # The last prompt alone may be shared, by a server that has nothing else left.
    assert len(set(one) & set(two)) <= 1
    assert min(len(set(one)), len(set(two))) > 1


def test_fewer_servers_than_the_least_end_the_run(servers):
    gone = []
    client = loaded(
        *servers,
        min_servers=2,
        exited=lambda url: "it has ended" if url in gone else None,
    )
    servers[1].die()
    gone.append(servers[1].url)
    message = rf"min_servers: .* at least 2 .* got 1 of 2 \({servers[1].url}: it has ended\)"
    with pytest.raises(RunFailed, match=message):
        sampled(client, REQUESTS, PARAMS)


def test_new_weights_wait_for_the_least_number_of_servers(servers):
    first, away = servers
    client = engine(*(s.url for s in servers), timeout_s=1.0, min_servers=2)
    away.die()
    with pytest.raises(RunFailed, match=rf"at least 2 .* got 1 of 2 \({away.url}: away for 1 s"):
        client.load(TESTS, PROBE, 0)
    assert len(first.folders) == 1


def test_a_request_that_is_refused_is_not_sent_again(server):
    server.fault = completions(lambda: (400, {"error": {"message": "prompt is\ntoo long"}}))
    with pytest.raises(RunFailed, match=f"{server.url}: .*HTTP 400: prompt is too long;"):
        sampled(loaded(server), REQUESTS[:1], PARAMS)
    assert len(server.prompts()) == 1


def test_a_request_that_keeps_failing_ends_the_run(server):
    server.fault = completions(lambda: (500, b"out of memory"))
    with pytest.raises(RunFailed, match="request 10, got its failure number 3: HTTP 500: out of"):
        sampled(loaded(server), REQUESTS[:1], PARAMS)
    assert len(server.prompts()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected qwen3_moe, .* got llama"),
        ({"num_layers": 3}, "num_layers: expected 2, .* got 3"),
        ({"vocab_size": 105}, "vocab_size: expected 104, .* got 105"),
        ({"max_model_len": 21}, "max_model_len: expected at least .* = 22, got 21"),
        ({"generation_config": "auto"}, "generation_config: expected vllm .* got auto"),
        (
            {"quantized": True},
            r"quantization_config: expected none, .* --hf-overrides '\{.*null\}'",
        ),
        ({}, "routed_experts: .* --enable-return-routed-experts"),
    ],
)
def test_servers_that_do_not_fit(server, changes, message):
    server.description.update(changes)
    with pytest.raises(UserError, match=f"^{server.url}: {message}"):
        engine(server.url, with_routes=True).check()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"detail": "Not Found"}), "VLLM_SERVER_DEV_MODE=1"),
        (
            (500, {"error": {"message": "'CPUWorker' object has no attribute 'sapo_describe'"}}),
            "--worker-extension-cls sapo_megatron.rollout.vllm.worker.Worker",
        ),
    ],
)
def test_servers_that_were_started_without_what_is_needed(server, answer, message):
    server.fault = lambda path, body, own: answer if path == "/collective_rpc" else own()
    with pytest.raises(UserError, match=message):
        engine(server.url).check()


@pytest.mark.parametrize("release", ["0.31.4", "0.33.0", "1.0.32", "dev"])
def test_another_release_of_vllm(server, release):
    server.release = release
    with pytest.raises(UserError, match=rf"^{server.url}: .* vLLM 0\.32, .* got {release}; "):
        engine(server.url).check()


@pytest.mark.parametrize("release", ["0.32.1", "0.32.1.dev3+g0123abc"])
def test_later_builds_of_the_same_release(server, release):
    server.release = release
    engine(server.url).check()


@pytest.mark.parametrize("answer", [(404, b"<h1>Not Found</h1>"), (200, b"<html>"), (200, {})])
def test_a_port_that_another_program_has(server, answer):
    server.fault = lambda path, body, own: answer
    with pytest.raises(UserError, match=f"^{server.url}: expected a server of vLLM .* got none "):
        engine(server.url).check()


def test_check_waits_for_a_server_that_is_still_starting(server):
    began = time.monotonic()
    late = 0.6
    server.fault = lambda path, body, own: HANG_UP if time.monotonic() < began + late else own()
    engine(server.url).check()
    assert time.monotonic() > began + late


def test_load_returns_the_difference_of_the_probe(servers):
    client = engine(*(s.url for s in servers))
    probe = dataclasses.replace(PROBE, logprobs=tuple(x + 1e-4 for x in PROBE.logprobs))
    differences = client.load(TESTS, probe, 0)
    assert differences == {s.url: pytest.approx(1e-4) for s in servers}
    assert [path for path, _ in servers[0].calls if "reset" in path] == ["/reset_prefix_cache"]
    asked = [body["prompt"] for _, body in servers[0].calls if "prompt_logprobs" in body]
    assert asked == [[5, 2, 7], [5, 9, 2, 7]]


def test_load_stops_where_a_server_does_not_compute_the_same(servers):
    bad = servers[1]
    client = engine(*(s.url for s in servers))

    def fault(path, body, own):
        entries = [None, *({t: {"logprob": -2.0}} for t in body.get("prompt", ())[1:])]
        scores = {"choices": [{"prompt_logprobs": entries}]}
        return (200, scores) if "prompt_logprobs" in body else own()

    bad.fault = fault
    message = f"{bad.url}: .* 0.001 nats per token .* of 1.46; .* look at its log, --dtype and"
    with pytest.raises(RunFailed, match=message):
        client.load(TESTS, PROBE, 0)


def test_load_stops_where_the_training_engine_computes_no_numbers(server):
    nothing = dataclasses.replace(PROBE, logprobs=(float("nan"),) * 4)
    with pytest.raises(RunFailed, match=f"{server.url}: .* got a difference of nan"):
        engine(server.url).load(TESTS, nothing, 0)


def test_a_server_that_was_away_gets_the_weights_before_it_gets_work(servers, caplog):
    first, away = servers
    client = loaded(*servers)
    away.die()
    assert list(client.load(TESTS.parent, PROBE, 1)) == [first.url]
    assert f"{away.url} is left out" in caplog.text
    with FakeVllm(away.port) as back:
        first.fault = fakevllm.behind(back)
        assert len(sampled(client, REQUESTS, PARAMS)) == len(REQUESTS)
        assert back.folders == [str(TESTS.parent)]
        assert back.prompts()
        asked = ["seed" if "seed" in body else body.get("method") for _, body in back.calls]
        assert asked.index("sapo_load") < asked.index("seed")


def test_a_server_that_was_restarted_gets_the_weights_again(server):
    client = loaded(server)
    sampled(client, REQUESTS[:1], PARAMS)
    assert len(server.folders) == 1
    server.weights = "initial"
    sampled(client, REQUESTS[:1], PARAMS)
    assert len(server.folders) == 2


def under_way(server, requests, params=PARAMS, **changes):
    """An engine that is in the middle of the first four responses; (it, fault, samples, future)."""
    server.fault = held = fakevllm.Held()
    client, found = engine(server.url, **changes), []
    client.check()
    client.load(TESTS, PROBE, 0)
    done = client.begin(requests, params, found.append)
    for _ in range(4):
        assert held.begun.acquire(timeout=60)
    return client, held, found, done


def test_new_weights_wait_for_what_is_under_way(server):
    """Not for what waits itself."""
    client, held, found, done = under_way(server, REQUESTS[:6])
    with ThreadPoolExecutor(1) as other:
        loading = other.submit(client.load, TESTS.parent, PROBE, 1)
        with pytest.raises(TimeoutError):
            loading.result(timeout=0.3)
        assert server.folders == [str(TESTS)]
        held.let_go()
        loading.result(timeout=60)
    done.result(timeout=60)
    assert sorted({*s.versions} for s in found) == [{0}] * 4 + [{1}] * 2
    assert server.folders == [str(TESTS), str(TESTS.parent)]


def test_what_is_under_way_goes_on_with_new_weights(server):
    client, _held, found, done = under_way(server, REQUESTS[:6], on_new_weights="continue")
    client.load(TESTS.parent, PROBE, 1)
    assert done.result(timeout=60).values()["rollout/redrawn"] == 0
    samples = sorted(found, key=lambda s: s.uid)
    assert [s.uid for s in samples] == [r.uid for r in REQUESTS[:6]]
    for s in samples[:4]:
        assert s.response_tokens[:2] == [7, 8]
        assert s.versions == [0, 0] + [1] * (len(s.response_tokens) - 2)
    for s in samples:
        assert s.rollout_logprobs == [logprob(t) for t in s.response_tokens]
        assert len(s.response_tokens) <= PARAMS.max_new_tokens
    assert all(set(s.versions) == {1} for s in samples[4:])
    went_on = [body for _, body in server.calls if body.get("prompt", ())[-2:] == [7, 8]]
    assert sorted(body["prompt"][:-2] for body in went_on) == [
        list(r.prompt_tokens) for r in REQUESTS[:4]
    ]
    assert {body["max_tokens"] for body in went_on} == {4}
    seeds = [body["seed"] for _, body in server.calls if "seed" in body]
    assert len(set(seeds)) == len(seeds) == 10
    order = [(path, body.get("method")) for path, body in server.calls if "seed" not in body]
    last = len(order) - 1 - order[::-1].index(("/collective_rpc", "sapo_load"))
    assert order.index(("/abort_requests", None)) < last


def test_servers_get_no_work_while_weights_are_sent_to_them(server):
    """Though one of the requests fails meanwhile, and the server is seen to be ready again."""
    client, held, found, done = under_way(server, REQUESTS[:6])
    asked = threading.Event()

    def fault(path, body, own):
        if "seed" in body:
            asked.set()
        return own()

    def send():
        assert not asked.wait(0.5)

    server.fault = fault
    with ThreadPoolExecutor(1) as other:
        receiving = other.submit(client.receive, send, PROBE, 1)
        wait_until(lambda: client._fleet._resting)
        held.let_go(status=500)
        receiving.result(timeout=60)
    done.result(timeout=60)
    assert asked.is_set()
    assert len(found) == 6


def test_what_servers_spend_their_time_on(servers):
    """What is under way when they are asked is told up to then, and the rest the next time."""
    held = fakevllm.Held()
    for each in servers:
        each.fault = held
    client, began = engine(*(each.url for each in servers)), now()
    client.load(TESTS, PROBE, 0)
    names = {f"{each.url} (rank 0)" for each in servers}

    def spent():
        found = client.spent("time/rollout")
        return found["time/rollout"].spans, found["time/sync"].spans

    rollout, sync = spent()
    assert {where for where, _, _ in sync} == {where for where, _, _ in rollout} == names
    assert all(began < at <= at + seconds < now() and seconds > 0 for _, at, seconds in sync)
    assert [seconds for _, _, seconds in rollout] == [0.0, 0.0]

    done = client.begin(REQUESTS[:1], PARAMS, lambda sample: None)
    assert held.begun.acquire(timeout=60)
    rollout, sync = spent()
    assert [seconds for _, _, seconds in sync] == [0.0, 0.0]
    busy, idle = sorted(rollout, key=lambda span: -span[2])
    assert busy[2] > 0 == idle[2]
    held.let_go()
    done.result(timeout=60)
    rollout, _ = spent()
    (rest,) = (span for span in rollout if span[2] > 0)
    assert rest[:2] == (busy[0], pytest.approx(busy[1] + busy[2], abs=1e-6))
    assert [seconds for _, _, seconds in spent()[0]] == [0.0, 0.0]


def test_a_response_that_is_interrupted_before_its_first_token_begins_again(server):
    client, held, found, done = under_way(server, REQUESTS[:4], on_new_weights="continue")
    held.partial = completion([], finish_reason="abort", logprobs=None)
    client.load(TESTS.parent, PROBE, 1)
    done.result(timeout=60)
    assert {v for s in found for v in s.versions} == {1}


def test_a_server_that_dies_while_it_is_interrupted(servers, caplog):
    """What it had begun under older weights goes on where it was; the rest begins again."""
    dying, other = servers
    dying.fault, other.fault = fakevllm.Held(), fakevllm.Held()
    client, found = engine(dying.url, other.url, on_new_weights="continue"), []
    client.load(TESTS, PROBE, 0)
    done = client.begin(REQUESTS[:8], PARAMS, found.append)
    for fault in (dying.fault, other.fault):
        for _ in range(4):
            assert fault.begun.acquire(timeout=60)
    dying.die()
    dying.fault.let_go()
    assert list(client.load(TESTS.parent, PROBE, 1)) == [other.url]
    done.result(timeout=60)
    assert sorted(s.uid for s in found) == [r.uid for r in REQUESTS[:8]]
    assert sorted(len({*s.versions}) for s in found)[-1] == 2
    assert f"{dying.url} is left out" in caplog.text


def test_a_server_that_cannot_be_interrupted(server):
    server.fault = lambda path, body, own: (
        (404, {"detail": "Not Found"}) if path == "/abort_requests" else own()
    )
    engine(server.url).check()
    message = f"^{server.url}: /abort_requests: .* got HTTP 404; .* or set on_new_weights wait$"
    with pytest.raises(UserError, match=message):
        engine(server.url, on_new_weights="continue").check()


def test_an_evaluation_comes_before_what_waits(server):
    client, held, found, done = under_way(server, REQUESTS)
    evaluated = []
    requests = [Request(uid=uid, prompt_tokens=(3, uid)) for uid in range(4)]
    first = client.begin(requests, PARAMS, evaluated.append, first=True)
    held.let_go()
    first.result(timeout=60)
    done.result(timeout=60)
    assert len(evaluated) == 4
    assert sorted(s.uid for s in found) == [r.uid for r in REQUESTS]
    prompts = server.prompts()
    assert max(prompts.index(r.prompt_tokens) for r in requests) < 12


def test_a_prefix_cache_in_use_ends_the_run(server, monkeypatch):
    monkeypatch.setattr(fleet_module, "RESET_S", 0.3)
    server.fault = lambda path, body, own: (
        (200, {"success": False}) if path == "/reset_prefix_cache" else own()
    )
    with pytest.raises(RunFailed, match=f"{server.url}: expected its prefix cache to be free"):
        loaded(server)


def test_a_server_that_does_not_see_the_folder(server):
    server.fault = lambda path, body, own: (
        (200, {"results": [{"found": False}]}) if body.get("method") == "sapo_load" else own()
    )
    with pytest.raises(RunFailed, match=f"{server.url}: expected the weights in {TESTS}, got no"):
        loaded(server)


def encoded(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def chosen(tokens, layers, dtype="uint8"):
    return np.random.default_rng(0).integers(0, 4, (tokens, layers, 2)).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_routes_come_with_the_sample(server, dtype):
    sent = chosen(3 + 4 - 1, 2, dtype)
    answer = completion([7, 8, 9, EOS], routed_experts=encoded(sent))
    server.description["routed_experts"] = True
    server.fault = completions(lambda: (200, answer))
    (sample,) = sampled(loaded(server, with_routes=True), REQUESTS[:1], PARAMS)
    assert sample.routes.experts.dtype == np.int16
    assert sample.routes.probs is None
    np.testing.assert_array_equal(sample.routes.experts, sent)


def test_routes_are_taken_where_all_servers_return_them(servers, caplog):
    caplog.set_level(logging.INFO)
    for server in servers:
        answer = completion([7, 8, 9, EOS], routed_experts=encoded(chosen(3 + 4 - 1, 2)))
        server.fault = completions(lambda answer=answer: (200, answer))
        server.description["routed_experts"] = True
    for others_do in (True, False):
        servers[-1].description["routed_experts"] = others_do
        found = engine(*(server.url for server in servers))
        found.check()
        found.take_routes(everywhere=found.returns_routes)
        found.load(TESTS, PROBE, 0)
        samples = sampled(found, REQUESTS[:1], PARAMS)
        assert [s.routes is not None for s in samples] == [others_do]
        told = [line for line in caplog.messages if "rollout_train/variance" in line]
        expected = f"{servers[-1].url} returns no routes, so .* --enable-return-routed-experts"
        assert [bool(re.match(expected, line)) for line in told] == [True] * (not others_do)


def test_layers_without_experts_are_left_out():
    arch = parse_architecture({**ARCH, "num_hidden_layers": 3, "mlp_only_layers": [0]})
    sent = chosen(5, 3)
    found = read_routes(encoded(sent), "http://a", 5, arch)
    np.testing.assert_array_equal(found.experts, sent[:, 1:])


def archive(*_):
    file = io.BytesIO()
    np.savez(file, chosen(5, 2))
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, UserError, "got none; start the server with --enable-return-routed-experts"),
        ("{}", RunFailed, "expected an .npy array in base64"),
        (base64.b64encode(b"nothing").decode(), RunFailed, "expected an .npy array in base64"),
        (encoded(np.array([{}], dtype=object)), RunFailed, "expected an .npy array in base64"),
        (archive(), RunFailed, "got an archive"),
        (encoded(chosen(4, 2)), RunFailed, r"numbers \[5, 2, 2\], got uint8 \[4, 2, 2\]"),
        (encoded(chosen(5, 3)), RunFailed, r"numbers \[5, 2, 2\], got uint8 \[5, 3, 2\]"),
        (encoded(chosen(5, 2, "float32")), RunFailed, "got float32"),
        (encoded(chosen(5, 2) + 4), RunFailed, "expected experts 0 to 3, got 4 to 7"),
    ],
)
def test_routes_that_are_wrong(text, error, message):
    with pytest.raises(error, match=f"^http://a: routed_experts: .*{message}"):
        read_routes(text, "http://a", 5, MODEL)


def recipe(folder, python, **changes):
    rollout = {"engine": "vllm", "vllm_python": str(python), "server_timeout_s": 60.0, **changes}
    return load(write_recipe(folder, rollout=rollout))


def program(folder, text):
    path = folder / "python"
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


def test_a_server_that_does_not_start(tmp_path):
    python = program(tmp_path, "echo one; echo two; echo three; echo four >&2; exit 3")
    with pytest.raises(RunFailed, match=r"status 3; .*0.log are: two \| three \| four$"):
        LocalServers(recipe(tmp_path, python), tmp_path, tmp_path / "servers", tmp_path / "weights")


def test_the_error_of_a_server_is_found_in_its_log(tmp_path):
    said = ("a WARNING ValueError: harmless", "b RuntimeError: why", "c DeadError: of b", "leaked")
    python = program(tmp_path, "\n".join(f"echo '{line}'" for line in said) + "\nexit 3")
    with pytest.raises(RunFailed, match=r"status 3; the first error in .*0.log is: b .*: why$"):
        LocalServers(recipe(tmp_path, python), tmp_path, tmp_path / "servers", tmp_path / "weights")


def test_a_server_that_is_not_up_in_time_is_ended(tmp_path, monkeypatch):
    python = program(tmp_path, "echo $$ > pid; exec sleep 100")
    config = recipe(tmp_path, python, server_timeout_s=1.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed, match=r"within rollout\.server_timeout_s 1 s, got none yet"):
        LocalServers(config, tmp_path, tmp_path / "servers", tmp_path / "weights")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_python_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"rollout\.vllm_python: expected the Python of an"):
        LocalServers(
            recipe(tmp_path, tmp_path / "no"), tmp_path, tmp_path / "servers", tmp_path / "weights"
        )


def visible_to(servers, folder, monkeypatch, *, gpus=8, **rollout):
    """What servers that do not come up were started with, by what they see of the GPUs."""
    said = folder / "said"
    words = "$CUDA_VISIBLE_DEVICES|$PYTORCH_ALLOC_CONF$CUDA_DEVICE_MAX_CONNECTIONS$RANK|$@"
    python = program(folder, f'echo "{words}" >> {said}; exit 3')
    config = recipe(folder, python, **rollout)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(servers_module.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(LocalServers, "_wait", lambda self, timeout_s: None)
    with LocalServers(config, folder, folder / "servers", folder / "weights") as local:
        assert len(local.urls) == servers
        for process in local._processes:
            assert process.guard.wait() == 3
    lines = sorted(said.read_text().splitlines())
    assert all(line.split("|")[1] == "" for line in lines), "the trainer's own settings"
    return {line.split("|")[0]: line.split("|")[2] for line in lines}


def test_servers_on_the_gpus_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,2,3")
    found = visible_to(
        2, tmp_path, monkeypatch, gpus=4, colocate=True, server_tensor_parallel_size=2
    )
    assert sorted(found) == ["2,3", "4,7"]
    for words in found.values():
        assert "--tensor-parallel-size 2" in words
        assert "--enable-sleep-mode --gpu-memory-utilization 0.6" in words


def test_servers_beside_the_trainer_have_the_gpus_that_it_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = visible_to(2, tmp_path, monkeypatch, server_tensor_parallel_size=2)
    assert sorted(found) == ["4,5", "6,7"]
    assert not any("--enable-sleep-mode" in words for words in found.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colocate": True, "num_servers": 2}, "at most 1 servers .* 1 GPUs .* the trainer, got 2"),
        ({"colocate": True, "server_tensor_parallel_size": 2}, "at most 0 servers .* got 1"),
        ({}, "at most 0 servers .* the 0 GPUs of this node that no process trains on, got 1"),
        ({"colocate": True, "min_servers": 2}, "at most 1, as many as this node starts, got 2"),
    ],
)
def test_more_servers_than_gpus(settings, message, tmp_path, monkeypatch):
    config = recipe(tmp_path, program(tmp_path, "exit 3"), **settings)
    monkeypatch.setattr(servers_module.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=rf"^rollout\.(num|min)_servers: expected {message}"):
        LocalServers(config, tmp_path, tmp_path / "servers", tmp_path / "weights")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_servers_end_when_the_trainer_is_killed(tmp_path):
    python = program(tmp_path, "echo $$ > pid; sleep 100 & wait")
    script = f"""
        from pathlib import Path
        from sapo_megatron.recipe.load import load
        from sapo_megatron.rollout.vllm import servers
        here = Path({str(tmp_path)!r})
        servers.LocalServers(load(here / "recipe.yaml"), here, here / "servers", here / "weights")
    """
    recipe(tmp_path, python)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"in the memory of the node")
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text().strip())
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_until(lambda: not alive(int(pid.read_text())))
    wait_until(lambda: not (tmp_path / "weights").exists())


def test_a_server_that_does_not_end_when_asked_is_killed(tmp_path):
    command = program(tmp_path, "trap '' TERM; echo $$ > pid; sleep 100; sleep 100")
    script = f"""
        import sys
        from sapo_megatron.rollout.vllm import guard
        guard.GRACE_S = 0.2
        sys.argv = ["guard", {str(tmp_path / "weights")!r}, {str(command)!r}]
        sys.exit(guard.main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, cwd=tmp_path
    )
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text().strip())
    process.stdin.close()
    process.wait(60)
    assert not alive(int(pid.read_text()))


def wait_until(holds):
    until = time.monotonic() + 60.0
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"servers": ["http://a:1"]}, "rollout.servers: expected none with .* in_process"),
        ({"vllm_python": "python"}, "rollout.vllm_python: expected none with .* in_process"),
        ({"engine": "vllm"}, "rollout.servers: expected either .* got neither"),
        (
            {"engine": "vllm", "servers": ["http://a:1"], "vllm_python": "python"},
            "rollout.servers: expected either .* got both",
        ),
        ({"engine": "vllm", "servers": ["node7:8000"]}, "expected URLs .* got 'node7:8000'"),
        ({"engine": "vllm", "servers": ["http://a/v1"]}, "expected URLs .* got 'http://a/v1'"),
        ({"engine": "vllm", "servers": ["http://a", "http://a"]}, "got http://a twice"),
        ({"engine": "vllm", "vllm_python": "python", "num_servers": 0}, "rollout.num_servers"),
        ({"num_servers": 2}, "num_servers: expected none with rollout.vllm_python none"),
        (
            {"engine": "vllm", "vllm_python": "python", "colocate_offload": "weights"},
            "colocate_offload: expected gradients with rollout.colocate false",
        ),
        (
            {"engine": "vllm", "servers": ["http://a", "http://b"], "min_servers": 3},
            "min_servers: expected at most 2, the number of rollout.servers, got 3",
        ),
        ({"weight_transfer": "nccl"}, "rollout.weight_transfer: expected folder .* in_process"),
        (
            {"engine": "vllm", "vllm_python": "python", "weight_transfer": "nccl"},
            "rollout.weight_transfer: expected folder with rollout.vllm_python",
        ),
        (
            {
                "engine": "vllm",
                "servers": ["http://a"],
                "colocate": True,
                "weight_transfer": "nccl",
            },
            "rollout.weight_transfer: expected folder with rollout.colocate",
        ),
        ({"colocate": True}, "rollout.engine: expected vllm with .*colocate true.* in_process"),
        (
            {"async_steps": 1, "on_new_weights": "continue"},
            "rollout.engine: expected vllm with .*on_new_weights continue.* in_process",
        ),
        (
            {"engine": "vllm", "servers": ["http://a"], "colocate": True, "async_steps": 1},
            "rollout.async_steps: expected 0 with rollout.colocate",
        ),
    ],
)
def test_recipes_that_are_wrong(tmp_path, rollout, message):
    with pytest.raises(UserError, match=message):
        load(write_recipe(tmp_path, rollout=rollout))
