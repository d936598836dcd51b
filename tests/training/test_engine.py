"""Servers that follow the policy, against servers without a model; tests/on_vllm has real ones."""

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.hf.folder import Listed
from sapo_megatron.recipe.schema import RolloutConfig
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.vllm import transfer
from sapo_megatron.rollout.vllm.engine import VllmEngine
from sapo_megatron.rollout.vllm.transfer import Transfer
from sapo_megatron.sample import Sample
from sapo_megatron.training.engine import Following
from sapo_megatron.training.handover import OverFolder, OverNccl
from tests.support import fakevllm
from tests.support.fakevllm import EOS, FakeVllm, logprob
from tests.support.gloo import run_ranks
from tests.support.tiny import ARCH

pytestmark = pytest.mark.usefixtures("world")
PROBE = [
    Sample(
        uid=uid,
        prompt_tokens=(5, 9, 2)[uid:],
        response_tokens=[7, 8],
        rollout_logprobs=[],
        truncated=True,
    )
    for uid in range(2)
]
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=6, stop_ids=(EOS,), seed=3)
REQUESTS = [Request(uid=uid, prompt_tokens=(5, 9, 2 + uid)) for uid in range(4)]
AWAKE = ["load", "forget", "probe", "sample"]
ROUND = ["wake weights", "load", "wake kv_cache", *AWAKE[1:], "sleep"]


@pytest.fixture
def server():
    with FakeVllm() as one:
        one.description["sleep_mode"] = True
        yield one


WEIGHTS = [("a", torch.ones(2, 3)), ("b", torch.zeros(4, dtype=torch.bfloat16))]
LISTING = [Listed(name, tensor.dtype, tensor.shape) for name, tensor in WEIGHTS]


class Sender:
    """Does what vLLM's sender does, but for NCCL."""

    def __init__(self, group, client, source):
        self.group, self.client, self.source = group, client, source
        self.sent = []
        self.aborted = False
        client.init_weight_transfer_engine({"rank_offset": 1, **group})

    def send_weights(self):
        listing = self.source.metadata()
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as executor:
            update = {"names": [listed.name for listed in listing]}
            future = executor.submit(self.client.update_weights, update)
            self.sent.append([Listed(n, t.dtype, t.shape) for n, t in self.source])
            assert self.sent[-1] == listing
            wait([future])
            if self.aborted:
                raise RuntimeError("NCCL error: unhandled\nsystem error")
        self.client.finish_weight_update()

    def shutdown(self):
        self.aborted = True


@pytest.fixture
def sender(monkeypatch):
    """Stands in for vLLM's, which needs GPUs."""
    made = []

    def trainer_init(group, *, client, source):
        made.append(Sender(group, client, source))
        return made[-1]

    monkeypatch.setattr(transfer, "_vllm", lambda: (dict, trainer_init))
    return made


class FakeWeights:
    """Weights that are written and streamed, and never change."""

    def save(self, folder):
        folder.mkdir(exist_ok=True)

    def listing(self):
        return LISTING

    def stream(self):
        return iter(WEIGHTS)


OPEN = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def over_nccl(folder, *servers, **changes):
    for server in servers:
        server.description["weight_transfer"] = "nccl"
    return following(folder, *servers, weight_transfer="nccl", **changes)


@contextlib.contextmanager
def aside(what):
    """Stands in for a policy that has a GPU to leave."""
    assert what == "gradients"
    yield lambda: None


def following(folder, *servers, timeout_s=60.0, **changes):
    """A policy that never trains unless told to, and servers that follow it."""
    policy = SimpleNamespace(
        updates=0,
        groups=SimpleNamespace(world=dist.group.WORLD),
        model=SimpleNamespace(weights=FakeWeights()),
        logprobs=lambda samples, cut: [logprob(t) for s in samples for t in s.response_tokens],
        aside=aside,
    )
    config = RolloutConfig(
        engine="vllm",
        servers=tuple(s.url for s in servers),
        max_prompt_length=16,
        max_response_length=6,
        server_timeout_s=timeout_s,
        **changes,
    )
    engine = VllmEngine(config.servers, config, parse_architecture(ARCH))
    OPEN.append(engine)
    engine.check()
    handover = OverFolder(policy, engine, folder / "weights")
    if config.weight_transfer == "nccl":
        transfer = Transfer(config.servers, LISTING, timeout_s=timeout_s)
        handover = OverNccl(policy, engine, transfer)
    return policy, Following(
        policy,
        engine,
        handover,
        probe=PROBE,
        tolerance=1e-3,
        cut=None,
        offload=config.colocate_offload if config.colocate else None,
    )


def rollout(engine):
    policy = engine._policy
    with engine.serving(version=policy.updates, record=True) as metrics:
        found = []
        done = engine.generate(REQUESTS, PARAMS, found.append).result(timeout=200)
    assert sorted(s.uid for s in found) == [r.uid for r in REQUESTS]
    assert {v for s in found for v in s.versions} == {policy.updates}
    assert done.values()["rollout/redrawn"] == 0
    return metrics.values()


def calls(server):
    """What the server was asked to do, one after the other and each once."""
    found = []
    for path, body in server.calls:
        name = {"/sleep?level=2": "sleep", "/reset_prefix_cache": "forget"}
        name |= {f"/wake_up?tags={what}": f"wake {what}" for what in ("weights", "kv_cache")}
        name |= {path: path[1:].split("_weight")[0] for path in fakevllm.TRANSFER}
        if body.get("method") == "sapo_load":
            found.append("load")
        elif body.get("method") == "sapo_label":
            found.append("part" if body["args"][0].startswith("part of") else "label")
        elif "prompt_logprobs" in body:
            found += [] if found[-1] == "probe" else ["probe"]
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
    assert calls(server) == AWAKE * 2  # the same weights twice


def test_colocated_servers_sleep_after_every_rollout_and_get_weights_before(tmp_path, server):
    policy, engine = following(tmp_path, server, colocate=True)
    for _ in range(2):  # an evaluation, whose weights are the same
        assert "rollout/probe_diff" in rollout(engine)
        assert server.asleep
    policy.updates += 1
    rollout(engine)
    assert calls(server) == ROUND * 3


def test_a_colocated_server_that_is_back_is_woken_before_it_gets_weights(tmp_path, server):
    with FakeVllm() as away:
        away.description["sleep_mode"] = True
        _, engine = following(tmp_path, server, away, colocate=True)
        rollout(engine)
    with engine.serving(version=0, record=True), FakeVllm(away.port) as back:
        server.fault = fakevllm.behind(back)
        back.description["sleep_mode"] = True
        back.asleep = {"weights", "kv_cache"}
        engine.generate(REQUESTS * 4, PARAMS, lambda sample: None).result(timeout=200)
        assert calls(back)[:5] == ROUND[:5]
        assert back.asleep
    assert server.asleep


def test_a_server_on_a_cpu_that_takes_prompts_in_pieces(tmp_path, server):
    server.description["chunked_prefill"] = True
    with pytest.raises(UserError, match=f"^{server.url}: .* --no-enable-chunked-prefill$"):
        following(tmp_path, server)
    server.description["on_cpu"] = False
    following(tmp_path, server)


def test_a_colocated_server_that_cannot_sleep(tmp_path, server):
    server.description["sleep_mode"] = False
    with pytest.raises(UserError, match=f"^{server.url}: sleep_mode: .* --enable-sleep-mode$"):
        following(tmp_path, server, colocate=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"detail": "Not Found"}), "got HTTP 404; .* --enable-sleep-mode"),
        ((500, b"used more memory"), "got HTTP 500: used more memory; .* --enable-sleep-mode"),
        (fakevllm.HANG_UP, "got RemoteProtocolError: .* --enable-sleep-mode"),
    ],
)
def test_a_colocated_server_that_does_not_sleep_ends_the_run(tmp_path, server, answer, message):
    _, engine = following(tmp_path, server, colocate=True)
    server.fault = lambda path, body, own: answer if "/sleep" in path else own()
    with pytest.raises(RunFailed, match=f"^{server.url}: /sleep: expected .* {message}"):
        rollout(engine)


def test_what_ends_a_rollout_is_told_and_not_that_servers_cannot_sleep_then(tmp_path, server):
    _, engine = following(tmp_path, server, colocate=True)
    answers = {"/v1/completions": (400, b"no such token"), "/sleep?level=2": (500, b"dead")}
    server.fault = lambda path, body, own: (
        answers[path] if path in answers and "prompt_logprobs" not in body else own()
    )
    with pytest.raises(RunFailed, match=r"/v1/completions: .* no such token"):
        rollout(engine)
    assert "sleep" in calls(server)  # requests that were on their way may come behind it


def test_a_colocated_server_that_does_not_wake_ends_the_run(tmp_path, server):
    _, engine = following(tmp_path, server, colocate=True)
    server.fault = lambda path, body, own: (500, b"CUDA OOM") if "/wake_up" in path else own()
    with pytest.raises(RunFailed, match=r"got HTTP 500: CUDA OOM; .* --gpu-memory-utilization"):
        rollout(engine)


@pytest.mark.parametrize(
    ("first", "good", "bad"),
    [
        (0.0, 0.3e-3, 0.4e-3),  # rounding that is next to nothing may grow to a third
        (0.2e-3, 0.5e-3, 0.7e-3),
        (0.9e-3, 0.9e-3, 1.1e-3),  # never beyond the tolerance
    ],
)
@pytest.mark.parametrize("how", [following, over_nccl])
def test_later_loads_are_compared_with_the_first(
    tmp_path, server, sender, monkeypatch, how, first, good, bad
):
    policy, engine = how(tmp_path, server)
    exact = policy.logprobs

    def rollout_off_by(shift):
        policy.logprobs = lambda samples, cut: [x + shift for x in exact(samples, cut)]
        policy.updates += 1
        return rollout(engine)["rollout/probe_diff"]

    for shift in (first, good, 0.0, good):
        assert rollout_off_by(shift) == pytest.approx(shift)
    with pytest.raises(RunFailed, match=f"^{server.url}: .* got a difference of {bad:.3g}; "):
        rollout_off_by(bad)
    if bad < 1e-3:  # a run that goes on from here has a first load of its own
        _, engine = how(tmp_path, server)
        engine._policy = policy
        assert rollout_off_by(bad) == pytest.approx(bad)


SENT = ["part", "start", "update", "finish", "label", "forget", "probe", "sample"]


def test_weights_over_nccl(tmp_path, server, sender):
    with FakeVllm() as other:
        policy, engine = over_nccl(tmp_path, server, other)
        assert rollout(engine)["rollout/probe_diff"] == pytest.approx(0, abs=1e-9)
        assert rollout(engine) == {}
        policy.updates += 1
        rollout(engine)
        assert calls(server) == calls(other) == ["init", *SENT * 2]
        first, second = (
            next(body["init_info"] for _, body in each.calls if "init_info" in body)
            for each in (server, other)
        )
    assert sender[0].sent == [LISTING, LISTING]
    assert (first["rank_offset"], second["rank_offset"]) == (1, 3)
    assert (first["world_size"], first["rank"]) == (5, 0)
    assert first["master_address"] == "127.0.0.1"
    assert not (tmp_path / "weights").exists()


def test_a_server_that_does_not_take_weights_over_nccl_ends_the_run(tmp_path, server, sender):
    _, engine = over_nccl(tmp_path, server)
    server.fault = lambda path, body, own: (500, b"no") if path == "/update_weights" else own()
    with pytest.raises(RunFailed, match=f"^{server.url}: /update_weights: .* got HTTP 500: no; "):
        rollout(engine)
    assert sender[0].aborted


def test_a_server_that_is_away_when_weights_are_sent_ends_the_run(tmp_path, server, sender):
    with FakeVllm() as away:
        _, engine = over_nccl(tmp_path, server, away)
    with pytest.raises(RunFailed, match=f"^{away.url}: expected every server .* got ConnectError"):
        rollout(engine)


def test_a_server_that_is_restarted_after_weights_were_sent_gets_no_work(tmp_path, server, sender):
    with FakeVllm() as other:
        _, engine = over_nccl(tmp_path, server, other, timeout_s=1.5)
        rollout(engine)
        other.weights = "initial"
        before = len(other.prompts())
        server.fault = fakevllm.after(0.1)
        rollout(engine)
        assert len(other.prompts()) == before
        server.weights = "initial"
        with pytest.raises(RunFailed, match=f"{server.url}: away for 1.5 s: it has not got the"):
            rollout(engine)


def test_a_server_that_takes_no_weights_over_nccl(tmp_path, server, sender):
    with pytest.raises(UserError, match=f'^{server.url}: weight_transfer: .* \'{{"backend": '):
        following(tmp_path, server, weight_transfer="nccl")


def test_weights_over_nccl_need_vllm_beside_megatron(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"rollout\.weight_transfer: expected vLLM beside Megatron"):
        Transfer([server.url], LISTING, timeout_s=1.0)


def failing_on_two_ranks(url):
    """Where the second rank, too, has to bring its part of every tensor."""

    def stream():
        for name, tensor in WEIGHTS:
            dist.broadcast(tensor.clone(), src=1)
            if dist.get_rank() == 0:
                yield name, tensor

    def receive(send, probe, version):
        raise RunFailed(f"{url}: gone")

    first = dist.get_rank() == 0
    policy = SimpleNamespace(
        updates=0,
        groups=SimpleNamespace(world=dist.group.WORLD),
        model=SimpleNamespace(weights=SimpleNamespace(stream=stream)),
        logprobs=lambda samples, cut: (),
    )
    servers = SimpleNamespace(receive=receive) if first else None
    transfer = SimpleNamespace(send=list) if first else None
    handover = OverNccl(policy, servers, transfer)
    engine = Following(policy, servers, handover, probe=PROBE, tolerance=1e-3, cut=None)
    try:
        with engine.serving(version=0, record=True):
            return None
    except RunFailed as error:
        return str(error)


def test_all_ranks_end_where_weights_cannot_be_sent():
    assert run_ranks(2, failing_on_two_ranks, "http://a") == ["rank 0: http://a: gone"] * 2
