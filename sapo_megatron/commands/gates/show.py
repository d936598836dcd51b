"""A comparison in words and numbers: tables for a terminal, JSON for programs."""

import math
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from sapo_megatron.commands.gates.compare import BySign, Comparison
from sapo_megatron.runs.dump import DumpInfo

Row = Sequence[str]
NONE = "-"
"""What a table shows where there is no number."""


def as_text(comparison: Comparison) -> str:
    """Aligned tables, with a newline at the end."""
    parts = [_head(comparison), _effects(comparison), _cosine(comparison)]
    if comparison.buckets:
        parts.append(_buckets(comparison))
    return "\n\n".join([*parts, _suggestion(comparison)]) + "\n"


def as_json(comparison: Comparison) -> str:
    """All numbers as JSON; null where there is none."""
    gates = [
        {"gate": str(e.gate), "weight": e.weight, "mass_kept": e.mass_kept, "ess": e.ess}
        for e in comparison.effects
    ]
    whole = {
        "files": comparison.dump.files,
        "mini_batches": [
            {"step": info.step, "update": info.update} for info in comparison.dump.mini_batches
        ],
        "objective": comparison.dump.settings.settings,
        "tokens": len(comparison.ratio),
        "sequences": int((comparison.dump.lengths > 0).sum()),
        "log_ratio_var": comparison.log_ratio_var,
        "gates": gates,
        "cosine": comparison.cosine.tolist(),
        "layers_changed": comparison.buckets,
        "suggestion": comparison.suggestion,
    }
    return TypeAdapter(Any).dump_json(whole, indent=2).decode() + "\n"


def _head(comparison: Comparison) -> str:
    dump, advantages = comparison.dump, comparison.advantages
    settings, variance = dump.settings, comparison.log_ratio_var
    signs = {">": advantages > 0, "<": advantages < 0, "=": advantages == 0}
    shares = [
        f"{where.double().mean():.1%} with A {sign} 0"
        for sign, where in signs.items()
        if where.any()
    ]
    sequences = int((dump.lengths > 0).sum())
    taus = f", tau_pos {settings.tau_pos:g}, tau_neg {settings.tau_neg:g}"
    rows = {
        "dumps": f"{_count(dump.files, 'file')}, {_mini_batches(dump.mini_batches)}",
        "objective": f"{settings.loss_type}{taus if settings.loss_type == 'sapo' else ''}, "
        f"{settings.loss_agg_mode}",
        "tokens": f"{_count(len(advantages), 'token')} of {_count(sequences, 'sequence')}: "
        f"{', '.join(shares)}",
        "Var[log r]": f"{_number(variance.all)} (A > 0: {_number(variance.pos)}, "
        f"A < 0: {_number(variance.neg)})",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def _effects(comparison: Comparison) -> str:
    def by_sign(numbers: BySign, form: str) -> Row:
        return [_number(x, form) for x in (numbers.all, numbers.pos, numbers.neg)]

    rows: list[Row] = [("", "gate", "w", "A > 0", "A < 0", "mass", "A > 0", "A < 0", "ess")]
    for i, effect in enumerate(comparison.effects, 1):
        numbers = [*by_sign(effect.weight, ".4f"), *by_sign(effect.mass_kept, ".1%")]
        rows.append((f"{i}", f"{effect.gate}", *numbers, _number(effect.ess, ".1%")))
    legend = (
        "w: mean weight of a token; mass: share of the gradient's mass that is kept; ess: effective"
        "\nsample size of the factors w r. A > 0, A < 0: the same by sign of the advantage."
    )
    return f"{_table(rows, left=2)}\n{legend}"


def _cosine(comparison: Comparison) -> str:
    numbers = range(1, len(comparison.effects) + 1)
    rows: list[Row] = [("", "cosine of gradients", *map(str, numbers))]
    for i, effect, cosines in zip(numbers, comparison.effects, comparison.cosine, strict=True):
        rows.append((f"{i}", f"{effect.gate}", *(_number(x, ".4f") for x in cosines.tolist())))
    return _table(rows, left=2)


def _buckets(comparison: Comparison) -> str:
    numbers = range(1, len(comparison.effects) + 1)
    rows: list[Row] = [("layers changed", "tokens", "Var[log r]", *(f"w of {i}" for i in numbers))]
    for bucket in comparison.buckets:
        weights = (_number(x, ".4f") for x in bucket.weight)
        variance = _number(bucket.log_ratio_var)
        low, high = f"{bucket.low}", f"{bucket.high}"
        layers = low if low == high else f"{low} to {high}"
        rows.append((layers, f"{bucket.tokens:,}", variance, *weights))
    return _table(rows, left=1)


def _suggestion(comparison: Comparison) -> str:
    s = comparison.suggestion
    rows: list[Row] = [
        (f"tau for a mean weight of {s.attenuation:g}", "A > 0", "A < 0"),
        ("at these ratios", _number(s.tau_pos, ".3f"), _number(s.tau_neg, ".3f")),
        (
            "from Var[log r], if small",
            _number(s.tau_pos_small_variance, ".3f"),
            _number(s.tau_neg_small_variance, ".3f"),
        ),
    ]
    return _table(rows, left=1)


def _mini_batches(infos: Sequence[DumpInfo]) -> str:
    if len(infos) == 1:
        return f"step {infos[0].step}, update {infos[0].update}"
    steps = sorted({info.step for info in infos})
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return f"{len(infos)} mini-batches of {span}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _number(x: float | None, form: str = ".4g") -> str:
    return NONE if x is None or not math.isfinite(x) else f"{x:{form}}"


def _table(rows: Sequence[Row], *, left: int) -> str:
    """Columns two spaces apart: the first ``left`` flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
