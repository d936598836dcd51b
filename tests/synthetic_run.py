"""A run folder with plausible numbers, for what reads run folders."""

import json
import math
from pathlib import Path

import torch

from sapo_megatron import config
from sapo_megatron.metrics import Histogram, Max, Mean, Metrics, Min, Sum, Variance
from sapo_megatron.objective.loss import RATIO_EDGES, WEIGHT_EDGES
from sapo_megatron.objective.sapo import sapo_weight
from sapo_megatron.trackers import JsonlTracker


def recipe(loss_type: str = "sapo", steps: int = 60) -> config.Recipe:
    task = config.TaskConfig(name="chain_sum")
    return config.Recipe(
        name="tiny-moe-cpu",
        model=config.ModelConfig(path="model"),
        data=config.DataConfig(train=config.SourceConfig(tasks=(task,))),
        parallel=config.ParallelConfig(expert_model_parallel_size=2),
        algorithm=config.AlgorithmConfig(loss_type=loss_type, kl_coef=0.01),
        train=config.TrainConfig(steps=steps),
    )


def write_run(folder: Path, *, loss_type: str = "sapo", steps: int = 60) -> Path:
    """``folder`` as a finished run of this many steps leaves it, without checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(recipe(loss_type, steps)))
    generator = torch.Generator().manual_seed(0)
    tracker = JsonlTracker(folder / "metrics.jsonl")
    for step in range(steps + 1):
        metrics = step_metrics(step, steps, loss_type, generator)
        tracker.log(step, metrics.values(), metrics.histograms())
    tracker.close(failed=False)
    summary = {
        "steps": steps,
        "wall_s": 8.2 * steps,
        "loss_type": loss_type,
        "world_size": 2,
        "eval": {
            "before": {"avg@8": 0.31, "pass@1": 0.42},
            "after": {"avg@8": 0.68, "pass@1": 0.74},
        },
        "report": "report/index.html",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def step_metrics(step: int, steps: int, loss_type: str, generator: torch.Generator) -> Metrics:
    """What step ``step`` of ``steps`` might log; step 0 holds only an evaluation."""
    metrics = Metrics()
    learned = 1 - math.exp(-2.5 * step / steps)
    if step % 10 == 0 or step == steps:
        metrics.add("eval/avg@8", Mean(0.31 + 0.4 * learned, 1.0))
        metrics.add("eval/pass@1", Mean(0.42 + 0.35 * learned, 1.0))
    if step == 0:
        return metrics

    def noisy(x: float) -> float:
        return x * (1 + 0.12 * torch.randn((), generator=generator).item())

    for name, value in {
        "reward/mean": 0.3 + 0.42 * learned,
        "response/length_mean": 5.2 - 0.8 * learned,
        "response/truncated": 0.06 * (1 - learned) + 0.002,
        "actor/ppo_kl": 0.003,
        "actor/kl_loss": 0.02 * learned,
        "actor/entropy": 0.9 - 0.6 * learned,
        "actor/grad_norm": 0.6,
        "perf/tokens_per_s": 3400.0,
        "perf/step_s": 8.2,
        "time/rollout": 2.1,
        "time/reward": 0.2,
        "time/logprob": 0.8,
        "time/update": 4.6,
        "time/checkpoint": 2.5 if step % 20 == 0 else 0.0,
    }.items():
        metrics.add(name, Mean(noisy(value), 1.0))
    metrics.add("actor/pg_loss", Sum(0.02 * torch.randn((), generator=generator).item()))
    metrics.add("reward/std", Mean(math.nan, 0.0))
    log_ratio = 0.12 * torch.randn(4000, generator=generator) * (1 + learned)
    ratio, positive = log_ratio.exp(), torch.rand(4000, generator=generator) < 0.4
    metrics.add("ratio/log_var", Variance.of(log_ratio))
    metrics.add("ratio/min", Min.of(ratio))
    metrics.add("ratio/max", Max.of(ratio))
    metrics.add("ratio/hist_pos", Histogram.of(ratio, RATIO_EDGES, positive))
    metrics.add("ratio/hist_neg", Histogram.of(ratio, RATIO_EDGES, ~positive))
    if loss_type == "sapo":
        weight = sapo_weight(ratio, 1.0)
        metrics.add("sapo/weight_mean", Mean.of(weight))
        metrics.add("sapo/hist_weight_pos", Histogram.of(weight, WEIGHT_EDGES, positive))
        metrics.add("sapo/hist_weight_neg", Histogram.of(weight, WEIGHT_EDGES, ~positive))
    else:
        metrics.add("actor/clip_fraction", Mean.of((ratio - 1).abs() > 0.2))
    return metrics
