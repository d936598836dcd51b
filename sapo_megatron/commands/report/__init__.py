"""``sapo-megatron report RUN``: a run folder -> PNGs and one self-contained HTML page."""

import base64
import logging
from itertools import chain
from pathlib import Path

import jinja2

from sapo_megatron.commands.report.drawing import SMOOTH_FROM, THEMES, Figure, render
from sapo_megatron.commands.report.figures import SECTIONS
from sapo_megatron.commands.report.router_figures import POOLED
from sapo_megatron.commands.samples import facts, headline, readable
from sapo_megatron.files import whole_folder
from sapo_megatron.routing.variance import LEAST_SWAPS, Estimate
from sapo_megatron.runs.journal import SPLITS
from sapo_megatron.runs.read import Run, read_run
from sapo_megatron.runs.samples import ShownGroup
from sapo_megatron.runs.trackers import duration

logger = logging.getLogger(__name__)


def write_report(run_dir: str | Path) -> Path:
    """Write ``report/*.png`` and ``report/index.html`` into a run folder; the page's path.

    The old report, if any, is replaced only when the new one is whole. Figures whose series the
    run does not hold are left out and named at the end of the page. Raises UserError for a folder
    without metrics.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    pictures: dict[str, list[tuple[Figure, dict[str, bytes]]]] = {}
    missing: list[str] = []
    for section, figures in SECTIONS.items():
        held = [figure for figure in figures if figure.available(run)]
        pictures[section] = [
            (figure, {name: render(figure, run, theme) for name, theme in THEMES.items()})
            for figure in held
        ]
        missing += [figure.title for figure in figures if figure not in held]
    page = _template().render(
        name=run.recipe.name,
        tiles=_tiles(run),
        rows=_rows(run),
        smoothed=run.steps_done >= SMOOTH_FROM,
        sections={name: drawn for name, drawn in pictures.items() if drawn},
        missing=missing,
        samples=_samples(run),
    )
    # Nothing is written before all is drawn, which takes seconds in which a process may be killed.
    with whole_folder(run_dir / "report") as folder:
        for figure, images in chain.from_iterable(pictures.values()):
            (folder / f"{figure.name}.png").write_bytes(images["light"])
        (folder / "index.html").write_text(page, encoding="ascii", errors="xmlcharrefreplace")
    logger.info("report: %s", run_dir / "report" / "index.html")
    return run_dir / "report" / "index.html"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sapo_megatron.commands.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    environment.filters |= {"headline": headline, "readable": readable}
    environment.globals["facts"] = facts
    return environment.get_template("template.html")


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The headline: (label, value, note) of each evaluation and of the router."""
    tiles = []
    for name, (before, after) in run.evaluations().items():
        note = f"from {before:.1%} ({(after - before) * 100:+.1f} points)"
        tiles.append((f"held-out {name}", f"{after:.1%}", note))
    return tiles + _router_numbers(run)


def _router_numbers(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, note) of what was last logged about the router."""
    numbers = []
    for split, label in SPLITS.items():
        name = f"{split}/{POOLED}"
        if run.has(f"{name}_low"):
            series = [run.series(f"{name}{end}") for end in ("", "_low", "_high")]
            share = Estimate(*(float(values[-1]) for _, values in series))
            numbers.append((label, str(share), f"at step {series[0][0][-1]:.0f}, over a window"))
        elif run.has(f"{split}/swaps"):
            numbers.append((label, "unknown", f"of fewer than {LEAST_SWAPS} swaps"))
    if run.has("routing/slot_flip"):
        steps, values = run.series("routing/slot_flip")
        numbers.append(("experts that changed", f"{values[-1]:.1%}", f"at step {steps[-1]:.0f}"))
    return numbers


def _samples(run: Run) -> list[ShownGroup]:
    """The best, the worst and one other group of the last step."""
    first = {group.picked: group for group in reversed(run.samples)}
    return [group for group in run.samples if group is first[group.picked]]


def _time(run: Run) -> str:
    """What the run took, and what is in it."""
    if run.wall_s is None:
        return "not recorded"
    if "wall_s" not in run.summary:
        return f"{duration(run.wall_s)} in steps, without evaluation and checkpoints"
    cold_start = ", cold start included" if run.recipe.cold_start.steps else ""
    return duration(run.wall_s) + cold_start


def _rows(run: Run) -> list[tuple[str, str]]:
    """The table of what was run and what came out: labels and values."""
    recipe, p, r, a = run.recipe, run.recipe.parallel, run.recipe.rollout, run.recipe.algorithm
    gate = {"Temperatures": f"tau_pos {a.tau_pos:g}, tau_neg {a.tau_neg:g}"}
    if a.loss_type != "sapo":
        gate = {"Clip range": "low {:g}, high {:g}".format(*a.clip_range)}
    ranks = f"{run.world_size} ranks: " if run.world_size is not None else ""
    table = {
        "Steps": f"{run.steps_done} of {recipe.train.steps}",
        "Wall time": _time(run),
        "Loss": a.loss_type,
        **gate,
        "Aggregation": a.loss_agg_mode,
        "Advantages": a.adv_estimator,
        "Batch": f"{r.rollout_batch_size} prompts x {r.num_generations} responses, "
        f"{recipe.train.num_mini_batches} mini-batches",
        **{
            f"Held-out {name}": f"{before:.1%} before, {after:.1%} after"
            for name, (before, after) in run.evaluations().items()
        },
        **{label.capitalize(): f"{value} {note}" for label, value, note in _router_numbers(run)},
        "Layout": f"{ranks}TP {p.tensor_model_parallel_size}, PP {p.pipeline_model_parallel_size}, "
        f"CP {p.context_parallel_size}, EP {p.expert_model_parallel_size}, "
        f"ETP {p.expert_tensor_parallel_size}",
    }
    return list(table.items())
