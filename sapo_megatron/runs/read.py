"""What a run folder holds, read back: the recipe, the series, the summary and the samples."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.runs.samples import NAME, ShownGroup, places_of, read_groups
from sapo_megatron.runs.timeline import Event, read_timeline

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One run's records, by step."""

    recipe: Recipe
    records: list[dict[str, Any]]
    """Lines of ``metrics.jsonl`` in the order of their steps, from step 0: the evaluation before
    the first step, which the summary tells where no line does."""
    summary: dict[str, Any]
    """``summary.json``; empty where the run has not ended."""
    timeline: list[Event] = field(default_factory=list)
    """Of its last steps."""
    samples: list[ShownGroup] = field(default_factory=list)
    """Of the last step that has some."""

    def names(self, prefix: str) -> list[str]:
        """Names of the metrics that begin with ``prefix``, sorted."""
        return sorted({n for record in self.records for n in record if n.startswith(prefix)})

    def series(self, name: str) -> tuple[Floats, Floats]:
        """(steps, values) where the metric was logged and finite."""
        points = [(r["step"], r[name]) for r in self.records if _is_number(r.get(name))]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def table(self, names: list[str]) -> tuple[Floats, Floats]:
        """(steps, ``[len(names), steps]``) of the steps that logged any of these; else NaN."""
        held = [dict(zip(*self.series(name), strict=True)) for name in names]
        steps = sorted({step for series in held for step in series})
        rows = [[series.get(step, np.nan) for step in steps] for series in held]
        return np.array(steps), np.array(rows).reshape(len(names), len(steps))

    def has(self, name: str) -> bool:
        """Whether the metric was ever logged with a finite value."""
        return any(_is_number(r.get(name)) for r in self.records)

    def histogram(self, name: str) -> tuple[Floats, Floats] | None:
        """(edges, counts) added up over the steps whose edges are those of the last one."""
        held = [r[name]["hist"] for r in self.records if isinstance(r.get(name), dict)]
        if not held:
            return None
        edges = held[-1]["edges"]
        counts = np.sum([h["counts"] for h in held if h["edges"] == edges], axis=0)
        if not counts.sum():
            return None
        return np.asarray(edges, dtype=np.float64), counts.astype(np.float64)

    def points(self, name: str) -> Floats:
        """``[n, 3]``: step, x and y of every point of a scatter plot."""
        held = [
            (r["step"], r[name]["points"]) for r in self.records if isinstance(r.get(name), dict)
        ]
        table = [(step, x, y) for step, points in held for x, y in points]
        return np.array(table, dtype=np.float64).reshape(-1, 3)

    def evaluations(self) -> dict[str, tuple[float, float]]:
        """(before, after) of each held-out score, from the summary or else the first and last."""
        scores = self.summary.get("eval") or {}
        before, after = scores.get("before") or {}, scores.get("after") or {}
        if after:
            both = [n for n in after if _is_number(before.get(n)) and _is_number(after[n])]
            return {n: (before[n], after[n]) for n in both}
        curves = {n.removeprefix("eval/"): self.series(n)[1] for n in self.scores()}
        return {n: (float(y[0]), float(y[-1])) for n, y in curves.items() if len(y) > 1}

    def scores(self) -> list[str]:
        """Names of the held-out accuracies: ``eval/avg@k`` and ``eval/pass@k``."""
        return [n for n in self.names("eval/") if "@" in n and self.has(n)]

    @property
    def steps_done(self) -> int:
        """Steps behind the run, also where it was cut off."""
        return int(self.summary.get("steps", self.records[-1]["step"]))

    @property
    def wall_s(self) -> float | None:
        """Seconds of the whole run, with the cold start where it was made and not found.

        Of the steps alone where there is no summary; None where no step was timed either.
        """
        if _is_number(self.summary.get("wall_s")):
            return float(self.summary["wall_s"])
        return float(self.series("perf/step_s")[1].sum()) if self.has("perf/step_s") else None

    @property
    def world_size(self) -> int | None:
        """Ranks of the run; None where it has not ended."""
        return self.summary.get("world_size")


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError when it is none, or one without metrics."""
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"report: expected a run folder, got {folder}: no such folder")
    records = _read_records(path)
    if not records:
        raise UserError(
            f"{path}: expected at least one step's metrics, got none; "
            f"give the folder of a run that made a step"
        )
    summary = folder / "summary.json"
    try:
        held = json.loads(summary.read_text()) if summary.exists() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{summary}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(held, dict):
        raise UserError(f"{summary}: expected a JSON object, got {type(held).__name__}")
    before = (held.get("eval") or {}).get("before")
    if before and records[0]["step"] > 0:
        records.insert(0, {"step": 0} | {f"eval/{name}": score for name, score in before.items()})
    timeline = read_timeline(folder / "timeline.json")
    places = places_of(folder / NAME)
    samples = read_groups(folder / NAME, places[max(places)]) if places else []
    return Run(load(folder / "config.yaml"), records, held, timeline, samples)


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The lines by step; a last line that was cut off while being written is left out."""
    by_step: dict[int, dict[str, Any]] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            by_step.setdefault(record["step"], {}).update(record)
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: expected a JSON object with step, got {line[:60]!r}"
            ) from None
    return [by_step[step] for step in sorted(by_step)]


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)
