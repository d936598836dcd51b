"""The report's figures: which series each one needs and how it is drawn."""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from sapo_megatron.commands.report.drawing import (
    DASHES,
    Figure,
    Panel,
    Theme,
    curve,
    curves,
    has,
    step_axis,
)
from sapo_megatron.commands.report.router_figures import ROUTER_FIGURES
from sapo_megatron.objective.baselines import grpo_token_loss, outside_clip
from sapo_megatron.objective.sapo import sapo_gate, sapo_weight
from sapo_megatron.recipe.schema import CLIP_DEFAULTS
from sapo_megatron.runs.read import Run


def _draw_reward(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    if run.has("reward/mean"):
        curve(ax, *run.series("reward/mean"), theme.series[0], "training reward (mean)")
    for color, marker, name in zip(theme.series[1:], "sD^v<", run.scores(), strict=False):
        label = f"held-out {name.removeprefix('eval/')}"
        x, y = run.series(name)
        size = 6 if len(x) <= 15 else 3.5
        ax.plot(x, y, color=color, marker=marker, markersize=size, label=label)
    ax.set_ylabel("reward, share correct")
    step_axis(ax)
    ax.legend()


def _draw_histograms(stem: str, xlabel: str) -> Callable:
    """Both signs of the advantage: share of tokens a bin, on a logarithmic scale."""

    def draw(canvas: Canvas, run: Run, theme: Theme) -> None:
        ax = canvas.subplots()
        reach: list[float] = []
        for color, style, sign, end in zip(
            theme.series, ("-", DASHES), ("A > 0", "A < 0"), ("_pos", "_neg"), strict=False
        ):
            held = run.histogram(stem + end)
            if held is None:
                continue
            edges, counts = held
            share = counts / counts.sum()
            tokens = f"{int(counts.sum()):,} tokens"
            ax.stairs(share, edges, fill=True, alpha=0.1, color=color)
            ax.stairs(
                share,
                edges,
                color=color,
                linestyle=style,
                linewidth=1.6,
                label=f"{sign} ({tokens})",
            )
            full = np.flatnonzero(counts)
            reach += [edges[full[0]], edges[full[-1] + 1]]
        ax.set_yscale("log")
        margin = 0.05 * (max(reach) - min(reach))
        ax.set_xlim(min(reach) - margin, max(reach) + margin)
        ax.set_xlabel(xlabel)
        ax.set_ylabel("share of tokens in a bin")
        ax.legend()

    return draw


def _draw_time(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    steps = np.array([r["step"] for r in run.records], dtype=np.float64)
    stages = {name: dict(zip(*run.series(name), strict=True)) for name in _stages(run)}
    heights = {n: np.array([v.get(s, 0.0) for s in steps]) for n, v in stages.items()}
    told = sum(heights.values()) > 0
    base = np.zeros(told.sum())
    width = 1.0 if told.sum() > 60 else 0.8
    for i, (name, height) in enumerate(heights.items()):
        color = theme.series[i % len(theme.series)]
        hatch = "//" if i >= len(theme.series) else None
        label = name.removeprefix("time/")
        ax.bar(steps[told], height[told], width, base, color=color, label=label, hatch=hatch)
        base = base + height[told]
    ax.set_ylabel("seconds a step")
    step_axis(ax)
    ax.grid(axis="x", visible=False)
    canvas.legend(loc="outside lower center", ncols=3)


def _stages(run: Run) -> list[str]:
    """The stages that were timed, in the order of the pipeline."""
    order = ["rollout", "reward", "logprob", "update", "sync", "checkpoint"]
    known = [f"time/{stage}" for stage in order]
    return [n for n in [*known, *(n for n in run.names("time/") if n not in known)] if run.has(n)]


def _draw_gate(canvas: Canvas, run: Run, theme: Theme) -> None:
    a = run.recipe.algorithm
    low, high = a.clip_range if a.loss_type == "grpo" else CLIP_DEFAULTS["grpo"]
    clip = {"clip_ratio_low": low, "clip_ratio_high": high}
    r = torch.linspace(0, 4, 801, dtype=torch.float64)
    one = torch.ones_like(r)
    top, bottom = canvas.subplots(2, sharex=True)
    signs = (
        (
            one,
            f"SAPO, A > 0 (tau_pos {a.tau_pos:g})",
            a.tau_pos,
            f"clip, A > 0 (r <= {1 + high:g})",
        ),
        (
            -one,
            f"SAPO, A < 0 (tau_neg {a.tau_neg:g})",
            a.tau_neg,
            f"clip, A < 0 (r >= {1 - low:g})",
        ),
    )
    for color, (advantage, soft_label, tau, hard_label) in zip(theme.series, signs, strict=False):
        soft = {"color": color, "label": soft_label}
        hard = {"color": color, "label": hard_label, "linestyle": DASHES, "linewidth": 1.4}
        clipped = -grpo_token_loss(r.log(), advantage, **clip) / advantage
        top.plot(r, sapo_gate(r, tau) - sapo_gate(one, tau), **soft)
        top.plot(r, clipped - 1, **hard)
        bottom.plot(r, sapo_weight(r, tau), **soft)
        bottom.plot(r, (~outside_clip(r, advantage, low, high)).double(), **hard)
    for ax in (top, bottom):
        ax.axvline(1, color=theme.muted, linewidth=0.8)
        ax.set_xlim(0, 4)
    top.set_ylabel("gate\nf(r) - f(1)")
    bottom.set_ylabel("gradient weight\nw(r) = f'(r)")
    bottom.set_xlabel("importance ratio r")
    canvas.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _draw_throughput(canvas: Canvas, run: Run, theme: Theme) -> None:
    curves(Panel("tokens/s", {"perf/tokens_per_s": "tokens/s"}))(canvas, run, theme)
    ax = canvas.axes[0]
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def _has_histogram(stem: str) -> Callable[[Run], bool]:
    return lambda run: any(run.histogram(stem + end) is not None for end in ("_pos", "_neg"))


FIGURES = (
    Figure(
        "reward",
        "Learning",
        "Reward and held-out evaluation",
        "Mean reward of the rollouts, and accuracy on problems that training never draws.",
        lambda run: run.has("reward/mean") or bool(run.scores()),
        _draw_reward,
    ),
    Figure(
        "response",
        "Learning",
        "Response length and truncation",
        "A truncated response reached max_response_length before its end-of-text token.",
        has("response/length_mean", "response/truncated"),
        curves(
            Panel("mean length\n(tokens)", {"response/length_mean": "mean length"}),
            Panel("truncated\n(share)", {"response/truncated": "truncated"}, percent=True),
        ),
    ),
    Figure(
        "ratio_hist",
        "Ratios and the gate",
        "Importance ratios by sign of the advantage",
        "Ratio of the current to the old policy, per token, over all updates of the run. "
        "The outermost bins also hold what lies beyond them.",
        _has_histogram("ratio/hist"),
        _draw_histograms("ratio/hist", "importance ratio r"),
    ),
    Figure(
        "gate_hist",
        "Ratios and the gate",
        "Gate weights by sign of the advantage",
        "How much of each token's gradient the soft gate keeps: 1 on-policy, towards 0 far off.",
        _has_histogram("sapo/hist_weight"),
        _draw_histograms("sapo/hist_weight", "gate weight w"),
    ),
    Figure(
        "ratio_var",
        "Ratios and the gate",
        "Variance of the log ratio",
        "How far the updates of a step move off the policy that made its samples.",
        has("ratio/log_var"),
        curves(Panel("Var[log r] (nats^2)", {"ratio/log_var": "Var[log r]"}, log=True)),
    ),
    Figure(
        "kept",
        "Ratios and the gate",
        "What the objective holds back",
        "The mean gate weight of SAPO, or the share of tokens that a clipped loss cuts off.",
        has("sapo/weight_mean", "actor/clip_fraction"),
        curves(
            Panel(
                "mean over tokens",
                {"sapo/weight_mean": "gate weight w", "actor/clip_fraction": "share clipped"},
            )
        ),
    ),
    Figure(
        "gate_curve",
        "Ratios and the gate",
        "The gate beside hard clipping",
        "For this run's temperatures. f(1) is subtracted, since a constant has no gradient. "
        "Beyond its bound, clipping drops a token's gradient at once; the gate fades it out.",
        lambda run: True,
        _draw_gate,
        height=5.2,
    ),
    *ROUTER_FIGURES,
    Figure(
        "loss",
        "Optimisation",
        "Policy loss",
        "Its level says little, since advantages cancel within a group; jumps say more.",
        has("actor/pg_loss"),
        curves(Panel("loss", {"actor/pg_loss": "policy loss"})),
    ),
    Figure(
        "grad_norm",
        "Optimisation",
        "Gradient norm",
        "Before clipping.",
        has("actor/grad_norm"),
        curves(Panel("L2 norm", {"actor/grad_norm": "gradient norm"})),
    ),
    Figure(
        "kl",
        "Optimisation",
        "KL divergence",
        "Of the current policy from the one that made the samples and, where the loss has a KL "
        "term, from the frozen reference.",
        has("actor/ppo_kl", "actor/kl_loss"),
        curves(
            Panel(
                "nats per token",
                {"actor/ppo_kl": "from the old policy", "actor/kl_loss": "from the reference"},
            )
        ),
    ),
    Figure(
        "entropy",
        "Optimisation",
        "Entropy",
        "Mean entropy of the next-token distribution on response tokens.",
        has("actor/entropy"),
        curves(Panel("nats per token", {"actor/entropy": "entropy"})),
    ),
    Figure(
        "time",
        "Speed",
        "Time by stage",
        "Wall time of each stage of a step.",
        lambda run: bool(_stages(run)),
        _draw_time,
        height=3.9,
    ),
    Figure(
        "throughput",
        "Speed",
        "Throughput",
        "Tokens per second over whole steps, all ranks together.",
        has("perf/tokens_per_s"),
        _draw_throughput,
    ),
)
"""Every figure of the page, in its order."""
