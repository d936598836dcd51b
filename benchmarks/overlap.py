"""What rollouts ahead of training gain: seconds a step at K = 0, 1 and 4.

    python -m benchmarks.overlap --vllm-python venvs/vllm/bin/python       # some minutes

A server on one core and the trainer on another, with the model of recipes/tiny-moe-vllm-cpu.yaml
and random weights. One response in sixteen is ten times as long as the others: each takes as many
tokens as its number says, whatever they are. Means over steps in the middle of a run, when neither
the first responses nor the lack of later ones counts.
"""

import json
import logging
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import measure
from sapo_megatron.launcher import join
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.vllm.client import Server
from sapo_megatron.rollout.vllm.servers import LocalServers
from sapo_megatron.training.inputs import read_inputs
from sapo_megatron.training.loop import train

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-moe-vllm-cpu.yaml"
CASES = ((0, "wait"), (1, "wait"), (4, "wait"), (4, "continue"))
"""``rollout.async_steps`` and ``rollout.on_new_weights``."""
SHORT, LONG, EVERY = 32, 320, 16
"""Tokens of a response, of a long one, and how many there are to each of those."""
GENERATIONS = 8
FIRST, LAST = 6, 6
"""Steps at both ends of a run that do not count."""
MEANS = ("perf/step_s", "time/rollout", "time/sync", "perf/rollout_idle", "perf/train_idle")


def make_recipe(steps: int, prompts: int, **changes: Any) -> Recipe:
    settings = {
        "parallel.tensor_model_parallel_size": 1,
        "parallel.expert_model_parallel_size": 1,
        "cold_start.steps": 0,
        "eval.every": 0,
        "eval.num_problems": 8,
        "eval.k": 1,
        "routing.observe": "false",
        "train.steps": steps,
        "rollout.rollout_batch_size": prompts,
        "rollout.num_generations": GENERATIONS,
        "rollout.max_response_length": LONG,
        "rollout.server_concurrency": 8 * EVERY,
    }
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return load(RECIPE, {key: str(value) for key, value in (settings | named).items()})


def work(job: dict) -> None:
    """The metrics of each step of a run, as JSON."""
    os.sched_setaffinity(0, {job["core"]})
    join()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder, ahead, on_new_weights = job["folder"], job["ahead"], job["on_new_weights"]
    recipe = make_recipe(
        job["steps"],
        job["prompts"],
        rollout__vllm_python="null",
        rollout__servers=[job["url"]],
        rollout__async_steps=ahead,
        rollout__on_new_weights=on_new_weights,
        train__run_dir=folder,
    )
    complete = Server.complete

    def of_its_length(
        self: Server, request: Request, params: SamplingParams, *args: Any, **others: Any
    ) -> Any:
        tokens = SHORT if request.uid % EVERY else LONG
        params = replace(params, max_new_tokens=tokens, stop_ids=())
        return complete(self, request, params, *args, **others)

    with (
        mock.patch.object(Server, "complete", of_its_length),
        mock.patch.object(checkpoint, "save"),
    ):
        train(recipe, read_inputs(recipe, 1))
    parallel.shutdown()
    print(json.dumps([json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]))


def measured(args: Any, folder: Path) -> list[dict[str, Any]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("benchmarks.overlap: expected two cores, got one")
    recipe = make_recipe(1, 1, rollout__vllm_python=os.path.abspath(args.vllm_python))
    inputs = read_inputs(recipe, 1)
    os.sched_setaffinity(0, {cores[0]})
    with LocalServers(recipe, inputs.model, folder / "servers", folder / "weights") as servers:
        os.sched_setaffinity(0, set(cores))
        rows = []
        for ahead, on_new_weights in CASES:
            job = {
                "folder": str(folder / f"run-{ahead}-{on_new_weights}"),
                "url": servers.urls[0],
                "core": cores[1],
                "ahead": ahead,
                "on_new_weights": on_new_weights,
                "steps": args.steps,
                "prompts": args.prompts,
            }
            lines = measure.in_fresh_process("benchmarks.overlap", job)[FIRST:-LAST]
            row: dict[str, Any] = {
                name: statistics.fmean(line[name] for line in lines) for name in MEANS
            }
            trained = (line["time/logprob"] + line["time/update"] for line in lines)
            row |= {"ahead": ahead, "on_new_weights": on_new_weights}
            rows.append(row | {"training": statistics.fmean(trained)})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    base = rows[0]
    generation, training = base["time/rollout"], base["training"]
    most = max(generation, training) / (generation + training)
    print(f"G {generation:.2f} s, U {training:.2f} s: U / G {training / generation:.2f}")
    print(f"max(G, U) / (G + U) {most:.2f}")
    print(
        f"{'K':>2} {'weights':10}{'s a step':>10}{'ratio':>8}{'no rollout':>12}{'no training':>13}"
    )
    for row in rows:
        print(
            f"{row['ahead']:2} {row['on_new_weights']:10}{row['perf/step_s']:10.2f}"
            f"{row['perf/step_s'] / base['perf/step_s']:8.2f}"
            f"{row['perf/rollout_idle']:12.0%}{row['perf/train_idle']:13.0%}"
        )


def main() -> None:
    parser = measure.parser(__doc__, rounds=1)
    parser.add_argument("--vllm-python", default=os.environ.get("SAPO_VLLM_PYTHON"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for the runs, which are kept")
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    if args.vllm_python is None:
        parser.error("--vllm-python: expected a Python with vLLM; make venvs/vllm/.installed")
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(args, args.keep or Path(folder))
    show(rows)
    measure.write(args, rows)


if __name__ == "__main__":
    main()
