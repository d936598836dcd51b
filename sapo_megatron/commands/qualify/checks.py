"""The checks: what each compares, and what it expects (docs/gpu.md says what it proves).

A judge gets the result of a measurement on this machine's device, and that of the reference, a
process without a GPU; it says what it found, and whether that is good: None for what does not gate.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Result = dict[str, Any]
Verdict = tuple[str, bool | None]
Judge = Callable[[Result, Result], Verdict]
Section = Literal["A", "B", "C"]
Where = Literal["torch", "te", "torch pair", "te pair"]
"""Whose layers, and in how many processes: one, or two with a device each."""


@dataclass(frozen=True)
class Check:
    name: str
    where: Where
    measurement: str
    """``module.function``"""
    judge: Judge
    expected: str
    reference: str = ""
    """The measurement of the reference; empty where there is none to compare with."""

    @property
    def section(self) -> Section:
        return "C" if "pair" in self.where else "A" if self.where == "torch" else "B"

    @property
    def gpu(self) -> bool:
        """Whether it says nothing without a GPU."""
        return self.measurement.startswith("gpu.")


def _distance(a: Tensor, b: Tensor) -> float:
    """Of two tensors, relative to the second; inf where a number is missing or none."""
    if a.shape != b.shape:
        return math.inf
    ratio = float((a.double() - b.double()).norm() / b.double().norm())
    return math.inf if math.isnan(ratio) else ratio


def _cosine(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return -math.inf
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def _below(limit: float, found: dict[str, float]) -> Verdict:
    """The largest of what was found, by name; good up to ``limit``."""
    name = max(found, key=lambda key: math.inf if math.isnan(found[key]) else found[key])
    return f"{found[name]:.2g} ({name})", bool(found[name] <= limit)


def _equal(got: Result, reference: Result) -> Verdict:
    wrong = [name for name, tensor in reference.items() if not torch.equal(got[name], tensor)]
    return (f"other {', '.join(wrong)}", False) if wrong else ("equal", True)


def _sampled(got: Result, reference: Result) -> Verdict:
    """Equal noise and tokens; log-probs, whose exponentials two libraries round, to 1e-9."""
    logprobs = {name for name in reference if name.startswith("logprobs")}
    apart = max(_distance(got[name], reference[name]) for name in logprobs)
    if not apart <= 1e-9:
        return f"log-probs {apart:.2g} apart", False
    return _equal(got, {k: v for k, v in reference.items() if k not in logprobs})


def _of_node(limits: dict[str, tuple[float, float]], got: Result, reference: Result) -> Verdict:
    """``limits``, by dtype: what values and gradients may be apart; what is found, as shares."""
    found = {}
    for dtype, (values, gradient) in limits.items():
        for name, limit in (("values", values), ("gradient", gradient)):
            key = f"{dtype} {name}"
            found[key] = _distance(got[key], reference[key]) / limit
        found[f"{dtype} rows"] = got[f"{dtype} spread"] / gradient
    return _below(1.0, found)


# The values of a node are fp32 arithmetic on exact logits, also in bf16; of the fused one the
# product that makes the logits rounds them.
_node = functools.partial(_of_node, {"float32": (2e-6, 1e-5), "bfloat16": (2e-6, 1e-2)})
_fused = functools.partial(_of_node, {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 1e-2)})


def _exact_families(got: Result, reference: Result) -> Verdict:
    chosen = [name for name in reference if name.startswith("float32")]
    return _below(1e-4, {name: _distance(got[name], reference[name]) for name in chosen})


def _rounded(prefix: str, got: Result, reference: Result) -> Verdict:
    """bf16: mean absolute distance of log-probs, and of gradients 1 - cosine, as shares of 0.02 and
    of 1e-3."""
    found = {}
    for name, tensor in reference.items():
        if name.startswith(prefix) and name.endswith("logprobs"):
            found[name] = float((got[name] - tensor).abs().mean()) / 0.02
        elif name.startswith(prefix):
            found[name] = (1 - _cosine(got[name], tensor)) / 1e-3
    return _below(1.0, found)


def _resumed(got: Result, reference: Result) -> Verdict:
    names = [name for name in got if not name.endswith(": moved")]
    if not all(got[f"{name}: moved"] > 0 for name in names):
        return "a step that moves nothing", False
    return _below(0.0, {name: got[name] for name in names})


def _neighbours(got: Result, reference: Result) -> Verdict:
    if not all(got[f"{dtype} neighbour"] > 0 for dtype in ("float32", "bfloat16")):
        return "a neighbour whose change changes nothing", False
    return _below(0.0, {dtype: got[f"{dtype} own"] for dtype in ("float32", "bfloat16")})


def _replayed(got: Result, reference: Result) -> Verdict:
    if not got["recorded"]:
        return "not every route recorded", False
    if not got["others"] > 1e-3:
        return "other experts change nothing", False
    return _below(1e-5, {"log-prob": got["same"]})


def _runs(apart: float, got: Result, reference: Result) -> Verdict:
    """Shares of: ratio 1e-6 from 1, violations 0, noise 1e-12, and log-probs of the rollout
    ``apart`` (bf16: 2e-2) from training."""
    if any(not math.isfinite(x) for values in got.values() for x in values):
        return "a metric that is not finite", False
    if not all(any(got[f"{d} actor/grad_norm"]) for d in ("float32", "bfloat16")):
        return "no gradient", False
    found = {"ratio of the first update": abs(got["first update ratio/mean"][0] - 1) / 1e-6}
    for dtype, limit in (("float32", apart), ("bfloat16", 2e-2)):
        differs = max(got[f"{dtype} rollout_train/logprob_abs_diff"])
        found[f"{dtype} rollout against training"] = differs / limit
        found[f"{dtype} noise"] = max(got[f"{dtype} variance/noise"]) / 1e-12
        found[f"{dtype} violations"] = 2.0 * max(got[f"{dtype} sapo/bound_violations"])
    return _below(1.0, found)


def _machine(got: Result, reference: Result) -> Verdict:
    if got["device"] == "cpu":
        return "no GPU: the CPU against the CPU", None
    text = ", ".join(f"{key} {value}" for key, value in got.items())
    return text, got["capability"] >= 8.0


def _layouts(dtype: str, got: Result, reference: Result) -> Verdict:
    """Of two ranks from one: in fp32 shares of 1e-4, in bf16 as :func:`_rounded`."""
    alone = {name.removeprefix(dtype): value for name, value in reference.items() if dtype in name}
    expected = {name: alone[" " + name.rpartition(" ")[2]] for name in got}
    if dtype == "bfloat16":
        return _rounded("", got, expected)
    return _below(1e-4, {name: _distance(got[name], expected[name]) for name in got})


def _memory(got: Result, reference: Result) -> Verdict:
    parts = ("policy", "cache")
    return _below(0.01, {p: abs(got[p] / got[f"{p} planned"] - 1) for p in parts})


def _waits(got: Result, reference: Result) -> Verdict:
    return f"{got['waits']} of {got['at most']}", got["waits"] <= got["at most"]


def _attention(got: Result, reference: Result) -> Verdict:
    """An attention that is not fused makes a matrix of all pairs in an update."""
    text = ", ".join(f"{name} {kind}" for name, kind in got.items())
    return text, not any("update" in name and kind == "unfused" for name, kind in got.items())


def _servers(got: Result, reference: Result) -> Verdict:
    """Shares of: a probe 0.05 nats from training, and a tenth of the memory kept in sleep."""
    return _below(1.0, {k: v / (0.05 if "probe" in k else 0.1) for k, v in got.items()})


def _within(limit: float) -> Judge:
    """Every number that was found is at most ``limit``."""
    return lambda got, reference: _below(limit, got)


_each = _within(1e-4)


def _told(got: Result, reference: Result) -> Verdict:
    return ", ".join(f"{name} {value:.3g}" for name, value in got.items()), None


def _same(where: Where, prefix: str) -> list[Check]:
    """What both sections ask of their layers; ``prefix`` of the names: A or B."""
    # Transformer Engine may multiply fp32 matrices in TF32.
    runs = functools.partial(_runs, 1e-3 if where == "te" else 1e-5)
    bf16 = functools.partial(_rounded, "bfloat16")
    near, families = "0.02 nats, gradients 1 - cosine 1e-3; <= 1 of that", "measure.families"
    rows: list[tuple[str, str, Judge, str, str]] = [
        ("1 machine", "measure.machine", _machine, "compute capability 8.0 or later", ""),
        ("2 families, bf16", families, bf16, near, families),
        ("3 neighbours in a row", "measure.neighbours", _neighbours, "own bits kept", ""),
        ("4 replayed experts", "measure.replay", _replayed, "<= 1e-5; others differ", ""),
        ("5 recomputed layers", "measure.recompute", _within(1e-6), "gradients <= 1e-6 apart", ""),
        ("6 whole runs", "whole_run.whole_runs", runs, "<= 1 of its limits", ""),
        ("7 resume", "measure.resume", _resumed, "the same weights", ""),
        ("8 host waits", "gpu.waits", _waits, "25 a layer and 9, a micro-batch", ""),
        ("9 speed", "gpu.speeds", _told, "15 % of peak, 2 ms, 2 GB/s, 1 GB/s", ""),
    ]
    return [Check(prefix + row[0], where, *row[1:]) for row in rows]


def _alone(name: str, measurement: str, judge: Judge, expected: str) -> Check:
    """A check of torch's layers against the same measurement of the reference."""
    return Check(name, "torch", measurement, judge, expected, measurement)


def _two_ranks(name: str, where: Where, dtype: str, expected: str) -> Check:
    judge = functools.partial(_layouts, dtype)
    return Check(name, where, "measure.layouts", judge, expected, "measure.one_rank")


CHECKS: tuple[Check, ...] = (
    *_same("torch", "A"),
    _alone("A10 families, fp32", "measure.families", _exact_families, "<= 1e-4 apart"),
    _alone("A11 log-prob node", "measure.logprob_node", _node, "2e-6; gradients 1e-5, bf16 1e-2"),
    _alone("A12 fused log-prob node", "measure.fused_node", _fused, "1e-5, bf16 1e-2"),
    _alone("A13 sampling", "measure.sampling", _sampled, "equal bits of noise, equal tokens"),
    _alone("A14 greedy answers", "measure.greedy", _equal, "equal tokens"),
    Check("A15 export, transformers", "torch", "measure.export", _each, "log-probs <= 1e-4 apart"),
    Check("A16 memory", "torch", "gpu.memory", _memory, "<= 1 % from the plan"),
    Check("A17 log-prob speed", "torch", "gpu.logprob_speed", _told, "25 ms"),
    Check("A18 Adam on the host", "torch", "gpu.host_adam", _told, "0.35, 1.2, 2 billion a second"),
    *_same("te", "B"),
    Check(
        "B10 resume, Adam on the host", "te", "measure.resume_offloaded", _resumed, "same weights"
    ),
    Check("B11 Adam on the host", "te", "measure.offloaded", _within(1.0), "<= 1 ulp of bf16"),
    Check("B12 attention", "te", "gpu.attention", _attention, "updates flash or fused"),
    Check("B13 decoding twice", "te", "gpu.decoding_twice", _told, "1.2 times the second pass"),
    Check("B14 vLLM that sleeps", "te", "gpu.servers", _servers, "0.05 nats; <= 10 % kept"),
    _two_ranks("C1 layouts, torch", "torch pair", "float32", "<= 1e-4 from one rank"),
    _two_ranks("C2 layouts, Transformer Engine", "te pair", "bfloat16", "as B2, from one rank"),
)
