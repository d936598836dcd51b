"""The checks of a GPU machine, the CPU against the CPU: each good as it is, and red under a fault.

The faults are planted where the code that a check is about would have them; only what takes a GPU
is judged on made-up numbers.
"""

import contextlib
import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from sapo_megatron.__main__ import main
from sapo_megatron.commands import qualify
from sapo_megatron.commands.qualify import Machine, Outcome, checks, first_failure, judged
from sapo_megatron.errors import UserError
from tests.support import fakevllm, forked
from tests.support.fakevllm import FakeVllm
from tests.support.gloo import run_worlds

pytestmark = pytest.mark.timeout(600)  # that of a machine that is busy with other things

BY_NAME = {check.name: check for check in checks.CHECKS}
FED = ("update", "prompt", "token")
FAULTS = {
    "a weight": ("A10 families, fp32", "A2 families, bf16"),
    "a softmax": ("A11 log-prob node", "A12 fused log-prob node"),
    "a gradient": ("A11 log-prob node", "A12 fused log-prob node"),
    "noise": ("A13 sampling",),
    "a nucleus": ("A13 sampling",),
    "a decoder": ("A14 greedy answers",),
    "an export": ("A15 export, transformers",),
    "one sequence for all": ("A3 neighbours in a row",),
    "no replay": ("A4 replayed experts",),
    "a recomputation": ("A5 recomputed layers",),
    "old log-probs": ("A6 whole runs",),
    "Adam's steps": ("A7 resume",),
}
"""What is broken, and the checks that have to see it."""
SEEN = [(fault, name) for fault, names in FAULTS.items() for name in names]


def _scaled(function, factor):
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


def _plant(fault):
    """A patch that breaks something, as a context manager."""
    from megatron.core.tensor_parallel.random import CheckpointFunction

    from sapo_megatron.commands.qualify import measure
    from sapo_megatron.objective import logprob
    from sapo_megatron.policy import checkpoint, decode, model, weights
    from sapo_megatron.rollout import generate

    def perturbed(load):
        def loaded(self):
            load(self)
            with torch.no_grad():
                next(iter(self._chunks[0].decoder.layers[0].mlp.parameters())).mul_(1.05)

        return loaded

    def written(write):
        def changed(tensors, folder, prefix):
            return write(((name, tensor * 1.001) for name, tensor in tensors), folder, prefix)

        return changed

    def as_one(batch):
        ends = batch.cu_seqlens[[0, -1]]
        length = int(ends[-1])
        return whole(dataclasses.replace(batch, cu_seqlens=ends, max_seqlen=length))

    def without_replay(self, batches, *, replay=None, record=False):
        return forward(self, batches, record=record)

    def shifted(self, batches, **options):
        found = forward(self, batches, **options)
        return [dataclasses.replace(f, logprob=f.logprob + 1e-3) for f in found]

    def half_backward(ctx, *grads):
        return tuple(g * 1.01 if torch.is_tensor(g) else g for g in backward(ctx, *grads))

    whole, forward = model._packed_seq_params, model.Model.forward
    backward = CheckpointFunction.backward
    patches = {
        "a weight": (
            weights.HuggingFaceWeights,
            "load",
            perturbed(weights.HuggingFaceWeights.load),
        ),
        "a softmax": (logprob, "_bits", _scaled(logprob._bits, 1.001)),
        "a gradient": (logprob, "_gradient_factors", _scaled(logprob._gradient_factors, 1.02)),
        "noise": (measure, "uniform", _scaled(generate.uniform, 1 - 2.0**-50)),
        "a nucleus": (generate, "nucleus", lambda probs, top_p: probs),
        "a decoder": (
            decode.MegatronDecoder,
            "logits",
            _scaled(decode.MegatronDecoder.logits, -1.0),
        ),
        "an export": (weights, "_write", written(weights._write)),
        "one sequence for all": (model, "_packed_seq_params", as_one),
        "no replay": (model.Model, "forward", without_replay),
        "a recomputation": (CheckpointFunction, "backward", staticmethod(half_backward)),
        "old log-probs": (model.Model, "forward", shifted),
        "Adam's steps": (checkpoint, "_restore_steps", lambda policy: None),
    }
    return mock.patch.object(*patches[fault])


def _verdicts(folder):
    """By check without a GPU, and by fault and check: (what it said, good or not).

    Of two families: here both sides of a comparison compute alike, whatever the model is.
    """
    from sapo_megatron.commands.qualify import measure

    two = {name: measure.FAMILIES[name] for name in ("qwen3-moe", "deepseek-v3")}
    with mock.patch.object(measure, "FAMILIES", two):
        return _verdicts_of_some(folder)


def _verdicts_of_some(folder):
    from sapo_megatron.commands.qualify.policies import Setting
    from sapo_megatron.commands.qualify.worker import run

    setting = Setting(folder=folder, layers="torch", full=False)
    mine = [c for c in checks.CHECKS if c.where == "torch" and not c.gpu]
    exact = dataclasses.replace(setting, reference=True)
    references = run(exact, sorted({c.reference for c in mine if c.reference}), None)
    # On the same CPU the two differ only where the reference is another computation.
    nodes = {"measure.logprob_node", "measure.fused_node"}
    known = {k: v for k, v in references.items() if k not in nodes}
    rest = sorted({c.measurement for c in mine} - known.keys())
    found = {"torch": known | run(setting, rest, None), "reference": references}
    verdicts = {check.name: judged(check, found) for check in mine}
    for fault, names in FAULTS.items():
        measurements = sorted({BY_NAME[name].measurement for name in names})
        with _plant(fault):
            broken = {"torch": run(setting, measurements, None), "reference": references}
        verdicts |= {(fault, name): judged(BY_NAME[name], broken) for name in names}
    return verdicts


def _of_two(folder, fault):
    """What two ranks find, where one may have another weight than the other; and one alone."""
    import torch.distributed as dist

    from sapo_megatron.commands.qualify.policies import Setting
    from sapo_megatron.commands.qualify.worker import run

    rank, size = dist.get_rank(), dist.get_world_size()
    mine = folder / f"{fault}-{size}-{rank}"
    mine.mkdir()
    setting = Setting(folder=mine, layers="torch", full=False)
    name = "measure.layouts" if size == 2 else "measure.one_rank"
    if fault and rank == 1:
        with _plant("a weight"):
            return run(setting, [name], None)
    return run(setting, [name], None)


class _Local:
    """Stands in for servers that are started: one without a model."""

    server: FakeVllm

    def __init__(self, recipe, model, folder, weights):
        assert recipe.rollout.colocate
        self.urls, self.exited = (self.server.url,), lambda url: None
        _Local.up = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        _Local.up = False


def _of_stand_ins(folder):
    """What measurements that take a GPU find where Transformer Engine, vLLM and memory are played.

    With it: when the server was told to sleep and wake, and how often it was loaded.
    """
    from sapo_megatron.commands.qualify import gpu
    from sapo_megatron.commands.qualify.policies import Setting, Tiny

    setting = Setting(folder=folder, layers="torch", full=False)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 30001}
    latent = {**sizes, "max_position_embeddings": 2048}
    dense = {**latent, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    chosen = {"use_flash_attention": False, "use_fused_attention": True}
    engine = SimpleNamespace(_attention_backends=chosen | {"use_unfused_attention": True})
    names = ["transformer_engine", "pytorch", "attention", "dot_product_attention"]
    modules = {".".join(names[:n]): engine for n in range(1, len(names) + 1)}

    def memory():
        return 100 - (_Local.up and (4 if server.asleep else 80)), 100

    def logprobs(self, samples):
        return torch.tensor(
            [fakevllm.logprob(t) + 0.01 for s in samples for t in s.response_tokens]
        )

    patches = [
        mock.patch.multiple(gpu, DENSE=dense, LATENT=latent, LocalServers=_Local),
        mock.patch.object(gpu.shutil, "which", lambda python: python),
        mock.patch.object(torch.cuda, "mem_get_info", memory),
        mock.patch.dict("sys.modules", modules),
    ]
    _Local.up = False
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        found = {"attention": gpu.attention(setting), "twice": gpu.decoding_twice(setting)}
        server = _Local.server = stack.enter_context(FakeVllm())
        served = {"num_layers": 4, "hidden_size": 256, "vocab_size": 101, "max_model_len": 128}
        server.description |= {"sleep_mode": True, **served}
        with mock.patch.object(Tiny, "logprobs", logprobs):
            found["servers"] = gpu.servers(setting)
    said = [path for path, _ in server.calls if path.startswith(("/sleep", "/wake"))]
    return found, said, len(server.folders)


def _job(which, *args):
    return which(*args)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """(verdicts of one rank; results of two, of two of which one is wrong, and of one; of stand-ins
    for what a GPU has)."""
    folder = tmp_path_factory.mktemp("qualify")
    alone = tmp_path_factory.mktemp("alone")
    jobs = [
        (1, (_verdicts, alone)),
        (2, (_of_two, folder, False)),
        (2, (_of_two, folder, True)),
        (1, (_of_two, folder, False)),
        (1, (_of_stand_ins, tmp_path_factory.mktemp("played"))),
    ]
    found = run_worlds(_job, jobs)
    assert not any(isinstance(ranks, str) for ranks in found), found
    return [ranks[0] for ranks in found]


@pytest.mark.parametrize(
    "name", [c.name for c in checks.CHECKS if c.where == "torch" and not c.gpu]
)
def test_a_check_is_good_where_nothing_is_wrong(worlds, name):
    text, ok = worlds[0][name]
    assert ok is (None if name == "A1 machine" else True), text


@pytest.mark.parametrize("seen", SEEN, ids=" - ".join)
def test_a_check_turns_red_under_a_fault(worlds, seen):
    text, ok = worlds[0][seen]
    assert ok is False, text
    assert "Error" not in text  # it is the number that is wrong


def test_every_check_that_runs_here_has_a_fault():
    runs_here = {c.name for c in checks.CHECKS if c.where == "torch" and not c.gpu}
    assert {name for _, name in SEEN} == runs_here - {"A1 machine"}


def test_layouts_of_two_ranks(worlds):
    _, two, wrong, one, _ = worlds
    check = BY_NAME["C1 layouts, torch"]
    text, ok = judged(check, {"torch pair": two, "reference": one})
    assert ok is True, text
    assert judged(check, {"torch pair": wrong, "reference": one})[1] is False


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("A1 machine", {"device": "H100", "capability": 9.0}, {"capability": 7.5}),
        (
            "A16 memory",
            {"policy": 1.005, "policy planned": 1.0, "cache": 1.0, "cache planned": 1.0},
            {"cache": 1.02},
        ),
        ("A8 host waits", {"waits": 109, "at most": 109}, {"waits": 110}),
        ("B10 resume, Adam on the host", {"x": 0.0, "x: moved": 0.1}, {"x": 1e-9}),
        ("B10 resume, Adam on the host", {"x": 0.0, "x: moved": 0.1}, {"x: moved": 0.0}),
        ("B11 Adam on the host", {"ulp": 1.0}, {"ulp": float("nan")}),
        ("B12 attention", {"x update": "fused", "x token": "unfused"}, {"x update": "unfused"}),
        ("B14 vLLM that sleeps", {"first probe": 0.05, "first sleep": 0.1}, {"x probe": 0.06}),
        ("B14 vLLM that sleeps", {"first probe": 0.05, "first sleep": 0.1}, {"x sleep": 0.11}),
    ],
)
def test_what_takes_a_gpu(name, good, bad):
    judge = BY_NAME[name].judge
    assert judge(good, {})[1] is True
    assert judge(good | bad, {})[1] is False


def test_measurements_that_take_a_gpu(worlds):
    found, said, loads = worlds[4]
    kinds = [f"{family} {what}" for family in ("qwen3", "moonlight") for what in FED]
    assert found["attention"] == dict.fromkeys(kinds, "fused")
    assert found["twice"].keys() == {"first pass", "ms a token"}
    assert min(found["twice"].values()) > 0
    probe, kept = pytest.approx(0.01), pytest.approx(4 / 80)
    names = ("first probe", "first sleep", "second probe", "second sleep")
    assert found["servers"] == dict(zip(names, (probe, kept) * 2, strict=True))
    assert said == ["/wake_up?tags=weights", "/wake_up?tags=kv_cache", "/sleep?level=2"] * 2
    assert loads == 2


def test_speeds_do_not_gate():
    for name in ("A9 speed", "A17 log-prob speed", "A18 Adam on the host", "B13 decoding twice"):
        assert BY_NAME[name].judge({"ms": 1e9}, {}) == ("ms 1e+09", None)


@pytest.mark.parametrize(
    ("gpus", "with_te", "runs"),
    [
        (0, False, {"torch", "torch pair"}),
        (0, True, {"torch", "torch pair"}),
        (1, False, {"torch"}),
        (1, True, {"torch", "te"}),
        (2, True, {"torch", "te", "torch pair", "te pair"}),
    ],
)
def test_what_a_machine_can_run(gpus, with_te, runs):
    machine = Machine(gpus=gpus, transformer_engine=with_te)
    assert {c.where for c in checks.CHECKS if not machine.lacks(c)} == runs
    assert all(machine.lacks(c) == "no GPU" for c in checks.CHECKS if c.gpu and not gpus)


def test_a_section_that_cannot_run_is_refused():
    with pytest.raises(UserError, match="got B, for which it has no GPU"):
        qualify.qualify("B", Machine(gpus=0, transformer_engine=True))


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_processes_of_their_own(monkeypatch, fresh):
    """One that measures beside the reference, and a measurement that fails in it."""
    if not fresh:
        monkeypatch.setattr(qualify.subprocess, "run", forked.run)
    sampling = BY_NAME["A13 sampling"]
    broken = dataclasses.replace(sampling, name="broken", measurement="measure.nothing")
    monkeypatch.setattr(qualify, "CHECKS", (sampling, broken))
    monkeypatch.setenv("RANK", "3")  # torchrun's place of this process is not theirs
    first, second = qualify.qualify("A", Machine(gpus=0, transformer_engine=False))
    assert first.ok is True, first
    assert second.ok is False
    assert "has no attribute 'nothing'" in second.got


def test_a_process_that_does_not_come_back(monkeypatch):
    monkeypatch.setattr(qualify, "CHECKS", (BY_NAME["A3 neighbours in a row"],))
    monkeypatch.setattr(qualify, "TIMEOUT_S", 0.01)
    (outcome,) = qualify.qualify("A", Machine(gpus=0, transformer_engine=False))
    assert outcome.ok is False
    assert "no result within 0.01 s" in outcome.got


def test_a_package_that_is_not_there_is_no_failure():
    error = {"error": "not installed: pyarrow"}
    check = BY_NAME["A6 whole runs"]
    found = {"torch": {check.measurement: error}}
    assert judged(check, found) == ("not run: not installed: pyarrow", None)


OUTCOMES = [
    Outcome(check="A1 x", section="A", expected="1", got="1", ok=True),
    Outcome(check="A2 y", section="A", expected="-", got="3 ms", ok=None),
    Outcome(check="A3 z", section="A", expected="0", got="7", ok=False),
    Outcome(check="A4 v", section="A", expected="0", got="8", ok=False),
]


@pytest.fixture
def command(monkeypatch, capsys):
    """``sapo-megatron qualify words`` with these outcomes: (status, stdout, stderr)."""

    def run(outcomes, *words):
        monkeypatch.setattr(qualify, "qualify", lambda section, machine: outcomes)
        status = main(["qualify", *words])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return run


def test_the_first_failure_is_named(command):
    done = command(OUTCOMES)
    assert done.status == 1
    assert "A3 z: expected 0, got 7" in done.err
    marks = [line.split()[0] for line in done.out.splitlines()]
    assert marks == ["ok", "-", "FAIL", "FAIL"]
    assert first_failure(OUTCOMES[:2]) is None
    assert command(OUTCOMES[:2]).status == 0


def test_json(command):
    done = command(OUTCOMES, "--json")
    assert json.loads(done.out) == [dataclasses.asdict(outcome) for outcome in OUTCOMES]
    assert done.status == 1


def test_a_list_of_the_checks(command):
    lines = command([], "--list", "--section", "B").out.splitlines()
    assert [line.split()[0] for line in lines] == ["B"] * 14
