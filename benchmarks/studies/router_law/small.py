"""What few swaps do to a share: the tiny recipe's first updates, seen through windows of any size.

    python -m benchmarks.studies.router_law.small

From the cold start of ``recipes/tiny-moe-cpu.yaml`` three steps of training, then one update on 128
responses (N = 2 mini-batches). Its ratios are measured on many responses of the same policy, and
then again as if only the 128 of a mini-batch had been there. Writes ``results/small.json``.
"""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.studies.router_law import CACHE, RESULTS, ROOT
from benchmarks.studies.router_law.measure import C, Text, Weights, measured, numbers, point
from sapo_megatron.data.batch import denominators, micro_batches, split_mini_batches
from sapo_megatron.files import write_whole
from sapo_megatron.policy import parallel
from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.engine import SamplingParams
from sapo_megatron.sample import Sample
from sapo_megatron.training.inputs import preflight
from sapo_megatron.training.loop import run_step
from sapo_megatron.training.session import Session, open_session, opened_run
from sapo_megatron.training.update import set_advantages

logger = logging.getLogger(__name__)

RUN = CACHE / "tiny-moe-cpu"
SETTINGS = {
    "parallel.expert_model_parallel_size": "1",
    "rollout.rollout_batch_size": "32",
    "train.num_mini_batches": "2",
    "train.steps": "10",
    "optimizer.lr_warmup_steps": "0",
    "routing.decompose_every": "0",
    "routing.prob_every": "0",
    "eval.num_problems": "32",
    "eval.k": "1",
    "train.run_dir": str(RUN),
}
WARM_STEPS = 3
ROLLOUTS = 40
"""Of 256 responses each, that are measured."""
SIZES = (0.3, 1.0, 3.0, 10.0)
MINI_BATCH, ROUNDS, SEEDS = 128, 8, 3
"""Responses of a mini-batch, mini-batches that a mean was over, runs that a median was over."""
WORLDS = 400


def main() -> None:
    logging.basicConfig(format="%(message)s")
    path = RESULTS / "small.json"
    if path.exists():
        return
    began = time.process_time()
    recipe = load(ROOT / "recipes" / "tiny-moe-cpu.yaml", SETTINGS)
    inputs = preflight(recipe, 1)
    groups = parallel.setup(recipe.parallel, seed=recipe.train.seed)
    (RUN / "metrics.jsonl").unlink(missing_ok=True)  # of an attempt that did not come to its end
    with ExitStack() as stack:
        run, lock = opened_run(stack, recipe, inputs, groups, None, new_data=False)
        opened = open_session(inputs, groups, run, lock, began=time.monotonic())
        found = of_session(stack.enter_context(opened))
    found["cpu_s"] = round(time.process_time() - began, 1)
    write_whole(path, json.dumps(found, indent=1) + "\n")


def of_session(session: Session) -> dict[str, Any]:
    recipe = session.recipe
    for number in range(1, WARM_STEPS + 1):
        run_step(session, number)
    weights = Weights(session.policy.model)
    update(session)
    direction = weights.direction()
    weights.restore()
    rollouts = [responses(session) for _ in range(ROLLOUTS)]
    text = Text(session.policy, recipe, rollouts.__getitem__)
    sums = {e: measured(weights, text, direction, e, (ROLLOUTS, ROLLOUTS)) for e in SIZES}
    found: dict[str, Any] = {"points": {f"{e:g}": point(s) for e, s in sums.items()}}
    found["few"] = {f"{e:g}": windows(s) for e, s in sums.items()}
    return found


def responses(session: Session) -> list[Sample]:
    """256 to new prompts; the weights are at their start."""
    recipe = session.recipe.rollout
    params = SamplingParams(
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        max_new_tokens=recipe.max_response_length,
        stop_ids=session.inputs.endings.stop_ids,
        seed=session.recipe.train.seed,
    )
    prompts = session.inputs.source.next(recipe.rollout_batch_size)
    groups = session.collector.respond(prompts, recipe.num_generations, params, version=0).groups
    return [sample for group in groups for sample in group.samples]


def update(session: Session) -> None:
    """The first of a step's two."""
    collected = session.collect(WARM_STEPS + 1)
    set_advantages(collected.groups, session.recipe.algorithm.adv_estimator)
    first, _ = split_mini_batches(collected.groups, 2)
    batches = micro_batches(first, session.groups.micro_batching(session.recipe))
    (packed,), _ = session.updater.old_logprobs([batches], step=1)
    session.updater.update(packed, denominators(first), step=1, mini_batch=0)


def windows(sums: np.ndarray) -> dict[str, Any]:
    """What one mini-batch, a mean over ``ROUNDS`` and a median over ``SEEDS`` of them would say."""
    rng = np.random.default_rng(4)
    chosen = rng.integers(len(sums), size=(WORLDS, SEEDS, ROUNDS, MINI_BATCH))
    parts = sums[chosen].sum(3)
    found = numbers(parts)
    means = {name: found[name].mean(2) for name in ("var_a", "var_b", "cov", "var_z")}
    run = (means["var_b"] + means["cov"]) / means["var_z"]
    return {
        "swaps": float(parts[..., C["swaps"]].mean()),
        "mini_batch": quantiles(found["share"].ravel()),
        "mini_batch_var_b": quantiles(found["var_b"].ravel()),
        "median_of_runs": quantiles(np.median(run, axis=1)),
        "pooled": float(numbers(sums.sum(0))["share"]),
    }


def quantiles(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])]


if __name__ == "__main__":
    main()
