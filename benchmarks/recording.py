"""What it costs to record and compare the routers' choices, as a share of a training step.

    python -m benchmarks.recording                    # two processes, a minute or two
    python -m benchmarks.recording --ranks 1 --out recording.json

Trains recipes/tiny-moe-cpu.yaml from random weights, without cold start, checkpoints, report and
variance split; every other run has routing.observe=false. Shows the median of the ratios of two
runs that follow each other, by their median steps, and the median seconds of both kinds.
"""

import json
import logging
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import measure
from sapo_megatron.launcher import join
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.recipe.load import load
from sapo_megatron.training.inputs import read_inputs
from sapo_megatron.training.loop import train

STEPS = 6
RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-moe-cpu.yaml"


def work(job: dict) -> None:
    """On each rank: the seconds of each step of runs with and without, in turn, as JSON."""
    join()
    logging.disable(logging.WARNING)
    torch.set_num_threads(job["threads"])
    found: dict[bool, list[float]] = {True: [], False: []}
    for number, observe in enumerate([True, False] * job["rounds"]):
        folder = Path(job["folder"]) / f"run-{number}"
        settings = {
            "parallel.expert_model_parallel_size": job["ranks"],
            "routing.observe": str(observe).lower(),
            "routing.decompose_every": 0,
            "cold_start.steps": 0,
            "eval.num_problems": 2,
            "eval.k": 1,
            "eval.every": 0,
            "train.steps": 1 + STEPS,
            "train.run_dir": folder,
        }
        recipe = load(RECIPE, {key: str(value) for key, value in settings.items()})
        with mock.patch.object(checkpoint, "save"):
            train(recipe, read_inputs(recipe, job["ranks"]))
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
        found[observe].append(statistics.median(line["perf/step_s"] for line in lines[1:]))
        parallel.teardown()
        dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps([found[True], found[False]]), flush=True)
    parallel.shutdown()


def main() -> None:
    parser = measure.parser(__doc__, rounds=6)
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=2)
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "folder": folder,
            "ranks": args.ranks,
            "threads": max(args.threads // args.ranks, 1),
            "rounds": args.rounds,
        }
        watched, plain = measure.in_fresh_process("benchmarks.recording", job, args.ranks)
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
