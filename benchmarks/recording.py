"""What it costs to record and compare the routers' choices, as a share of a training step.

    python benchmarks/recording.py                    # two processes, a minute or two
    python benchmarks/recording.py --ranks 1 --out recording.json

Trains recipes/tiny-moe-cpu.yaml from random weights, without cold start, checkpoints, report and
variance split; every other step neither records routes nor compares them. Shows the median of the
ratios of two steps that follow each other, and the median seconds of both kinds.
"""

import contextlib
import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
import torch.distributed as dist

from sapo_megatron.metrics import Metrics
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.policy.routers import ModelRouters
from sapo_megatron.recipe.load import load
from sapo_megatron.training import loop as train
from sapo_megatron.training.inputs import read_inputs
from sapo_megatron.training.observe import RouterWatch

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-moe-cpu.yaml"


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """The same training, without a look at the routers."""
    begin = ModelRouters.begin

    def begin_without(self: Any, *, record: bool = False, **kwargs: Any) -> None:
        begin(self, record=False, **kwargs)

    def no_divergence(self: Any, batches: Any, *args: Any) -> Any:
        return Metrics(), [None] * len(batches)

    with (
        mock.patch.object(ModelRouters, "begin", begin_without),
        mock.patch.object(RouterWatch, "_divergence", no_divergence),
        mock.patch.object(RouterWatch, "_load", return_value=Metrics()),
    ):
        yield


def work(job: dict) -> None:
    """On each rank: the seconds of each step, as JSON on the last line."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(job["threads"])
    dist.init_process_group("gloo")
    settings = {
        "parallel.expert_model_parallel_size": dist.get_world_size(),
        "routing.decompose_every": 0,
        "cold_start.steps": 0,
        "eval.num_problems": 2,
        "eval.k": 1,
        "eval.every": 0,
        "train.steps": 2 + 2 * job["rounds"],
        "train.run_dir": Path(job["folder"]) / "run",
    }
    recipe = load(RECIPE, {key: str(value) for key, value in settings.items()})
    whole_step = train.Trainer._step

    def step(trainer: Any, number: int, collector: Any) -> Metrics:
        if number % 2:
            return whole_step(trainer, number, collector)
        decoder = collector._engine._decoder
        generating = decoder.generating
        trainer.watch.has_experts = False
        decoder.generating = lambda record=False: generating(record=False)
        with unwatched():
            metrics = whole_step(trainer, number, collector)
        trainer.watch.has_experts, decoder.generating = True, generating
        return metrics

    with (
        mock.patch.object(train.Trainer, "_step", step),
        mock.patch.object(checkpoint, "save"),
    ):
        train.train(recipe, read_inputs(recipe, dist.get_world_size()))
    if dist.get_rank() == 0:
        lines = [json.loads(x) for x in (Path(recipe.train.run_dir) / "metrics.jsonl").open()]
        print(json.dumps([line["perf/step_s"] for line in lines]), flush=True)
    parallel.shutdown()


def main() -> None:
    parser = measure.parser(__doc__, rounds=20)
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=2)
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "folder": folder,
            "threads": max(args.threads // args.ranks, 1),
            "rounds": args.rounds,
        }
        seconds = measure.in_fresh_process(__file__, job, launcher)[2:]
    watched, plain = seconds[::2], seconds[1::2]
    row = {
        "ranks": args.ranks,
        "watched_s": statistics.median(watched),
        "plain_s": statistics.median(plain),
        "ratio": statistics.median(a / b for a, b in zip(watched, plain, strict=True)),
    }
    print(f"{'ranks':>6}{'watched s':>11}{'plain s':>11}{'ratio':>8}")
    print(f"{row['ranks']:6}{row['watched_s']:11.3f}{row['plain_s']:11.3f}{row['ratio']:8.3f}")
    measure.write(args, [row])


if __name__ == "__main__":
    main()
