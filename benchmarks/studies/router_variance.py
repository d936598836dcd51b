"""How much of Var[log r] the router makes, by the number of mini-batches a rollout.

    OMP_NUM_THREADS=1 python benchmarks/studies/router_variance.py

runs the tiny MoE and a dense model of the same active size, with and without R2, N = 1, 2, 4, 8 and
16, on several seeds, and writes the tables and figures of ``docs/router-variance.md``. Runs that a
folder already has are not run again. ``docs/router-variance.md`` says what is measured, and what
was found.
"""

import argparse
import json
import logging
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECIPE = ROOT / "recipes" / "tiny-moe-cpu.yaml"
PAGE = ROOT / "docs" / "router-variance.md"
MINI_BATCHES = (1, 2, 4, 8, 16)
STEPS = 10
FIRST_STEP = 3
"""Steps before it do not count: Adam's moments have not settled."""
SETTINGS = {
    "parallel.expert_model_parallel_size": 1,
    "model.tokenizer": ROOT / "recipes" / "tiny-moe" / "tokenizer.model",
    "rollout.rollout_batch_size": 32,
    "train.steps": STEPS,
    "optimizer.lr_warmup_steps": 0,
    "eval.num_problems": 32,
    "eval.k": 1,
    "eval.every": 0,
}
KINDS = {"MoE": "#1b6ca8", "MoE, R2": "#d95f02", "dense": "#4d4d4d"}
"""Model and replay, and the colour of its lines."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One run."""

    kind: str
    mini_batches: int
    seed: int

    def folder(self, out: Path) -> Path:
        kind = self.kind.lower().replace(", ", "-")
        return out / f"{kind}-n{self.mini_batches}-seed{self.seed}"

    @property
    def first(self) -> "Case":
        """The run whose cold start this one begins with."""
        return Case(self.kind.removesuffix(", R2"), 1, self.seed)

    def settings(self, out: Path) -> dict[str, Any]:
        """What differs from the recipe. The split is of a rollout's last mini-batch."""
        settings = SETTINGS | {
            "train.run_dir": self.folder(out),
            "train.seed": self.seed,
            "train.num_mini_batches": self.mini_batches,
            "routing.decompose_every": self.mini_batches,
            "routing.router_replay": "R2" if self.kind.endswith("R2") else "disabled",
        }
        return settings | ({"model.path": HERE / "dense"} if self.kind == "dense" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "router-variance")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one process each")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    cases = [
        Case(kind, n, seed)
        for seed in range(1, arguments.seeds + 1)
        for n in MINI_BATCHES
        for kind in KINDS
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        first = [case for case in cases if case == case.first]
        list(pool.map(lambda case: run(case, arguments.out), first))
        list(pool.map(lambda case: run(case, arguments.out), cases))
    results = {case: measure(case.folder(arguments.out)) for case in cases}
    write_page(results)
    draw(results)


def run(case: Case, out: Path) -> None:
    """Train a case, unless its folder holds it."""
    folder = case.folder(out)
    if (folder / "summary.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for cold_start in case.first.folder(out).glob("cold-start-*"):
        if case != case.first:
            (folder / cold_start.name).symlink_to(cold_start.resolve())
    words = [f"{key}={value}" for key, value in case.settings(out).items()]
    command = [sys.executable, "-m", "sapo_megatron", "train", str(RECIPE), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: {done.stderr[-2000:]}")
    logger.info("%s", folder.name)


def measure(folder: Path) -> dict[str, float]:
    """Means over the steps that count."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"] >= FIRST_STEP]
    names = {name for line in lines for name, v in line.items() if isinstance(v, int | float)}
    found = {
        name: statistics.fmean(line[name] for line in lines if line.get(name) is not None)
        for name in names
    }
    total = found["variance/total"]
    router = found["variance/router"] + found["variance/cov"] / 2
    found["share"] = router / total if total > 0 else math.nan
    found["violations"] = sum(line["sapo/bound_violations"] for line in lines)
    scores = json.loads((folder / "summary.json").read_text())["eval"]
    found |= {f"{when} pass@1": scores[when]["pass@1"] for when in ("before", "after")}
    return found


def over_seeds(
    results: dict[Case, dict[str, float]], kind: str, n: int, name: str
) -> tuple[float, float, float]:
    """(median, least, greatest) over the seeds; NaNs where it was not measured."""
    values = [
        found[name]
        for case, found in results.items()
        if case.kind == kind and case.mini_batches == n and math.isfinite(found.get(name, math.nan))
    ]
    return (statistics.median(values), min(values), max(values)) if values else (math.nan,) * 3


def write_page(results: dict[Case, dict[str, float]]) -> None:
    """Replace the tables between the page's markers."""
    page = PAGE.read_text()
    for name, rows in tables(results).items():
        head, *body = rows
        lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        marker = f"<!-- table: {name} -->"
        page, found = re.subn(
            rf"{marker}.*?<!-- end -->", f"{marker}\n{text}\n<!-- end -->", page, flags=re.DOTALL
        )
        assert found == 1, f"{PAGE}: expected {marker} once, got it {found} times"
    PAGE.write_text(page)


def tables(results: dict[Case, dict[str, float]]) -> dict[str, list[list[str]]]:
    off_policy = MINI_BATCHES[1:]

    def cells(columns: Iterable[tuple[str, str]]) -> list[list[str]]:
        return [
            [kind, str(n), *(shown(over_seeds(results, kind, n, c), f) for c, f in columns)]
            for kind in KINDS
            for n in off_policy
        ]

    split = [(f"variance/{name}", "{:.1e}") for name in ("total", "weights", "router", "cov")]
    moved = [
        ("routing/slot_flip", "{:.4f}"),
        ("variance/by_layers/0", "{:.1e}"),
        ("variance/by_layers/1", "{:.1e}"),
        ("variance/by_layers/2", "{:.1e}"),
        ("variance/by_layers/3-4", "{:.1e}"),
    ]
    bound = [
        ("sapo/seq_var", "{:.1e}"),
        ("sapo/small_dispersion_share", "{:.3f}"),
        ("sapo/bound_lhs", "{:.1e}"),
        ("sapo/bound_rhs", "{:.1e}"),
        ("sapo/gate_distance", "{:.1e}"),
        ("violations", "{:.0f}"),
        ("after pass@1", "{:.2f}"),
    ]
    return {
        "split": [
            ["run", "N", "Var z", "Var a (weights)", "Var b (router)", "2 Cov", "router share"],
            *cells([*split, ("share", "{:.3f}")]),
        ],
        "flips": [
            ["run", "N", "flip fraction", "0 layers", "1 layer", "2 layers", "3 layers"],
            *[row for row in cells(moved) if row[0] != "dense"],
        ],
        "bound": [
            ["run", "N", "Var_i", "share < 0.02", "D_i", "bound", "gate distance", "violations",
             "pass@1 after"],
            *cells(bound),
        ],
    }  # fmt: skip


def shown(values: tuple[float, float, float], form: str) -> str:
    median, least, greatest = values
    if math.isnan(median):
        return "-"
    return f"{form.format(median)} ({form.format(least)} to {form.format(greatest)})"


def draw(results: dict[Case, dict[str, float]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    panels = (
        ("variance/total", "Var[log r] of the last mini-batch (nats$^2$)", "log"),
        ("share", "router's share of Var[log r]", "linear"),
        ("routing/slot_flip", "flip fraction", "log"),
    )
    for ax, (name, label, scale) in zip(axes, panels, strict=True):
        for kind, colour in KINDS.items():
            points = [(n, *over_seeds(results, kind, n, name)) for n in MINI_BATCHES[1:]]
            points = [p for p in points if math.isfinite(p[1])]
            if not points:
                continue
            n, median, least, greatest = zip(*points, strict=True)
            ax.plot(n, median, marker="o", color=colour, label=kind)
            ax.fill_between(n, least, greatest, color=colour, alpha=0.15, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(MINI_BATCHES[1:], [str(n) for n in MINI_BATCHES[1:]])
        ax.set_yscale(scale)
        ax.set_xlabel("mini-batches a rollout, N")
        ax.set_title(label, fontsize=10)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(PAGE.parent / "router-variance.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
