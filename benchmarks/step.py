"""Where the time of a training step goes, and how it grows with the batch.

    python -m benchmarks.step                    # two processes, a minute or two
    python -m benchmarks.step --full             # also one process, and more sizes
    python -m benchmarks.step --ranks 1 --out step.json

Trains recipes/tiny-moe-cpu.yaml from random weights, with another number of prompts or longer
responses in each row, without cold start, checkpoints and report. Shows the median over the steps
after the first, in milliseconds. rollout, reward, logprob and update are the metrics ``time/*`` of
a run (the slowest rank's). The parts of update are by the clock of the first rank, waiting for the
others included: forward, loss, backward; optimizer, from the check for numbers that are not finite
to the exchange of the new weights; and watch, what remains: the routers compared and measured.
"""

import functools
import json
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import measure
from sapo_megatron.launcher import join
from sapo_megatron.metrics import Metrics
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.policy.gpt import LogprobGPT
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.training import loop as train
from sapo_megatron.training import update
from sapo_megatron.training.inputs import read_inputs

T = TypeVar("T")
RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-moe-cpu.yaml"
QUICK = [(16, 8), (32, 8), (64, 8), (128, 8), (16, 32), (16, 64)]
FULL = [*QUICK, (256, 8), (16, 128), (64, 64)]
"""Prompts a step (of 8 responses each) and the longest response; the recipe has (64, 8)."""
STAGES = ("rollout", "reward", "logprob", "update")
PARTS = ("forward", "loss", "backward", "optimizer", "watch")
COLUMNS = (*STAGES, *PARTS, "step")


class Clocks:
    """Seconds spent in functions of the package while one of its steps runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.updates: list[dict[str, float]] = []

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> T:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if torch.is_grad_enabled():  # not in rollouts and log-probs
                    self.seconds[name] += time.perf_counter() - began

        return call

    def split(self) -> dict[str, float]:
        """The parts of all updates since the last call."""
        s, self.seconds = self.seconds, defaultdict(float)
        return {
            "forward": s["forward"],
            "loss": s["loss"],
            "backward": s["backward"] - s["forward"] - s["loss"],
            "optimizer": s["update"] - s["backward"],
        }

    @contextmanager
    def watching(self) -> Iterator["Clocks"]:
        """Measures each step; leaves out what belongs to a run and not to a step."""

        def step(*args: Any) -> Metrics:
            metrics = whole_step(*args)
            self.updates.append(self.split())
            return metrics

        whole_step = train.run_step
        patches: list[AbstractContextManager[Any]] = [
            mock.patch.object(LogprobGPT, "forward", self.timed("forward", LogprobGPT.forward)),
            mock.patch.object(update, "policy_loss", self.timed("loss", update.policy_loss)),
            mock.patch.object(Policy, "backward", self.timed("backward", Policy.backward)),
            mock.patch.object(Policy, "update", self.timed("update", Policy.update)),
            mock.patch.object(train, "run_step", step),
            mock.patch.object(checkpoint, "save"),
        ]
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield self


def run(ranks: int, prompts: int, longest: int, folder: Path, rounds: int) -> dict:
    """Train for one step more than ``rounds``; the medians of the others. On every rank."""
    folder /= f"{prompts}-{longest}"
    settings = {
        "rollout.rollout_batch_size": prompts,
        "rollout.max_response_length": longest,
        "parallel.expert_model_parallel_size": ranks,
        "cold_start.steps": 0,
        "eval.num_problems": 2,
        "eval.k": 1,
        "eval.every": 0,
        "train.steps": 1 + rounds,
        "train.run_dir": folder,
    }
    recipe = load(RECIPE, {key: str(value) for key, value in settings.items()})
    with Clocks().watching() as clocks:
        train.train(recipe, read_inputs(recipe, ranks))
    parallel.teardown()
    dist.barrier()
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
    steps = [
        {stage: line[f"time/{stage}"] for stage in STAGES}
        | {**parts, "watch": line["time/update"] - sum(parts.values())}
        | {"step": line["perf/step_s"], "tokens_per_s": line["perf/tokens_per_s"]}
        for line, parts in zip(lines, clocks.updates, strict=True)
    ][1:]
    medians = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
    tokens = statistics.mean(step["step"] * step["tokens_per_s"] for step in steps)
    return {
        "ranks": ranks,
        "prompts": prompts,
        "max_response_length": longest,
        "tokens": round(tokens),
        "tokens_per_s": medians["tokens_per_s"],
    } | {f"{name}_ms": medians[name] * 1e3 for name in COLUMNS}


def work(job: dict) -> None:
    """On each rank: all sizes, as JSON on the last line."""
    join()
    logging.disable(logging.WARNING)  # a model with random weights answers nothing right
    torch.set_num_threads(job["threads"])
    rows = [
        run(job["ranks"], prompts, longest, Path(job["folder"]), job["rounds"])
        for prompts, longest in job["sizes"]
    ]
    if dist.get_rank() == 0:
        print(json.dumps(rows), flush=True)
    parallel.shutdown()


def show(rows: list[dict]) -> None:
    columns = "".join(f"{name:>10}" for name in COLUMNS)
    print(f"\n{rows[0]['ranks']} ranks")
    print(f"{'prompts':>7}{'response':>9}{'tokens':>8}{columns}{'tokens/s':>10}")
    for row in rows:
        times = "".join(f"{row[f'{name}_ms']:10.0f}" for name in COLUMNS)
        print(
            f"{row['prompts']:7}{row['max_response_length']:9}{row['tokens']:8}{times}"
            f"{row['tokens_per_s']:10.0f}"
        )


def main() -> None:
    parser = measure.parser(__doc__, rounds=3)
    parser.add_argument("--ranks", type=int, choices=[1, 2, 4, 8], help="default: 2")
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    rows = []
    for ranks in [args.ranks] if args.ranks else [1, 2] if args.full else [2]:
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "folder": folder,
                "ranks": ranks,
                "sizes": FULL if args.full else QUICK,
                "threads": max(args.threads // ranks, 1),
                "rounds": args.rounds,
            }
            found = measure.in_fresh_process("benchmarks.step", job, ranks)
        show(found)
        rows += found
    measure.write(args, rows)


if __name__ == "__main__":
    main()
