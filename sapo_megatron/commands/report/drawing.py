"""What the report's figures are made with: themes, the canvas, and curves over the steps."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sapo_megatron.runs.read import Floats, Run

WIDTH, HEIGHT, DPI = 5.6, 3.5, 180
"""Inches and dots per inch: legible at the width of a phone, sharp in print."""
SMOOTH_FROM = 50
"""Points from which a curve is drawn as its running mean over the faint raw values."""
DASHES = (0, (4, 1.5))


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; ``series`` are told apart with every kind of colour vision."""

    face: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


THEMES = {
    "light": Theme(
        face="#ffffff",
        ink="#1b1f24",
        muted="#57606a",
        grid="#e4e7eb",
        series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    ),
    "dark": Theme(
        face="#161b22",
        ink="#e6edf3",
        muted="#9aa4af",
        grid="#2b323b",
        series=("#56b4e9", "#f0883e", "#3fbf93", "#e08fc0", "#f0d442", "#8c9eff"),
    ),
}
"""Okabe and Ito's palette on white, and a lighter one of the same hues on black."""


@dataclass(frozen=True)
class Figure:
    """One picture: ``draw`` fills an empty canvas, ``available`` says whether the run can."""

    name: str
    section: str
    title: str
    caption: str
    available: Callable[[Run], bool]
    draw: Callable[[Canvas, Run, Theme], None]
    height: float = HEIGHT


def render(figure: Figure, run: Run, theme: Theme) -> bytes:
    """The figure as PNG."""
    settings = {
        "figure.facecolor": theme.face,
        "axes.facecolor": theme.face,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.prop_cycle": mpl.cycler(color=theme.series),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "font.size": 10.5,
        "lines.linewidth": 1.8,
    }
    with mpl.rc_context(settings):
        canvas = Canvas(figsize=(WIDTH, figure.height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(canvas)
        figure.draw(canvas, run, theme)
        canvas.suptitle(figure.title, fontsize=11.5, fontweight="bold")
        png = io.BytesIO()
        canvas.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def has(*names: str) -> Callable[[Run], bool]:
    """Whether the run logged any of these."""
    return lambda run: any(run.has(name) for name in names)


def curve(ax: Axes, x: Floats, y: Floats, color: str, label: str | None = None) -> None:
    """A series over steps: few points with markers, many as a running mean over the raw ones."""
    if len(y) < SMOOTH_FROM:
        marker = "o" if len(y) <= 30 else None
        ax.plot(x, y, color=color, label=label, marker=marker, markersize=3.5)
        return
    ax.plot(x, y, color=color, alpha=0.3, linewidth=0.9)
    window = np.ones(len(y) // 25 * 2 + 1)
    smooth = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
    ax.plot(x, smooth, color=color, label=label)


def step_axis(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


@dataclass(frozen=True)
class Panel:
    """Some metrics over the steps on one pair of axes."""

    ylabel: str
    names: dict[str, str]
    """Metric -> its label; what the run lacks is left out."""
    percent: bool = False
    log: bool = False
    """A logarithmic axis, where the values allow it."""


def curves(*panels: Panel) -> Callable[[Canvas, Run, Theme], None]:
    """A drawing of these panels above one another, without those that the run has nothing for."""

    def draw(canvas: Canvas, run: Run, theme: Theme) -> None:
        shown = [p for p in panels if has(*p.names)(run)]
        axes = np.atleast_1d(canvas.subplots(len(shown), sharex=True))
        told: set[str] = set()
        for ax, panel in zip(axes, shown, strict=True):
            labels = _draw_panel(ax, panel, run, theme)
            if len(panel.names) > 1 and not labels <= told:
                ax.legend()
            told |= labels
        canvas.align_ylabels(axes)
        step_axis(axes[-1])

    return draw


def _draw_panel(ax: Axes, panel: Panel, run: Run, theme: Theme) -> set[str]:
    """Fill ``ax``; the labels of what was drawn."""
    labels = {name: label for name, label in panel.names.items() if run.has(name)}
    for color, (name, label) in zip(theme.series, panel.names.items(), strict=False):
        if name in labels:
            curve(ax, *run.series(name), color, label)
    if panel.log and all(_spans_decade(run.series(name)[1]) for name in labels):
        ax.set_yscale("log")
    if panel.percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_ylim(bottom=0)
    ax.set_ylabel(panel.ylabel)
    return set(labels.values())


def _spans_decade(y: Floats) -> bool:
    """Whether a logarithmic axis is possible and worth its while."""
    return bool(y.min() > 0 and y.max() > 10 * y.min())
