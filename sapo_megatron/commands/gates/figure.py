"""A comparison as a picture, in the look of the report."""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from sapo_megatron.commands.gates.compare import Comparison, Effect
from sapo_megatron.commands.gates.gate import Gate
from sapo_megatron.commands.report.drawing import DASHES, THEMES, Figure, Theme, render
from sapo_megatron.objective.loss import LOSSES

BINS = 60
TAIL = 0.001
"""Share of the tokens at either end of the ratios that may lie outside the picture."""
LEAST_REACH = 0.01
"""The picture spans at least this much on both sides of a ratio of 1."""
LEAST_TOKENS = 5
"""Tokens that a bin needs for a dot."""
HIGHEST_WEIGHT = 2.0
"""The weight of a loss of sequences, s / r with GSPO, has no bound as r falls to 0; the picture
has."""
CURVE_POINTS = 801


def draw(comparison: Comparison) -> bytes:
    """PNG: weight against ratio by sign of the advantage, and the gradient mass that is left."""
    title = "What each gate keeps of the gradient"
    figure = Figure("gates", title, "", lambda _: True, _panels, height=8.4)
    return render(figure, comparison, THEMES["light"])


def _panels(canvas: Canvas, comparison: Comparison, theme: Theme) -> None:
    top, middle, bottom = canvas.subplots(3)
    edges = _edges(comparison.ratio)
    for ax, sign in ((top, 1), (middle, -1)):
        _draw_weights(ax, comparison, edges, sign, theme)
    highest = min(max(1.0, top.dataLim.ymax, middle.dataLim.ymax), HIGHEST_WEIGHT)
    for ax in (top, middle):
        ax.set_ylim(-0.04 * highest, 1.06 * highest)
    middle.set_xlabel("importance ratio r of a token")
    _draw_mass(bottom, comparison, theme)
    canvas.legend(
        *top.get_legend_handles_labels(), loc="outside lower center", ncols=2, columnspacing=3
    )


def _edges(ratio: Tensor) -> np.ndarray:
    """Bins over all but the tails of the ratios, as wide on one side of 1 as on the other."""
    ordered = ratio.sort().values
    tail = int(TAIL * len(ordered))
    low, high = ordered[tail].item(), ordered[-1 - tail].item()
    reach = 1.05 * max(1 - low, high - 1, LEAST_REACH)
    return np.linspace(max(1 - reach, 0), 1 + reach, BINS + 1)


def _draw_weights(
    ax: Axes, comparison: Comparison, edges: np.ndarray, sign: int, theme: Theme
) -> None:
    """Curves of w over the histogram of the ratios, for one sign of the advantage."""
    here = comparison.advantages * sign > 0
    ratio = comparison.ratio[here].numpy()
    counts, _ = np.histogram(ratio, edges)
    behind = ax.twinx()
    percent = 100 * counts / max(len(ratio), 1)
    behind.stairs(percent, edges, fill=True, color=theme.muted, alpha=0.25, linewidth=0)
    behind.set_ylim(0, max(1.1 * percent.max(), 1))
    behind.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    behind.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    behind.tick_params(length=0)
    behind.set_ylabel("tokens in a bin (grey)", color=theme.muted)
    behind.grid(visible=False)
    ax.set_zorder(behind.get_zorder() + 1)
    ax.patch.set_visible(False)

    for effect, style in zip(comparison.effects, _styles(comparison, theme), strict=True):
        if LOSSES[effect.gate.name].of_sequences:
            x, y = _observed(effect, comparison, edges, here)
            ax.plot(x, y, "o", markersize=2.5, color=style["color"], label=f"{effect.gate} (mean)")
        else:
            x, y = _curve(effect.gate, edges, sign)
            ax.plot(x, y, label=f"{effect.gate}", **style)
    ax.axvline(1, color=theme.muted, linewidth=0.8)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylabel(f"weight w, A {'>' if sign > 0 else '<'} 0")


def _styles(comparison: Comparison, theme: Theme) -> list[dict[str, Any]]:
    """One for each gate; dashes once the colours are used up."""
    colors = len(theme.series)
    return [
        {"color": theme.series[i % colors], "linestyle": "-" if i < colors else DASHES}
        for i in range(len(comparison.effects))
    ]


def _curve(gate: Gate, edges: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """w of a gate that looks at a token's own ratio only, which each sequence of one token has."""
    ratio = torch.linspace(max(edges[0], 1e-6), edges[-1], CURVE_POINTS, dtype=torch.float64)
    each, one = torch.arange(CURVE_POINTS), torch.ones_like(ratio)
    w = gate.weights(ratio.log(), torch.zeros_like(ratio), sign * one, each, one)
    return ratio.numpy(), w.numpy()


def _observed(
    effect: Effect, comparison: Comparison, edges: np.ndarray, here: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of w over the tokens of each bin that has enough of them."""
    ratio, weights = comparison.ratio[here].numpy(), effect.weights[here].numpy()
    counts, _ = np.histogram(ratio, edges)
    sums, _ = np.histogram(ratio, edges, weights=weights)
    full = counts >= LEAST_TOKENS
    return ((edges[:-1] + edges[1:]) / 2)[full], sums[full] / counts[full]


def _draw_mass(ax: Axes, comparison: Comparison, theme: Theme) -> None:
    """Bars of the gradient mass that is left, by sign of the advantage."""
    effects, styles = comparison.effects, _styles(comparison, theme)
    height = 0.84 / len(effects)
    for i, (effect, style) in enumerate(zip(effects, styles, strict=True)):
        kept = np.array([effect.mass_kept.all, effect.mass_kept.pos, effect.mass_kept.neg])
        y = np.arange(3) + (i - (len(effects) - 1) / 2) * height
        hatch = None if style["linestyle"] == "-" else "//"
        bars = ax.barh(y, kept, 0.9 * height, color=style["color"], hatch=hatch)
        if len(effects) <= len(theme.series):
            labels = ["" if np.isnan(share) else f"{share:.1%}" for share in kept]
            ax.bar_label(bars, labels, fontsize=8.5, padding=3)
    ax.set_yticks(range(3), ["all", "A > 0", "A < 0"])
    ax.set_ylim(2.5, -0.5)
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("gradient mass kept")
