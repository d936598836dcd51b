"""What a process measures of its device, that another device should measure too.

A measurement is a function of a ``Setting`` to a ``Result``.
"""

import dataclasses
import platform
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from sapo_megatron.commands.doctor.packages import version
from sapo_megatron.commands.qualify.models import FAMILIES, VOCABULARY, sequences
from sapo_megatron.commands.qualify.policies import Dtype, Result, Setting, opened
from sapo_megatron.objective.logprob import linear_logprobs, vocab_parallel_logprobs
from sapo_megatron.policy import checkpoint
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.spec import FUSED_GRADIENTS
from sapo_megatron.rollout.generate import Request, SamplingParams, generate, sample, uniform
from sapo_megatron.runs.state import RunState

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
MOE = "qwen3-moe"
LAYOUTS = {
    "tp 2": {"tensor_model_parallel_size": 2},
    "cp 2": {"context_parallel_size": 2},
    "ep 2": {"expert_model_parallel_size": 2},
}
"""Layouts of two ranks; with tp 1 and cp 1, ep 2 is data parallel as well."""


def machine(setting: Setting) -> Result:
    """Versions, and what is there beside torch."""
    found: Result = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("megatron-core", "transformer-engine"):
        found[name] = version(name) or "none"
    found["gradient fusion"] = "Apex's" if find_spec(FUSED_GRADIENTS) else "none"
    found["capability"] = 0.0
    found["device"] = "cpu"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["device"], found["capability"] = torch.cuda.get_device_name(), major + minor / 10
    if setting.layers == "transformer_engine":
        import transformer_engine.pytorch  # noqa: F401  (whether it fits this torch)
    return found


def logprob_node(setting: Setting) -> Result:
    """Log-probs, entropies and the gradient to the logits; the reference in fp64, by softmax."""
    rows, vocabulary = (64, 151936) if setting.full else (16, 5003)
    logits, targets, factors = _logits(rows, vocabulary)
    found: Result = {}
    for dtype in DTYPES:
        x = logits.to(getattr(torch, dtype))
        if setting.reference:
            x = x.double().requires_grad_()
            values = _exact(x, targets)
            (gradient,) = torch.autograd.grad((values * factors.double()).sum(), x)
            spread = 0.0
        else:
            tiles = 64 if setting.full and setting.device.type == "cuda" else 1
            x = x.to(setting.device).repeat(tiles, 1).requires_grad_()
            logprob, entropy = vocab_parallel_logprobs(
                x, targets.to(x.device).repeat(tiles), with_entropy=True
            )
            assert entropy is not None, "asked for"
            values = torch.stack([logprob, entropy])
            weights = factors.to(x.device).repeat(1, tiles)
            (gradient,) = torch.autograd.grad((values * weights).sum(), x)
            parts = gradient.view(tiles, rows, -1)
            # The same rows in other chunks, relative to the largest number.
            spread = max(float((part - parts[0]).abs().max()) for part in parts)
            spread /= float(parts[0].abs().max())
            gradient, values = parts[0], values[:, :rows]
        found[f"{dtype} values"] = values.detach().cpu()
        found[f"{dtype} gradient"] = gradient.float().cpu()
        found[f"{dtype} spread"] = spread
    return found


def fused_node(setting: Setting) -> Result:
    """The same from hidden states and output weight, with the gradients to both."""
    rows, vocabulary, width = (256, 151936, 64) if setting.full else (16, 5003, 32)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    _, targets, factors = _logits(rows, vocabulary, empty=True)
    found: Result = {}
    for dtype in DTYPES:
        x, w = (t.to(getattr(torch, dtype)) for t in (hidden, weight))
        if setting.reference:
            x, w = x.double().requires_grad_(), w.double().requires_grad_()
            values = _exact(x @ w.t(), targets)
        else:
            x, w = (t.to(setting.device).requires_grad_() for t in (x, w))
            logprob, entropy = linear_logprobs(x, w, targets.to(x.device), with_entropy=True)
            assert entropy is not None, "asked for"
            values = torch.stack([logprob, entropy])
        total = (values * factors.to(x.device, values.dtype)).sum()
        gradients = torch.autograd.grad(total, (x, w))
        found[f"{dtype} values"] = values.detach().cpu()
        found[f"{dtype} gradient"] = torch.cat([g.float().flatten().cpu() for g in gradients])
        found[f"{dtype} spread"] = 0.0
    return found


def _logits(rows: int, vocabulary: int, *, empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [rows, vocabulary], targets [rows], and what to weigh the results with [2, rows]."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    factors = torch.randn(2, rows, generator=generator)
    shape = (0, 0) if empty else (rows, vocabulary)
    return 3 * torch.randn(shape, generator=generator), targets, factors


def _exact(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs and entropies [2, rows] by softmax."""
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack([chosen, -(logp.exp() * logp).sum(-1)])


def sampling(setting: Setting) -> Result:
    """Noise, and tokens drawn with it from fp64 logits."""
    rows, device = 512, setting.device
    uids, positions = torch.arange(rows), torch.arange(rows) * 7919
    logits, _, _ = _logits(rows, 1009)
    noise = uniform(3, uids.to(device), positions.to(device))
    found: Result = {"noise": noise.cpu()}
    for top_p in (1.0, 0.9):
        token, logprob = sample(logits.double().to(device), noise, 1.3, top_p)
        found[f"tokens {top_p}"], found[f"logprobs {top_p}"] = token.cpu(), logprob.cpu()
    return found


def families(setting: Setting) -> Result:
    """Log-probs and gradients of every family; in bf16 with experts given."""
    found: Result = {}
    for dtype in DTYPES:
        for family in FAMILIES:
            with opened(setting, family, dtype) as tiny:
                samples = tiny.samples(given=dtype == "bfloat16")
                found[f"{dtype} {family} logprobs"] = tiny.logprobs(samples)
                found[f"{dtype} {family} gradient"] = tiny.gradients(samples)
    return found


def greedy(setting: Setting) -> Result:
    """What every family's fp32 model answers at temperature 0, token by token."""
    length = 16
    params = SamplingParams(
        temperature=0.0, top_p=1.0, max_new_tokens=length, stop_ids=(0,), seed=0
    )
    requests = [Request(uid=s.uid, prompt_tokens=s.prompt_tokens) for s in sequences()]
    found: Result = {}
    for family in FAMILIES:
        with opened(setting, family, "float32") as tiny:
            decoder = MegatronDecoder(tiny.policy.model)
            with decoder.generating():
                answers = generate(decoder, requests, params, batch_size=4)
            padding = [-1] * length
            rows = [[*answer.response_tokens, *padding][:length] for answer in answers]
            found[family] = torch.tensor(rows)
    return found


def _resume(setting: Setting, *cases: tuple[Dtype, float]) -> Result:
    """Two updates at once, and one, a checkpoint, a resume and one: how far they are apart.

    ``cases``: dtype and share of Adam in host memory.
    """
    found: Result = {}
    for dtype, offload in cases:
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            with opened(setting, MOE, dtype, offload=offload) as tiny:
                samples = tiny.samples(given=True)
                tiny.step(samples)
                first = tiny.weights()
                saved = checkpoint.save(tiny.policy, Path(folder), _state(), keep=1)
                tiny.step(samples)
                straight = tiny.weights()
            with opened(setting, MOE, dtype, offload=offload) as tiny:
                checkpoint.load(tiny.policy, saved, _state())
                tiny.step(samples)
                resumed = tiny.weights()
        name = f"{dtype}, {offload:g} of Adam in host memory"
        found[name] = float((straight - resumed).abs().max())
        found[f"{name}: moved"] = float((straight - first).abs().max())
    return found


def resume(setting: Setting) -> Result:
    """A run in two pieces against a whole one, in fp32 and bf16."""
    return _resume(setting, ("float32", 0.0), ("bfloat16", 0.0))


def resume_offloaded(setting: Setting) -> Result:
    """The same with Adam in host memory, whole and half."""
    return _resume(setting, ("bfloat16", 1.0), ("bfloat16", 0.5))


def offloaded(setting: Setting) -> Result:
    """One update in bf16 with Adam on the GPU and in host memory; their distance in bf16 ulp."""
    found = []
    for offload in (0.0, 1.0):
        with opened(setting, MOE, "bfloat16", offload=offload) as tiny:
            tiny.step(tiny.samples(given=True))
            found.append(tiny.weights())
    ulp = torch.exp2(torch.frexp(found[0]).exponent.float() - 8)
    return {"ulp": float(((found[0] - found[1]).abs() / ulp).max())}


def _state() -> RunState:
    return RunState(
        step=1, start=".", model={}, recipe={}, data="", cursor={}, eval={}, wall_s=0.0,
        world_size=dist.get_world_size(), updates=1,
    )  # fmt: skip


def neighbours(setting: Setting) -> Result:
    """Log-probs of a sequence beside one neighbour in its packed row, and beside another."""
    found: Result = {}
    for dtype in DTYPES:
        with opened(setting, "qwen3", dtype) as tiny:
            first, second = tiny.samples(given=False)[:2]
            other = dataclasses.replace(
                first,
                prompt_tokens=tuple((t + 1) % VOCABULARY for t in first.prompt_tokens),
                response_tokens=[(t + 2) % VOCABULARY for t in first.response_tokens],
            )
            length = len(first.response_tokens)
            before, after = (tiny.logprobs([x, second]) for x in (first, other))
        found[f"{dtype} own"] = float((before - after)[length:].abs().max())
        found[f"{dtype} neighbour"] = float((before - after)[:length].abs().max())
    return found


def replay(setting: Setting) -> Result:
    """A pass that records its experts, one that replays them, and one that replays others."""
    with opened(setting, MOE, "float32") as tiny:
        model, batches = tiny.policy.model, tiny.batches(tiny.samples(given=False))
        recorded = model.forward(batches, record=True)
        routes = [forward.routes for forward in recorded]
        experts = [route.experts for route in routes if route]
        again = model.forward(batches, replay=experts)
        rotated = [(e + 1) % model.routers.num_experts for e in experts]
        others = model.forward(batches, replay=rotated)
        layers = len(model.routers.moe_layers)

    def distance(other: list) -> float:
        pairs = zip(recorded, other, strict=True)
        return max(float((a.logprob - b.logprob).abs().max()) for a, b in pairs)

    whole = all(
        e.shape[:2] == (len(batch.tokens), layers)
        for e, batch in zip(experts, batches, strict=True)
    )
    return {
        "recorded": float(whole and len(experts) == len(batches)),
        "same": distance(again),
        "others": distance(others),
    }


def recompute(setting: Setting) -> Result:
    """Relative distance of gradients with every layer computed again, and without."""
    whole = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    found = []
    for options in ({}, whole):
        with opened(setting, MOE, "float32", **options) as tiny:
            found.append(tiny.gradients(tiny.samples(given=True)))
    return {"distance": float((found[0] - found[1]).norm() / found[0].norm())}


def export(setting: Setting) -> Result:
    """A folder that is written, against the weights that were read, and transformers on it."""
    found: Result = {}
    for family in FAMILIES:
        with opened(setting, family, "float32") as tiny, tempfile.TemporaryDirectory() as folder:
            samples = tiny.samples(given=False)
            ours, out = tiny.logprobs(samples), Path(folder) / "out"
            tiny.policy.model.weights.save(out)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        rows = []
        for s in samples:
            ids = torch.tensor([[*s.prompt_tokens, *s.response_tokens]])
            with torch.no_grad():
                logits = theirs(ids).logits[0, len(s.prompt_tokens) - 1 : -1].double()
            rows.append(_exact(logits, torch.tensor(s.response_tokens))[0])
        found[family] = float((torch.cat(rows) - ours).abs().max())
    return found


def layouts(setting: Setting) -> Result:
    """Log-probs and gradients of two ranks, by layout: a model with experts, experts given."""
    found: Result = {}
    dtype: Dtype = "bfloat16" if setting.layers == "transformer_engine" else "float32"
    for name, layout in LAYOUTS.items():
        with opened(setting, MOE, dtype, **layout) as tiny:
            samples = tiny.samples(given=True)
            found[f"{name} logprobs"] = tiny.logprobs(samples)
            found[f"{name} gradient"] = tiny.gradients(samples)
    return found


def one_rank(setting: Setting) -> Result:
    """What :func:`layouts` should find, by dtype."""
    found: Result = {}
    for dtype in DTYPES:
        with opened(setting, MOE, dtype) as tiny:
            samples = tiny.samples(given=True)
            found[f"{dtype} logprobs"] = tiny.logprobs(samples)
            found[f"{dtype} gradient"] = tiny.gradients(samples)
    return found
