"""Whether SAPO is steadier than GRPO, GSPO and VESPO, over mini-batches a rollout and staleness.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.stability run
    python -m benchmarks.studies.stability figures

``run`` trains what is missing of the runs of ``cases.py`` and writes all results into
``results.json``; ``figures`` makes the tables and figures of ``docs/stability.md`` of that file
alone. The page says what is measured, what counts as a collapse, and what was found.
"""

import argparse
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

from benchmarks.studies.stability import cases

RESULTS = cases.HERE / "results.json"
KEYS = ("loss", "n", "k", "old_policy", "seed")
"""What tells one run from another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("run", help="train what is missing, then write results.json")
    make.add_argument("--out", type=Path, default=cases.ROOT / "runs" / "stability")
    make.add_argument("--jobs", type=int, default=2, help="runs at a time, one process each")
    make.set_defaults(command=lambda words: run(words.out.resolve(), words.jobs))
    draw = commands.add_parser("figures", help="draw what results.json has")
    draw.set_defaults(command=lambda words: figures())
    words = parser.parse_args()
    words.command(words)


def run(out: Path, jobs: int) -> None:
    """Train what neither ``out`` nor ``results.json`` has, and collect; a process for each run."""
    out.mkdir(parents=True, exist_ok=True)
    known = {tuple(found[key] for key in KEYS): found for found in json.loads(RESULTS.read_text())}
    for case in cases.cases():
        path, found = out / f"{case.name}.json", known.get(tuple(asdict(case)[k] for k in KEYS))
        if found and not path.exists():
            path.write_text(json.dumps(found))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sapo_megatron.training.loop"])
    with ProcessPoolExecutor(jobs, context, cases.quietly, max_tasks_per_child=1) as pool:
        pool.submit(cases.cold_start, out).result()
        list(pool.map(cases.before, cases.SEEDS, repeat(out)))
        for made in as_completed([pool.submit(cases.run, case, out) for case in cases.cases()]):
            made.result()
            collect(out)


def collect(out: Path) -> None:
    """Write ``results.json`` of the results that ``out`` has."""
    found = [out / f"{case.name}.json" for case in cases.cases()]
    runs = [json.loads(path.read_text()) for path in found if path.exists()]
    lines = ",\n".join(json.dumps(finite(run)) for run in runs)
    RESULTS.write_text(f"[\n{lines}\n]\n")


def finite(thing: Any) -> Any:
    """With None for numbers that JSON has not, and six digits of the others."""
    if isinstance(thing, dict):
        return {key: finite(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [finite(value) for value in thing]
    if isinstance(thing, float):
        return float(f"{thing:.6g}") if math.isfinite(thing) else None
    return thing


def figures() -> None:
    """Tables and figures of the page."""
    from benchmarks.studies.stability import drawing

    results = drawing.read(RESULTS)
    drawing.write_page(results)
    drawing.draw(results)


if __name__ == "__main__":
    main()
