"""Which runs the study of stability makes, and how one is made."""

import json
import logging
import math
import os
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sapo_megatron.training.inputs import Inputs

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RECIPE = ROOT / "recipes" / "tiny-moe-cpu.yaml"

SEEDS = (1, 2, 3)
"""Of prompts and samples. All runs start from the weights of one cold start, with the recipe's own
seed."""
LOSSES = ("sapo", "grpo", "gspo", "vespo")
MINI_BATCHES = (1, 4, 16)
"""N, mini-batches a rollout, with ``rollout.async_steps`` 0."""
STALENESS = (0, 2, 8)
"""K, ``rollout.async_steps``, with ``ASYNC_N`` mini-batches a rollout."""
ASYNC_N = 4
UPDATES = 128
"""Of every run, of mini-batches of ``PROMPTS`` x ``RESPONSES`` responses: with N the size of the
rollout grows, as in arXiv 2602.10693, and neither the mini-batch nor the number of updates."""
PROMPTS, RESPONSES = 4, 8
EVAL_EVERY = 16
"""Updates between evaluations."""
PROBLEMS, SAMPLES = 128, 4
"""Held-out problems of an evaluation, and responses to each."""
PROBLEMS_FILE = "held-out.jsonl"
SCORE = f"avg@{SAMPLES}"
SETTINGS: dict[str, Any] = {
    "model.tokenizer": ROOT / "recipes" / "tiny-moe" / "tokenizer.model",
    "parallel.expert_model_parallel_size": 1,
    "rollout.num_generations": RESPONSES,
    "routing.decompose_every": 4,
    "optimizer.lr": 3e-4,
    "optimizer.lr_warmup_steps": 0,
    "eval.num_problems": PROBLEMS,
    "eval.k": SAMPLES,
}
"""Of every run, beside the recipe; each loss has its own clip range or temperatures by default."""

WATCHED = ("ratio/log_var", "ratio/max", "actor/grad_norm", "actor/pg_loss")
"""Metrics that have to be finite at every step."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One run."""

    loss: str
    n: int
    k: int
    old_policy: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.old_policy}-n{self.n}-k{self.k}-seed{self.seed}"

    def settings(self, out: Path) -> dict[str, Any]:
        """What differs from the recipe, without the run's folder."""
        (weights,) = (out / "cold-start").glob("cold-start-*")
        return SETTINGS | {
            "model.path": weights,
            "model.init": "pretrained",
            "cold_start.steps": 0,
            "data.eval": json.dumps({"path": str(out / PROBLEMS_FILE)}),
            "data.train.seed": self.seed,
            "train.seed": self.seed,
            "train.steps": UPDATES // self.n,
            "train.num_mini_batches": self.n,
            "rollout.rollout_batch_size": PROMPTS * self.n,
            "rollout.async_steps": self.k,
            "algorithm.loss_type": self.loss,
            "algorithm.old_policy": self.old_policy,
            "eval.every": EVAL_EVERY // self.n,
        }


def cases() -> list[Case]:
    """All runs, what says most first: a seed of most conditions, then N = 16 on all; last controls.

    Controls are the losses at N = 1, where ratios are 1 and all of them have one gradient, and
    ``old_policy: rollout`` in step, where both engines have one policy.
    """
    sixteen, four, one = ([(loss, n, 0, "recompute") for loss in LOSSES] for n in (16, 4, 1))
    eight, two = (
        [
            *((loss, ASYNC_N, k, "recompute") for loss in ("sapo", "grpo", "vespo")),
            ("sapo", ASYNC_N, k, "rollout"),
        ]
        for k in (8, 2)
    )
    controls = [*one, ("sapo", ASYNC_N, 0, "rollout")]
    first, *others = SEEDS
    made = [Case(*row, first) for row in [*four, *sixteen, *eight]]
    made += [Case(*row, seed) for seed in others for row in sixteen]
    made += [Case(*row, first) for row in two]
    for rows in (eight, four, two):
        made += [Case(*row, seed) for seed in others for row in rows]
    return made + [Case(*row, seed) for seed in SEEDS for row in controls]


def quietly() -> None:
    """Set up a process that trains."""
    os.nice(19)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)


def cold_start(out: Path) -> None:
    """Make the weights that all runs start from, and the held-out problems, which it never saw."""
    folder = out / "cold-start"
    if (out / PROBLEMS_FILE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    inputs = _train(SETTINGS | {"train.steps": 0}, folder).inputs
    rows = [json.dumps({"prompt": p.text, "answer": p.answer}) for p in inputs.problems]
    (out / PROBLEMS_FILE).write_text("\n".join(rows) + "\n")
    logger.info("cold start")


def before(seed: int, out: Path) -> float:
    """What the cold start scores with a seed's samples."""
    folder = out / f"before-seed{seed}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _train(Case("sapo", 1, 0, "recompute", seed).settings(out) | {"train.steps": 0}, folder)
    return json.loads((folder / "summary.json").read_text())["eval"]["before"][SCORE]


def run(case: Case, out: Path) -> None:
    """Train a case, unless ``out`` has its result."""
    folder, result = out / case.name, out / f"{case.name}.json"
    if result.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    failed = _train(case.settings(out), folder).failed
    found = asdict(case) | {"failed": failed} | measure(case, folder)
    found["curve"].insert(0, [0, before(case.seed, out)])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(result)
    logger.info("%s", case.name)


class Trained(NamedTuple):
    inputs: "Inputs"
    failed: str | None
    """Why the run could not go on."""


def _train(settings: dict[str, Any], folder: Path) -> Trained:
    """A run in this process, without the report that the command line draws."""
    from sapo_megatron.errors import RunFailed
    from sapo_megatron.policy import parallel
    from sapo_megatron.recipe.load import load
    from sapo_megatron.training.inputs import read_inputs
    from sapo_megatron.training.loop import train

    os.chdir(ROOT)
    words = {key: str(value) for key, value in (settings | {"train.run_dir": folder}).items()}
    recipe = load(RECIPE, words)
    inputs = read_inputs(recipe, 1)
    failed = None
    try:
        train(recipe, inputs)
    except RunFailed as failure:
        failed = str(failure)
    parallel.shutdown()
    return Trained(inputs, failed)


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """What a run's files say, finished or not."""
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in lines if line["step"] > 0]
    summary = folder / "summary.json"
    router = json.loads(summary.read_text())["router"] if summary.exists() else {}

    def all_of(name: str) -> list[float]:
        return [line[name] for line in lines if line.get(name) is not None]

    watched = [line.get(name) for line in lines for name in WATCHED]
    scored = [line for line in lines if f"eval/{SCORE}" in line]
    return {
        "curve": [[line["step"] * case.n, line[f"eval/{SCORE}"]] for line in scored],
        "finite": all(isinstance(x, int | float) and math.isfinite(x) for x in watched),
        "log_var": statistics.fmean(all_of("ratio/log_var") or [math.nan]),
        "ratio_max": max(all_of("ratio/max"), default=math.nan),
        "grad_norm_max": max(all_of("actor/grad_norm"), default=math.nan),
        "sampler_kl": statistics.fmean(all_of("rollout_train/kl") or [math.nan]),
        "clip_fraction": statistics.fmean(all_of("actor/clip_fraction") or [math.nan]),
        "entropy_end": statistics.fmean(all_of("actor/entropy")[-3:] or [math.nan]),
        "splits": {
            "swaps": sum(all_of("variance/swaps")),
            "total": sum(all_of("variance/total")),
            "router": sum(all_of("variance/router")) + sum(all_of("variance/cov")) / 2,
        },
        "share": [router.get(f"variance/router_share{end}") for end in ("", "_low", "_high")],
    }
