"""``sapo-megatron report RUN``: a run folder -> PNGs and one self-contained HTML page."""

import base64
import logging
from dataclasses import dataclass
from pathlib import Path

import jinja2

from sapo_megatron.commands.report.drawing import THEMES, Figure, render
from sapo_megatron.commands.report.figures import FIGURES
from sapo_megatron.files import whole_folder
from sapo_megatron.runs.read import Run, read_run
from sapo_megatron.runs.trackers import duration

logger = logging.getLogger(__name__)

SECTIONS = ("Learning", "Ratios and the gate", "The router", "Optimisation", "Speed")


@dataclass(frozen=True)
class Picture:
    """A drawn figure as the template wants it: images as base64 PNG, by theme."""

    title: str
    caption: str
    images: dict[str, str]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report/*.png`` and ``report/index.html`` into a run folder; the page's path.

    The old report, if any, is replaced only when the new one is whole. Figures whose series the
    run does not hold are left out and named at the end of the page. Raises UserError for a folder
    without metrics.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    pictures: dict[str, list[Picture]] = {section: [] for section in SECTIONS}
    missing: list[str] = []
    with whole_folder(run_dir / "report") as folder:
        for figure in FIGURES:
            if not figure.available(run):
                missing.append(figure.title)
                continue
            pictures[figure.section].append(_draw(figure, run, folder))
        page = _template().render(
            name=run.recipe.name,
            tiles=_tiles(run),
            rows=_rows(run),
            sections={name: drawn for name, drawn in pictures.items() if drawn},
            missing=missing,
        )
        (folder / "index.html").write_text(page, encoding="ascii", errors="xmlcharrefreplace")
    logger.info("report: %s", run_dir / "report" / "index.html")
    return run_dir / "report" / "index.html"


def _draw(figure: Figure, run: Run, folder: Path) -> Picture:
    """Draw in every theme for the page; the light one is also a file of its own."""
    images = {theme: render(figure, run, THEMES[theme]) for theme in THEMES}
    (folder / f"{figure.name}.png").write_bytes(images["light"])
    encoded = {theme: base64.b64encode(png).decode("ascii") for theme, png in images.items()}
    return Picture(figure.title, figure.caption, encoded)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sapo_megatron.commands.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html")


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The headline: (label, value, note) of each evaluation and of the router."""
    tiles = []
    for name, (before, after) in run.evaluations().items():
        note = f"from {before:.1%} ({(after - before) * 100:+.1f} points)"
        tiles.append((f"held-out {name}", f"{after:.1%}", note))
    for label, value, step in _router_numbers(run):
        tiles.append((label, value, f"at step {step}"))
    return tiles


def _router_numbers(run: Run) -> list[tuple[str, str, int]]:
    """(label, value, step) of what was last logged about the router."""
    names = {
        "variance/router_share": "router's share of the variance",
        "routing/flip_fraction": "experts that changed",
    }
    last = {label: run.series(name) for name, label in names.items() if run.has(name)}
    return [(label, f"{y[-1]:.1%}", int(x[-1])) for label, (x, y) in last.items()]


def _rows(run: Run) -> list[tuple[str, str]]:
    """The table of what was run and what came out."""
    recipe, p, r = run.recipe, run.recipe.parallel, run.recipe.rollout
    rows = [
        ("Steps", f"{run.steps_done} of {recipe.train.steps}"),
        ("Wall time", duration(run.wall_s) if run.wall_s is not None else "not recorded"),
        ("Loss", recipe.algorithm.loss_type),
    ]
    if recipe.algorithm.loss_type == "sapo":
        a = recipe.algorithm
        rows.append(("Temperatures", f"tau_pos {a.tau_pos:g}, tau_neg {a.tau_neg:g}"))
    else:
        low, high = recipe.algorithm.clip_range
        rows.append(("Clip range", f"low {low:g}, high {high:g}"))
    rows += [
        ("Aggregation", recipe.algorithm.loss_agg_mode),
        ("Advantages", recipe.algorithm.adv_estimator),
        (
            "Batch",
            f"{r.rollout_batch_size} prompts x {r.num_generations} responses, "
            f"{recipe.train.num_mini_batches} mini-batches",
        ),
    ]
    for name, (before, after) in run.evaluations().items():
        rows.append((f"Held-out {name}", f"{before:.1%} before, {after:.1%} after"))
    for label, value, step in _router_numbers(run):
        rows.append((label.capitalize(), f"{value} at step {step}"))
    layout = (
        f"TP {p.tensor_model_parallel_size}, PP {p.pipeline_model_parallel_size}, "
        f"CP {p.context_parallel_size}, EP {p.expert_model_parallel_size}, "
        f"ETP {p.expert_tensor_parallel_size}"
    )
    if run.world_size is not None:
        layout = f"{run.world_size} ranks: {layout}"
    return [*rows, ("Layout", layout)]
