"""A run folder with plausible numbers, for what reads run folders."""

import json
import math
from itertools import product
from pathlib import Path

import torch

from sapo_megatron.metrics import (
    Histogram,
    Max,
    MaxViolation,
    Mean,
    Metrics,
    Min,
    Points,
    Spans,
    Sum,
    Variance,
    now,
)
from sapo_megatron.objective.loss import RATIO_EDGES, WEIGHT_EDGES
from sapo_megatron.objective.sapo import sapo_weight
from sapo_megatron.recipe import schema as config
from sapo_megatron.recipe.load import to_yaml
from sapo_megatron.routing.variance import split_metrics
from sapo_megatron.runs.timeline import TimelineTracker
from sapo_megatron.runs.trackers import JsonlTracker

TIMES = {
    "sync": 0.1,
    "rollout": 2.1,
    "rollout_wait": 0.2,
    "reward": 0.2,
    "exchange": 0.1,
    "logprob": 0.8,
    "update": 4.6,
}
"""Stages of a step in seconds."""
LAYERS = 4
SPLIT_EVERY = 4


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


def write_run(
    folder: Path, *, loss_type: str = "sapo", steps: int = 60, experts: bool = True
) -> Path:
    """``folder`` as a finished run of this many steps leaves it, without checkpoints.

    ``experts``: whether the model has any; a dense one logs nothing about routers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(recipe(loss_type, steps)))
    generator = torch.Generator().manual_seed(0)
    tracker, timeline = JsonlTracker(folder / "metrics.jsonl"), TimelineTracker(folder)
    for step in range(1, steps + 1):
        metrics = step_metrics(step, steps, loss_type, generator)
        if experts:
            metrics.update(router_metrics(step, steps, generator))
        tracker.log(step, metrics)
        timeline.log(step, metrics)
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
    """What step ``step`` of ``steps`` might log."""
    metrics = Metrics()
    learned = 1 - math.exp(-2.5 * step / steps)
    if step % 10 == 0 or step == steps:
        metrics.add("eval/avg@8", Mean(0.31 + 0.4 * learned, 1.0))
        metrics.add("eval/pass@1", Mean(0.42 + 0.35 * learned, 1.0))

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
        "perf/rollout_idle": 0.74,
        "perf/train_idle": 0.34,
    }.items():
        metrics.add(name, Mean(noisy(value), 1.0))
    began = now()
    for rank in range(2):
        at, stages = began, TIMES | {"eval": 1.5} if step % 10 == 0 else TIMES
        for stage, seconds in stages.items():
            metrics.add(f"time/{stage}", Spans(((f"rank {rank}", at, took := noisy(seconds)),)))
            at += took
        metrics.add("perf/step_s", Spans(((f"rank {rank}", began, at - began),)))
    metrics.add("actor/pg_loss", Sum(0.02 * torch.randn((), generator=generator).item()))
    metrics.add("reward/std", Mean(math.nan, 0.0))
    metrics.add("reward/zero_std_groups", Sum(0.0))
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


def router_metrics(step: int, steps: int, generator: torch.Generator) -> Metrics:
    """What step ``step`` of ``steps`` might log about the routers of ``LAYERS`` layers."""
    metrics = Metrics()
    heat = 0.01 + 0.03 * step / steps
    chances = heat * torch.linspace(2.0, 0.5, LAYERS)[:, None]
    flipped = torch.rand(LAYERS, 3000, generator=generator) < chances.expand(LAYERS, 3000)
    mismatched = torch.rand(LAYERS, 3000, generator=generator) < 0.008
    for prefix, part in (("routing", flipped), ("rollout_train", mismatched)):
        for layer, changed in enumerate(part):
            metrics.add(f"{prefix}/slot_flip", Mean.of(changed / 2))
            metrics.add(f"{prefix}/slot_flip/layer_{layer}", Mean.of(changed / 2))
            metrics.add(f"{prefix}/tv", Mean.of(0.2 * changed + 0.01))
        metrics.add(f"{prefix}/token_flip_share", Mean.of(part.any(0)))
        metrics.add(f"{prefix}/layers_flipped", Mean.of(part.sum(0)))
    metrics.add("routing/shift_factor", Mean.of((-heat * (1 + flipped.sum(0))).exp()))
    load = torch.randint(80, 120, (LAYERS, 8), generator=generator)
    metrics.add("routing/max_violation", MaxViolation(load))

    layers_flipped = flipped.sum(0)
    router = 0.15 * layers_flipped.sqrt() * torch.randn(3000, generator=generator)
    weights = 2 * heat * torch.randn(3000, generator=generator) - 0.15 * router
    log_ratio = weights + router
    if step % SPLIT_EVERY == 0:
        metrics.add("variance/noise", Mean(1e-4, 1.0))
        context = torch.rand(3000, generator=generator, dtype=torch.float64).pow(4)
        for prefix, rest, size in (
            ("variance", "weights", 1.0),
            ("rollout_train/variance", "numerics", 0.1),
        ):
            split = split_metrics(
                size * log_ratio,
                size * weights,
                torch.ones(3000, dtype=torch.bool),
                layers_flipped=layers_flipped,
                context=context,
                num_layers=LAYERS,
                prefix=prefix,
                rest=rest,
            )
            metrics.update(split)
            ends = (("", 0.0), ("_low", -0.02), ("_high", 0.03))
            for (name, level), (end, off) in product(
                (("router_share", 0.6), ("replay_removes", 0.7)), ends
            ):
                metrics.add(f"{prefix}/{name}_pooled{end}", Mean(level + off, 1.0))

    spread = torch.linspace(-1.5, 1.5, 60).exp()
    sequences = log_ratio.view(60, 50).double() * spread[:, None]
    gate = sapo_weight(1 + sequences, 1.0)
    distance = (gate.mean(1) - sapo_weight(1 + sequences.mean(1), 1.0)).abs()
    bound = sequences.var(1, correction=0) / 4
    metrics.add("sapo/bound_points", Points.of(bound, distance))
    metrics.add("sapo/bound_violations", Sum((distance > bound).sum()))
    metrics.add("rollout_train/kl", Mean.of(-log_ratio / 10))
    metrics.add("rollout_train/k3_kl", Mean.of(log_ratio.square() / 200))
    metrics.add("rollout_train/logprob_abs_diff", Mean.of(log_ratio.abs() / 10))
    metrics.add("rollout_train/extreme_fraction", Mean.of(log_ratio.abs() > 0.4))
    return metrics
