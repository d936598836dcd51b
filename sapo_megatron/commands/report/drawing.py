"""What the report's figures are made with: themes, the canvas, axes, and curves over the steps."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from sapo_megatron.runs.read import Floats, Run

WIDTH, HEIGHT, DPI = 5.6, 3.5, 160
"""Inches and dots per inch: about two dots per pixel of the page."""
COLORS = 96
"""Of a PNG's palette: what a page holds in two themes has to stay small."""
SMOOTH_FROM = 50
"""Points from which a curve is drawn as its running mean over the faint raw values."""
BARS = 60
"""Bars that a figure has at most."""
DASHES = (0, (4, 1.5))
PLAIN = "{x:.6g}"
"""Labels of ticks: 0.002, 2e-09."""


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
        series=("#0072b2", "#d55e00", "#009e73", "#c86a9e", "#c98500", "#3a9ad9"),
    ),
    "dark": Theme(
        face="#161b22",
        ink="#e6edf3",
        muted="#9aa4af",
        grid="#2b323b",
        series=("#56b4e9", "#f0883e", "#3fbf93", "#e08fc0", "#f0d442", "#8c9eff"),
    ),
}
"""Okabe and Ito's palette, its light hues darkened on white, and a lighter one on black."""


@dataclass(frozen=True)
class Figure:
    """One picture of a :class:`~sapo_megatron.runs.read.Run`, or of whatever ``draw`` knows.

    ``draw`` fills an empty canvas, ``available`` says whether there is something to draw.
    """

    name: str
    title: str
    caption: str
    available: Callable[[Any], bool]
    draw: Callable[[Canvas, Any, Theme], None]
    height: float = HEIGHT


def drawn(figure: Figure, run: Any, theme: Theme) -> FigureCanvasAgg:
    """The figure on a canvas, everything at its place."""
    settings = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.face),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), theme.ink),
        **dict.fromkeys(("axes.labelcolor", "text.color"), theme.ink),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.4,
        "font.size": 10.5,
        "lines.linewidth": 1.8,
    }
    with style.context(settings):
        canvas = Canvas(figsize=(WIDTH, figure.height), dpi=DPI, layout="constrained")
        made = FigureCanvasAgg(canvas)
        figure.draw(canvas, run, theme)
        canvas.suptitle(figure.title, fontsize=11.5, fontweight="bold")
        made.draw()
    return made


def render(figure: Figure, run: Any, theme: Theme) -> bytes:
    """The figure as PNG."""
    image = Image.fromarray(np.asarray(drawn(figure, run, theme).buffer_rgba())).convert("RGB")
    png = io.BytesIO()
    few = image.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(png, "png", optimize=True)
    return png.getvalue()


def has(*names: str) -> Callable[[Run], bool]:
    """Whether the run logged any of these."""
    return lambda run: any(run.has(name) for name in names)


def legend(ax: Axes, columns: int = 3) -> None:
    """Name what was drawn, above the axes, where it covers nothing."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def curve(ax: Axes, x: Floats, y: Floats, color: str, label: str | None = None) -> None:
    """A series over steps: few points with markers, many as a running mean over the raw ones."""
    marker = "o" if len(y) <= 30 else None
    if len(y) >= SMOOTH_FROM:
        ax.plot(x, y, color=color, alpha=0.3, linewidth=0.9)
        window = np.ones(len(y) // 25 * 2 + 1)
        y = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
    (line,) = ax.plot(x, y, color=color, label=label, marker=marker, markersize=3.5)
    line.set(clip_on=False, zorder=3)  # whole also where it lies on the axis


def dots(ax: Axes, x: Floats, y: Floats, color: str, label: str) -> None:
    """The values of a series as faint points."""
    size = 4 if len(y) <= 200 else 2.5
    ax.plot(x, y, "o", color=color, alpha=0.6, markersize=size, markeredgewidth=0, label=label)


def rim(theme: Theme) -> list[withStroke]:
    """What sets a line off from what it crosses: an edge in the colour of the page."""
    return [withStroke(linewidth=4, foreground=theme.face)]


def median_curve(ax: Axes, x: Floats, y: Floats, theme: Theme) -> None:
    """A spiky series, not all 0, over steps: its running median beside the points.

    A value that a logarithmic axis has no place for is a triangle at the lower edge.
    """
    reach = max(2, len(y) // 25)
    middle = np.array([np.median(y[max(0, i - reach) : i + reach + 1]) for i in range(len(y))])
    above, color = y > 0, theme.series[0]
    dots(ax, x[above], y[above], color, "each step")
    (line,) = ax.plot(x, np.where(middle > 0, middle, np.nan), color=color, label="running median")
    line.set(path_effects=rim(theme))
    if not above.all():
        edge = np.full((~above).sum(), 0.02)
        ax.plot(x[~above], edge, "v", color=color, label="0", transform=ax.get_xaxis_transform())


def value_axis(ax: Axes, label: str, *, share: bool = False, log: bool = False) -> None:
    """Label, limits and ticks of the y axis, for all that is drawn so far.

    From 0 up, unless something is negative or different values lie close together; 0 to 1 where
    all is 0. It spans enough that rounding errors do not fill the picture: a thousandth of the
    values, or a factor of 10 on a logarithmic axis.
    """
    least, most = ax.dataLim.intervaly
    ax.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    if log and most > 0:
        least = ax.dataLim.minposy
        room = max(1.3, (10 * least / most) ** 0.5)
        ax.set_yscale("log")
        ax.set_ylim(least / room, most * room)
        subs = (1.0, 2.0, 5.0) if most < 30 * least else (1.0,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif 0 <= least < 0.75 * most or 0 <= least == most:
        ax.set_ylim(0, 1.05 * most or 1)
    else:
        room = max(0.05 * (most - least), 5e-4 * max(-least, most))
        ax.set_ylim(least - room, most + room)
    ax.yaxis.set_major_formatter(percent if share else PLAIN)
    ax.set_ylabel(label)


def percent(value: float, _: object) -> str:
    """The label of a share's tick: 0.2% for 0.002."""
    return f"{100 * value:.6g}%"


def step_axis(ax: Axes, averaged: int = 1) -> None:
    """Whole numbers below a figure; each of its bars is the mean of ``averaged`` measurements."""
    ax.set_xlabel("step" if averaged == 1 else f"step (each bar: mean of {averaged} measurements)")
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))


def grouped(steps: Floats, rows: Floats, most: int = BARS) -> tuple[Floats, Floats, int]:
    """Means over groups of neighbouring measurements, at most ``most`` groups.

    ``rows``: ``[n, len(steps)]``. Returns the steps' and the rows' means, and a group's size.
    """
    size = -(-len(steps) // most)
    starts = np.arange(0, len(steps), size)
    counts = np.diff(np.append(starts, len(steps)))
    rows = np.add.reduceat(rows, starts, axis=1) / counts
    return np.add.reduceat(steps, starts) / counts, rows, size


def stacked(ax: Axes, theme: Theme, steps: Floats, parts: Mapping[str, Floats]) -> float:
    """Bars of labelled parts on one another, negative ones below 0. Returns a bar's width."""
    width = 0.8 * float(np.diff(steps).min()) if len(steps) > 1 else 0.8
    above, below = np.zeros(len(steps)), np.zeros(len(steps))
    for i, (label, height) in enumerate(parts.items()):
        base = np.where(height < 0, below, above)
        color = theme.series[i % len(theme.series)]
        hatch = "//" if i >= len(theme.series) else None
        ax.bar(steps, height, width, base, color=color, label=label, hatch=hatch)
        above, below = above + height.clip(min=0), below + height.clip(max=0)
    ax.grid(axis="x", visible=False)
    return width


@dataclass(frozen=True)
class Panel:
    """Some metrics over the steps on one pair of axes."""

    ylabel: str
    names: dict[str, str]
    """Metric -> its label; what the run lacks is left out."""
    percent: bool = False
    log: bool = False
    """A logarithmic axis and a running median, for one metric that spans orders of magnitude."""


def curves(name: str, title: str, caption: str, *panels: Panel, height: float = HEIGHT) -> Figure:
    """A figure of panels above one another, without those that the run has nothing for."""

    def draw(canvas: Canvas, run: Run, theme: Theme) -> None:
        shown = [p for p in panels if has(*p.names)(run)]
        axes = np.atleast_1d(canvas.subplots(len(shown), sharex=True))
        told: set[str] = set()
        for ax, panel in zip(axes, shown, strict=True):
            labels = _draw_panel(ax, panel, run, theme)
            if panel.log or (len(panel.names) > 1 and not labels <= told):
                legend(ax)
            told |= labels
        canvas.align_ylabels(axes)
        step_axis(axes[-1])

    available = has(*(metric for panel in panels for metric in panel.names))
    return Figure(name, title, caption, available, draw, height)


def _draw_panel(ax: Axes, panel: Panel, run: Run, theme: Theme) -> set[str]:
    """Fill ``ax``; the labels of what was drawn."""
    held = {name: run.series(name) for name in panel.names if run.has(name)}
    for color, (name, label) in zip(theme.series, panel.names.items(), strict=False):
        if name in held and panel.log and held[name][1].max() > 0:
            median_curve(ax, *held[name], theme)
        elif name in held:
            curve(ax, *held[name], color, label)
    value_axis(ax, panel.ylabel, share=panel.percent, log=panel.log)
    return {panel.names[name] for name in held}
