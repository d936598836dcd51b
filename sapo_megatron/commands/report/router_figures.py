"""What the router does to the importance ratios, in figures."""

import re
from functools import partial

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from sapo_megatron.commands.report.drawing import (
    Figure,
    Panel,
    Theme,
    curves,
    grouped,
    has,
    legend,
    percent,
    rim,
    stacked,
    step_axis,
    value_axis,
)
from sapo_megatron.objective.correction import EXTREME
from sapo_megatron.routing.variance import LEAST_SWAPS
from sapo_megatron.runs.read import Floats, Run

POLICIES, ENGINES_APART = "variance", "rollout_train/variance"
"""The two splits: of the current and the old policy, of the training and the rollout engine."""
SPLITS = {
    POLICIES: {"weights": "weights, Var a", "router": "router, Var b", "cov": "2 Cov(a, b)"},
    ENGINES_APART: {"numerics": "numerics, Var a", "router": "router, Var b", "cov": "2 Cov(a, b)"},
}
"""The parts of each, with their labels."""
POOLED = "router_share_pooled"
NOISE_OF_SUMS = 1e-12
"""Distances below it are rounding errors of sums of gates, whatever the bound."""
EARLIER_POINTS = 4000
"""About as many sequences stand for the steps before the last ones."""


def _draw_split(split: str, canvas: Canvas, run: Run, theme: Theme) -> None:
    ax, parts = canvas.subplots(), SPLITS[split]
    measured, rows = run.table([f"{split}/{name}" for name in ("total", *parts)])
    told = ~np.isnan(rows[0])
    steps, (total, *heights), size = grouped(measured[told], np.nan_to_num(rows[:, told]))
    half = stacked(ax, theme, steps, dict(zip(parts.values(), heights, strict=True))) / 2
    mark = ax.hlines(total, steps - half, steps + half, color=theme.ink, label="total, Var z")
    mark.set(linewidth=1.8, path_effects=rim(theme))
    if run.has(f"{split}/noise"):
        x, y = run.series(f"{split}/noise")
        (line,) = ax.plot(x, y, ":", color=theme.ink, linewidth=1.4, label="noise floor")
        line.set(clip_on=False, zorder=3)
    ax.axhline(0, color=theme.muted, linewidth=0.8)
    value_axis(ax, "variance (nats$^2$)")
    step_axis(ax, size)
    legend(ax)


def _draw_share(split: str, canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    for color, name, label in (
        (theme.series[1], "router_share", "router's share"),
        (theme.series[0], "replay_removes", "what replay removes"),
    ):
        stem = f"{split}/{name}_pooled"
        if run.has(stem):
            # As it is: a running mean over pooled shares would be the average that pooling avoids.
            ax.plot(*run.series(stem), color=color, label=label)
        if run.has(f"{stem}_low"):
            steps, (low, high) = run.table([f"{stem}_low", f"{stem}_high"])
            ax.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    ax.axhline(0, color=theme.muted, linewidth=0.8)
    value_axis(ax, "share of Var z", share=True)
    step_axis(ax)
    legend(ax)


def _bound_points(run: Run) -> Floats:
    """The points that logarithmic axes can hold and that are more than rounding errors."""
    table = run.points("sapo/bound_points")
    return table[(table[:, 1:] > NOISE_OF_SUMS).all(1)]


def _draw_bound(canvas: Canvas, run: Run, theme: Theme) -> None:
    top, bottom = canvas.subplots(2, sharex=True, height_ratios=(3, 2))
    step, bound, distance = _bound_points(run).T
    steps = np.unique(step)
    last = steps[-min(max(1, len(steps) // 10), 10) :]
    earlier, recent = np.flatnonzero(step < last[0]), np.flatnonzero(step >= last[0])
    thinned = earlier[:: len(earlier) // EARLIER_POINTS + 1]
    for chosen, color, alpha, size in (
        (thinned, theme.muted, 0.25, 5),
        (recent, theme.series[0], 0.7, 9),
    ):
        for ax, y in ((top, distance), (bottom, distance / bound)):
            ax.scatter(bound[chosen], y[chosen], s=size, color=color, alpha=alpha, linewidths=0)
    least = np.quantile([bound, distance], 0.005, axis=1) / 2
    most = 2 * max(bound.max(), distance.max())
    line = np.array([least.min(), most])
    red = theme.series[1]
    top.fill_between(line, line, most, color=red, alpha=0.12, linewidth=0)
    top.plot(line, line, color=red, linewidth=1.2, label="D_i = bound")
    bottom.axhspan(1, 1.2, color=red, alpha=0.12, linewidth=0)
    bottom.axhline(1, color=red, linewidth=1.2)
    top.loglog()
    top.set(xlim=(least[0], most), ylim=(least[1], most), ylabel="D_i")
    bottom.set(ylim=(0, 1.2), ylabel="D_i / bound", xlabel=r"bound: $\tau^2/4$ Var_i (nats$^2$)")
    top.text(0.03, 0.94, _violations(run), transform=top.transAxes, va="top")
    canvas.align_ylabels()
    for label, color in ((_span(last), theme.series[0]), ("earlier", theme.muted)):
        top.plot([], [], "o", color=color, label=label)
    legend(top)


def _span(steps: Floats) -> str:
    first, last = int(steps[0]), int(steps[-1])
    return f"step {last}" if first == last else f"steps {first} to {last}"


def _violations(run: Run) -> str:
    _, counts = run.series("sapo/bound_violations")
    if not len(counts):
        return "beyond the bound"
    return f"beyond the bound: in {np.count_nonzero(counts)} of {len(counts)} steps"


def buckets_of(run: Run, what: str) -> list[tuple[str, float, float]]:
    """(bucket, variance, share of tokens), over the last third of the steps that say."""
    stem = f"variance/by_{what}/"
    buckets = sorted(
        (name.removeprefix(stem) for name in run.names(stem) if run.has(name)),
        key=lambda bucket: int(re.split(r"\D", bucket)[0]),
    )
    starts = (f"variance/by_{what}_share/", stem)
    names = [start + bucket for start in starts for bucket in buckets]
    rows = np.nan_to_num(run.table(names)[1])
    shares, variances = np.split(rows[:, -max(1, rows.shape[1] // 3) :], 2)
    return [
        (bucket, float(variance @ share / share.sum()), float(share.mean()))
        for bucket, share, variance in zip(buckets, shares, variances, strict=True)
        if share.any()
    ]


def _draw_buckets(what: str, xlabel: str, canvas: Canvas, run: Run, theme: Theme) -> None:
    buckets, variances, shares = zip(*buckets_of(run, what), strict=True)
    top, bottom = canvas.subplots(2, sharex=True, height_ratios=(3, 2))
    top.bar(buckets, variances, 0.7, color=theme.series[0])
    value_axis(top, "Var[log r]\n(nats$^2$)")
    bars = bottom.bar(buckets, shares, 0.7, color=theme.series[4])
    bottom.bar_label(bars, [f"{100 * share:.3g}%" for share in shares], padding=2, fontsize=9.5)
    bottom.margins(y=0.25)
    bottom.yaxis.set_major_formatter(percent)
    bottom.set_ylabel("share of\ntokens")
    bottom.set_xlabel(xlabel)
    for ax in (top, bottom):
        ax.grid(axis="x", visible=False)
    canvas.align_ylabels()


def _layers(run: Run) -> list[int]:
    """Numbers of the layers whose rate of changes was logged."""
    stem = "routing/slot_flip/layer_"
    return sorted(int(name.removeprefix(stem)) for name in run.names(stem) if run.has(name))


def _draw_heat(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    numbers = _layers(run)
    layers = range(numbers[0], numbers[-1] + 1)
    steps, heat, _ = grouped(*run.table([f"routing/slot_flip/layer_{n}" for n in layers]))
    rows = _edges(np.array(layers, dtype=np.float64))
    mesh = ax.pcolormesh(_edges(steps), rows, heat, cmap="cividis")
    mesh.set_clim(0, np.nanmax(heat) or 1)
    bar = canvas.colorbar(mesh, ax=ax, label="share of experts that changed")
    bar.ax.yaxis.set_major_formatter(percent)
    bar.outline.set(visible=False)
    ax.set_ylabel("layer")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=False)
    step_axis(ax)


def _edges(centres: Floats) -> Floats:
    """Borders of cells around these centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    inner = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - inner[0]], inner, [2 * centres[-1] - inner[-1]]])


def _both(name: str) -> dict[str, str]:
    """A comparison of routes that is made twice, with its labels."""
    labels = {"routing": "current against old policy", "rollout_train": "training against rollout"}
    return {f"{prefix}/{name}": label for prefix, label in labels.items()}


FLIPS = (
    Panel("experts\nchanged", _both("slot_flip"), percent=True),
    Panel("tokens\nwith a change", _both("token_flip_share"), percent=True),
    Panel("layers changed\nper token", _both("layers_flipped")),
)
SHIFT = (
    Panel("total variation\n(0 to 1)", _both("tv")),
    Panel("shift factor\n(1: no shift)", {"routing/shift_factor": "shift factor"}),
    Panel("busiest expert\nabove mean load", {"routing/max_violation": "overload"}, percent=True),
)
ENGINES = (
    Panel(
        "KL\n(nats per token)",
        {"rollout_train/kl": "k1 estimate", "rollout_train/k3_kl": "k3 estimate"},
    ),
    Panel("|difference|\nof log-probs (nats)", {"rollout_train/logprob_abs_diff": "difference"}),
    Panel("extreme\ntokens", {"rollout_train/extreme_fraction": "extreme"}, percent=True),
)

SHARES = (
    "Cov(b, z) / Var z, which with the share of a adds up to 100% and is negative where the router "
    "cancels some of the rest; and 1 - Var a / Var z, what replayed experts would take away. "
    "Measurements of a window, pooled, with intervals of 95% by sequences; nothing is drawn below "
    f"{LEAST_SWAPS} swaps."
)
ROUTER_FIGURES = (
    Figure(
        "variance_split",
        "Where the variance of the log ratio comes from",
        "z = log r = a + b: a is what the weights change while each token keeps its old experts, b "
        "is what the change of experts adds. A part below zero takes away from their sum, the "
        "total; the noise floor is what the same forward pass gives when it runs twice.",
        has("variance/total"),
        partial(_draw_split, POLICIES),
        height=4.1,
    ),
    Figure(
        "router_share",
        "The router's share of the variance",
        SHARES,
        has(f"{POLICIES}/{POOLED}"),
        partial(_draw_share, POLICIES),
        height=4.1,
    ),
    Figure(
        "engine_split",
        "Where the difference between the engines comes from",
        "z = log-prob of the training engine - that of the rollout engine = a + b: a is the "
        "difference at the experts that the rollout engine chose, by numerics and, where its "
        "weights were older, by weights; b is what the training engine's own choice adds.",
        has(f"{ENGINES_APART}/total"),
        partial(_draw_split, ENGINES_APART),
        height=4.1,
    ),
    Figure(
        "engine_share",
        "The router's share of the engines' difference",
        SHARES,
        has(f"{ENGINES_APART}/{POOLED}"),
        partial(_draw_share, ENGINES_APART),
        height=4.1,
    ),
    Figure(
        "by_layers",
        "Variance by the number of layers that changed",
        "Var[log r] of the tokens whose own experts changed in so many layers, and how many tokens "
        "these are; over the last third of the steps that were measured.",
        lambda run: bool(buckets_of(run, "layers")),
        partial(_draw_buckets, "layers", "layers in which a token's experts changed"),
        height=5.2,
    ),
    Figure(
        "by_context",
        "Variance by what changed in the context",
        "Var[log r] of a token by how many of those before it changed their experts, which reach "
        "it through keys and values; over the last third of the steps that were measured.",
        lambda run: bool(buckets_of(run, "context")),
        partial(_draw_buckets, "context", "share of the context whose experts changed"),
        height=5.2,
    ),
    Figure(
        "bound",
        "The gate's bound, sequence by sequence",
        "Within a sequence, the mean gate weight differs from the gate at the mean log ratio by "
        "D_i, which theory bounds by tau^2/4 times the variance of log r (tightly, where that is "
        "small): no point may lie in the shaded parts.",
        lambda run: bool(len(_bound_points(run))),
        _draw_bound,
        height=5.2,
    ),
    curves(
        "flips",
        "Experts that changed",
        "Share of a token's chosen experts that are others than before, share of tokens with a "
        "change in any layer, and mean number of such layers; between two policies or two engines.",
        *FLIPS,
        height=5.2,
    ),
    Figure(
        "flip_heat",
        "Experts that changed, by layer",
        "Share of the chosen experts that differ between the current and the old policy.",
        lambda run: bool(_layers(run)),
        _draw_heat,
        height=5.2,
    ),
    curves(
        "router_shift",
        "How far the router moved, and how even its load is",
        "Total variation of the routers' probabilities, RSPO's shift factor, and by how much the "
        "busiest expert of a layer exceeds the mean load, on average over the layers.",
        *SHIFT,
        height=5.2,
    ),
    curves(
        "engines",
        "Rollout engine against training engine",
        "How much the two engines disagree about the same tokens under the same weights; a token "
        f"is extreme when its probabilities differ by more than a factor {EXTREME:g}.",
        *ENGINES,
        height=5.2,
    ),
)
