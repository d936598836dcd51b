"""The tables and figures of ``docs/stability.md``, of ``results.json`` alone."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.studies.stability.cases import (
    ASYNC_N,
    LOSSES,
    MINI_BATCHES,
    ROOT,
    SCORE,
    SEEDS,
    STALENESS,
)
from benchmarks.studies.stability.criterion import better, steadier, verdict
from sapo_megatron.routing.variance import LEAST_SWAPS

PAGE = ROOT / "docs" / "stability.md"

Arm = tuple[str, int, int, str]
"""Loss, N, K and old policy: what runs on several seeds have in common."""
Results = dict[Arm, list[dict[str, Any]]]

SYNC: list[Arm] = [(loss, n, 0, "recompute") for n in MINI_BATCHES for loss in LOSSES]
ASYNC: list[Arm] = [
    (loss, ASYNC_N, k, old)
    for k in STALENESS
    for loss, old in (
        ("sapo", "recompute"),
        ("sapo", "rollout"),
        ("grpo", "recompute"),
        ("vespo", "recompute"),
    )
]
MEASURED = (
    ("log_var", "{:.4f}"),
    ("sampler_kl", "{:z.4f}"),
    ("ratio_max", "{:.3g}"),
    ("grad_norm_max", "{:.3g}"),
)
"""Keys of a run that have a column each."""
COLOURS = {"sapo": "#1b6ca8", "grpo": "#d95f02", "gspo": "#4d4d4d", "vespo": "#3a923a"}


def read(path: Path) -> Results:
    """The runs by what they have in common, in the order of their seeds."""
    found: Results = defaultdict(list)
    for run in json.loads(path.read_text()):
        found[run["loss"], run["n"], run["k"], run["old_policy"]].append(run)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in found.items()}


def write_page(results: Results) -> None:
    """Replace the tables between the page's markers."""
    page = PAGE.read_text()
    for name, (head, *body) in tables(results).items():
        lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        marker = f"<!-- table: {name} -->"
        page, found = re.subn(
            rf"{marker}.*?<!-- end -->", f"{marker}\n{text}\n<!-- end -->", page, flags=re.DOTALL
        )
        assert found == 1, f"{PAGE}: expected {marker} once, got it {found} times"
    PAGE.write_text(page)


def tables(results: Results) -> dict[str, list[list[str]]]:
    """By name: a head and rows."""
    return {
        "mini-batches": of_arms(results, SYNC),
        "staleness": of_arms(results, ASYNC),
        "verdicts": of_pairs(results),
    }


def of_arms(results: Results, arms: Iterable[Arm]) -> list[list[str]]:
    """A row each: values of the seeds, in their order."""
    head = ["loss", "N", "K", "collapsed", "end", "fall", "Var log r", "KL to the sampler",
            "greatest r", "gradient norm", "router share"]  # fmt: skip
    rows = [head]
    for arm in arms:
        runs = results.get(arm, [])
        verdicts = [verdict(run) for run in runs]

        def cell(values: Iterable[Any], form: str, runs: list[dict[str, Any]] = runs) -> str:
            by_seed = dict(zip((run["seed"] for run in runs), values, strict=True))
            return listed([by_seed.get(seed) for seed in SEEDS], form)

        rows.append(
            [
                name_of(arm),
                str(arm[1]),
                str(arm[2]),
                f"{sum(v.collapsed for v in verdicts)} of {len(runs)}" if runs else "not run",
                cell([v.end for v in verdicts], "{:.2f}"),
                cell([v.fall for v in verdicts], "{:.2f}"),
                *(cell([run[key] for run in runs], form) for key, form in MEASURED),
                share(runs),
            ]
        )
    return rows


def name_of(arm: Arm) -> str:
    return arm[0].upper() + (", ratio to the sampler" if arm[3] == "rollout" else "")


def listed(values: Iterable[float | None], form: str) -> str:
    texts = ["-" if value is None else form.format(value) for value in values]
    return " / ".join(texts) if set(texts) - {"-"} else "-"


def share(runs: Iterable[dict[str, Any]]) -> str:
    """Of the router, pooled over all measurements of an arm."""
    splits = [run["splits"] for run in runs]
    swaps, total, router = (
        sum(split[name] for split in splits) for name in ("swaps", "total", "router")
    )
    if not splits:
        return "-"
    if swaps < LEAST_SWAPS or not total > 0:
        return f"unknown ({swaps:.0f} swaps)"
    return f"{router / total:.1%} ({swaps:.0f} swaps)"


def of_pairs(results: Results) -> list[list[str]]:
    """SAPO against the others, under each condition that all seeds of both were run in."""
    rows = [["N", "K", "SAPO against", "steadier", "higher end"]]
    for loss, n, k, old in [*SYNC, *(arm for arm in ASYNC if arm[2] > 0)]:
        ours, theirs = (results.get(arm, []) for arm in (("sapo", n, k, "recompute"),
                                                         (loss, n, k, old)))  # fmt: skip
        if (loss, old) == ("sapo", "recompute") or not len(ours) == len(theirs) == len(SEEDS):
            continue
        pair = [verdict(run) for run in ours], [verdict(run) for run in theirs]
        name = name_of((loss, n, k, old))
        told = [said(compare(*pair), name) for compare in (steadier, better)]
        rows.append([str(n), str(k), name, *told])
    return rows


def said(found: int, other: str) -> str:
    return {1: "SAPO", 0: "cannot tell", -1: other}[found]


def draw(results: Results) -> None:
    """Held-out curves over updates."""
    for name, arms, place, title in (
        ("mini-batches", SYNC, 1, "N = {} mini-batches a rollout"),
        ("staleness", ASYNC, 2, "K = {} steps ahead"),
    ):
        draw_curves(results, arms, place, title, PAGE.parent / f"stability-{name}.png")


def draw_curves(results: Results, arms: list[Arm], place: int, title: str, path: Path) -> None:
    """A panel for each value that the arms have at ``place``: the seeds thin, their mean thick."""
    values = sorted({arm[place] for arm in arms})
    figure, axes = plt.subplots(
        1, len(values), figsize=(12, 3.8), sharex=True, sharey=True, layout="constrained"
    )
    for ax, value in zip(axes, values, strict=True):
        for arm in (arm for arm in arms if arm[place] == value and results.get(arm)):
            style = {"color": COLOURS[arm[0]], "ls": "--" if arm[3] == "rollout" else "-"}
            curves = [run["curve"] for run in results[arm]]
            for curve in curves:
                ax.plot(*zip(*curve, strict=True), alpha=0.3, linewidth=0.8, **style)
            ax.plot(*mean_curve(curves), linewidth=2, label=name_of(arm), **style)
        if not ax.lines:
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center")
        ax.set_title(title.format(value), fontsize=10)
        ax.set_xlabel("updates")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"held-out {SCORE}")
    lines = {line.get_label(): line for ax in axes for line in ax.get_legend_handles_labels()[0]}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def mean_curve(curves: list[list[list[float]]]) -> tuple[list[float], list[float]]:
    """Over the seeds, at the updates at which all of them were scored."""
    by_update: list[dict[float, float]] = [dict(curve) for curve in curves]  # type: ignore[arg-type]
    at = sorted(set.intersection(*map(set, by_update)))
    return at, [statistics.fmean(scores[update] for scores in by_update) for update in at]
