"""What the router does to the importance ratios, in figures."""

import re

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sapo_megatron.commands.report.drawing import (
    Figure,
    Panel,
    Theme,
    curve,
    curves,
    has,
    step_axis,
)
from sapo_megatron.objective.correction import EXTREME
from sapo_megatron.runs.read import Floats, Run

NOISE_OF_SUMS = 1e-12
"""Distances below it are rounding errors of sums of gates, whatever the bound."""
EARLIER_POINTS = 4000
"""About as many sequences stand for the steps before the last ones."""


def _draw_split(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    steps, total = run.series("variance/total")
    width = 0.8 * np.diff(steps).min() if len(steps) > 1 else 0.8
    above, below = np.zeros(len(steps)), np.zeros(len(steps))
    parts = {"weights": "weights, Var a", "router": "router, Var b", "cov": "2 Cov(a, b)"}
    for color, (part, label) in zip(theme.series, parts.items(), strict=False):
        held = dict(zip(*run.series(f"variance/{part}"), strict=True))
        height = np.array([held.get(step, 0.0) for step in steps])
        base = np.where(height < 0, below, above)
        ax.bar(steps, height, width, base, color=color, label=label, alpha=0.85)
        above, below = above + height.clip(min=0), below + height.clip(max=0)
    dots = {"marker": "o", "markersize": 3} if len(steps) <= 40 else {}
    ax.plot(steps, total, color=theme.ink, linewidth=1.2, label="total, Var[log r]", **dots)
    if run.has("variance/noise"):
        noise = {"color": theme.ink, "linestyle": ":", "label": "noise floor"}
        ax.plot(*run.series("variance/noise"), **noise)
    ax.axhline(0, color=theme.muted, linewidth=0.8)
    ax.set_ylabel("variance (nats^2)")
    step_axis(ax)
    ax.grid(axis="x", visible=False)
    canvas.legend(loc="outside lower center", ncols=3)


def _draw_share(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    curve(ax, *run.series("variance/router_share"), theme.series[1])
    ax.axhline(0, color=theme.muted, linewidth=0.8)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel("share of Var[log r]")
    step_axis(ax)


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
        style = {"s": size, "color": color, "alpha": alpha, "linewidths": 0}
        top.scatter(bound[chosen], distance[chosen], **style)
        bottom.scatter(bound[chosen], (distance / bound)[chosen], **style)
    least = np.quantile([bound, distance], 0.005, axis=1) / 2
    most = 2 * max(bound.max(), distance.max())
    line = np.array([least.min(), most])
    beyond = {"color": theme.series[1], "alpha": 0.12, "linewidth": 0}
    edge = {"color": theme.series[1], "linewidth": 1.2}
    top.fill_between(line, line, most, **beyond)
    top.plot(line, line, **edge)
    bottom.axhspan(1, 1.2, **beyond)
    bottom.axhline(1, **edge)
    top.loglog()
    top.set(xlim=(least[0], most), ylim=(least[1], most), ylabel="D_i")
    bottom.set(ylim=(0, 1.2), ylabel="D_i / bound", xlabel="bound: tau^2/4 Var_i (nats^2)")
    top.text(0.03, 0.94, _violations(run), transform=top.transAxes, va="top")
    canvas.align_ylabels()
    marks = {
        _span(last): _dot(theme.series[0]),
        "earlier": _dot(theme.muted),
        "D_i = bound": edge,
    }
    handles = [top.plot([], [], label=label, **style)[0] for label, style in marks.items()]
    canvas.legend(handles=handles, loc="outside lower center", ncols=3)


def _dot(color: str) -> dict[str, str]:
    return {"color": color, "marker": "o", "linestyle": "none"}


def _span(steps: Floats) -> str:
    first, last = int(steps[0]), int(steps[-1])
    return f"step {last}" if first == last else f"steps {first} to {last}"


def _violations(run: Run) -> str:
    _, counts = run.series("sapo/bound_violations")
    if not len(counts):
        return "beyond the bound"
    return f"beyond the bound: in {np.count_nonzero(counts)} of {len(counts)} steps"


def by_layers(run: Run) -> list[tuple[str, float, float]]:
    """(layers changed, variance, share of tokens), over the last third of the steps that say."""
    stem, share_stem = "variance/by_layers/", "variance/by_layers_share/"
    buckets = sorted(
        (name.removeprefix(stem) for name in run.names(stem) if run.has(name)),
        key=lambda bucket: int(re.split(r"\D", bucket)[0]),
    )
    told = [r for r in run.records if any(share_stem + bucket in r for bucket in buckets)]
    last = told[-max(1, len(told) // 3) :]
    table = []
    for bucket in buckets:
        shares = np.array([r.get(share_stem + bucket) or 0.0 for r in last])
        variances = np.array([r.get(stem + bucket) or 0.0 for r in last])
        if shares.sum() > 0:
            table.append((bucket, float(variances @ shares / shares.sum()), float(shares.mean())))
    return table


def _draw_by_layers(canvas: Canvas, run: Run, theme: Theme) -> None:
    buckets, variances, shares = zip(*by_layers(run), strict=True)
    top, bottom = canvas.subplots(2, sharex=True, height_ratios=(3, 2))
    top.bar(buckets, variances, 0.7, color=theme.series[0])
    top.set_ylabel("Var[log r]\n(nats^2)")
    bars = bottom.bar(buckets, shares, 0.7, color=theme.series[4])
    bottom.bar_label(bars, [f"{100 * share:.3g}%" for share in shares], padding=2, fontsize=9)
    bottom.margins(y=0.25)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
    bottom.set_ylabel("share of\ntokens")
    bottom.set_xlabel("layers in which a token's experts changed")
    for ax in (top, bottom):
        ax.grid(axis="x", visible=False)
    canvas.align_ylabels()


def _layers(run: Run) -> list[int]:
    """Numbers of the layers whose flip fraction was logged."""
    stem = "routing/flip_fraction/layer_"
    return sorted(int(name.removeprefix(stem)) for name in run.names(stem) if run.has(name))


def _draw_heat(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    numbers = _layers(run)
    layers = range(numbers[0], numbers[-1] + 1)
    series = {n: run.series(f"routing/flip_fraction/layer_{n}") for n in numbers}
    steps = np.unique(np.concatenate([x for x, _ in series.values()]))
    heat = np.full((len(layers), len(steps)), np.nan)
    for number, (x, y) in series.items():
        heat[number - layers[0], np.searchsorted(steps, x)] = y
    mesh = ax.pcolormesh(_edges(steps), _edges(np.array(layers)), heat, cmap="cividis", vmin=0)
    bar = canvas.colorbar(mesh, ax=ax, label="share of experts that changed")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.outline.set_visible(False)
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
    Panel("experts\nchanged", _both("flip_fraction"), percent=True),
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


def _names(panels: tuple[Panel, ...]) -> list[str]:
    return [name for panel in panels for name in panel.names]


ROUTER_FIGURES = (
    Figure(
        "variance_split",
        "The router",
        "Where the variance of the log ratio comes from",
        "log r = a + b: a is what the weights change while each token keeps its old experts, b is "
        "what the change of experts adds. A part below zero takes away from their sum, the total; "
        "the noise floor is what the same forward pass gives when it runs twice.",
        has("variance/total"),
        _draw_split,
        height=4.1,
    ),
    Figure(
        "router_share",
        "The router",
        "The router's share of the variance",
        "(Var b + Cov(a, b)) / Var[log r]: with the share of the weights it adds up to 100%; it is "
        "negative where the router cancels some of what the weights do.",
        has("variance/router_share"),
        _draw_share,
    ),
    Figure(
        "by_layers",
        "The router",
        "Variance by the number of layers that changed",
        "Var[log r] of the tokens whose experts changed in so many layers, and how many tokens "
        "these are; over the last third of the steps that were measured.",
        lambda run: bool(by_layers(run)),
        _draw_by_layers,
    ),
    Figure(
        "bound",
        "The router",
        "The gate's bound, sequence by sequence",
        "Within a sequence, the mean gate weight differs from the gate at the mean log ratio by "
        "D_i, which theory bounds by tau^2/4 times the variance of log r (tightly, where that is "
        "small): no point may lie in the shaded parts.",
        lambda run: bool(len(_bound_points(run))),
        _draw_bound,
        height=5.2,
    ),
    Figure(
        "flips",
        "The router",
        "Experts that changed",
        "Share of a token's chosen experts that are others than before, share of tokens with a "
        "change in any layer, and mean number of such layers; between two policies or two engines.",
        has(*_names(FLIPS)),
        curves(*FLIPS),
        height=5.2,
    ),
    Figure(
        "flip_heat",
        "The router",
        "Experts that changed, by layer",
        "Share of the chosen experts that differ between the current and the old policy.",
        lambda run: bool(_layers(run)),
        _draw_heat,
    ),
    Figure(
        "router_shift",
        "The router",
        "How far the router moved, and how even its load is",
        "Total variation of the routers' probabilities, RSPO's shift factor, and by how much the "
        "busiest expert of a layer exceeds the mean load, on average over the layers.",
        has(*_names(SHIFT)),
        curves(*SHIFT),
        height=5.2,
    ),
    Figure(
        "engines",
        "The router",
        "Rollout engine against training engine",
        "How much the two engines disagree about the same tokens under the same weights; a token "
        f"is extreme when its probabilities differ by more than a factor {EXTREME:g}.",
        has(*_names(ENGINES)),
        curves(*ENGINES),
        height=5.2,
    ),
)
