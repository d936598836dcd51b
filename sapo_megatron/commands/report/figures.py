"""The report's figures: which series each one needs and how it is drawn."""

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from sapo_megatron.commands.report.drawing import (
    DASHES,
    PLAIN,
    Figure,
    Panel,
    Theme,
    curve,
    curves,
    grouped,
    legend,
    stacked,
    step_axis,
    value_axis,
)
from sapo_megatron.commands.report.router_figures import ROUTER_FIGURES
from sapo_megatron.objective.baselines import clipped_loss, outside_clip
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.objective.sapo import sapo_gate, sapo_weight
from sapo_megatron.recipe.schema import CLIP_DEFAULTS
from sapo_megatron.runs.read import Run
from sapo_megatron.runs.timeline import RANK, STEP

STAGES = {
    "rollout": "rollout",
    "rollout_wait": "waiting",
    "sync": "hand-over",
    "exchange": "exchange",
    "logprob": "log-probs",
    "update": "update",
    "reward": "scoring",
    "checkpoint": "checkpoint",
    "eval": "evaluation",
}
"""Stages of ``time/*`` and what they are called; those beyond a theme's colours are hatched."""
MOST_ROWS = 8
"""Ranks, and servers, that the picture of a step shows."""


def _draw_reward(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    if run.has("reward/mean"):
        curve(ax, *run.series("reward/mean"), theme.series[0], "training reward (mean)")
    for color, marker, name in zip(theme.series[1:], "sD^v<", run.scores(), strict=False):
        label = f"held-out {name.removeprefix('eval/')}"
        x, y = run.series(name)
        size = 6 if len(x) <= 15 else 3.5
        ax.plot(x, y, color=color, marker=marker, markersize=size, label=label)
    value_axis(ax, "reward, share correct")
    step_axis(ax)
    legend(ax, columns=2)


def _histograms(name: str, title: str, caption: str, stem: str, xlabel: str) -> Figure:
    """A figure of both signs of the advantage: share of tokens per bin, on a logarithmic axis."""

    def draw(canvas: Canvas, run: Run, theme: Theme) -> None:
        ax = canvas.subplots()
        reach: list[float] = []
        for color, style, sign, end in zip(
            theme.series, ("-", DASHES), ("A > 0", "A < 0"), ("_pos", "_neg"), strict=False
        ):
            found = run.histogram(stem + end)
            if found is None:
                continue
            edges, counts = found
            share = counts / counts.sum()
            tokens = f"{int(counts.sum()):,} tokens"
            ax.stairs(share, edges, fill=True, alpha=0.1, color=color)
            line = ax.stairs(share, edges, color=color, label=f"{sign} ({tokens})")
            line.set(linestyle=style, linewidth=1.6)
            full = np.flatnonzero(counts)
            reach += [edges[full[0]], edges[full[-1] + 1]]
        value_axis(ax, "share of tokens per bin", log=True)
        ax.set_ylim(top=min(ax.get_ylim()[1], 1.3))
        margin = 0.05 * (max(reach) - min(reach))
        ax.set_xlim(min(reach) - margin, max(reach) + margin)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(PLAIN)
        ax.set_xlabel(xlabel)
        legend(ax)

    def held(run: Run) -> bool:
        return any(run.histogram(stem + end) is not None for end in ("_pos", "_neg"))

    return Figure(name, title, caption, held, draw)


def _draw_time(canvas: Canvas, run: Run, theme: Theme) -> None:
    ax = canvas.subplots()
    names = _stages(run)
    steps, rows = run.table(names)
    steps, rows, size = grouped(steps, np.nan_to_num(rows))
    labels = [STAGES.get(stage := name.removeprefix("time/"), stage) for name in names]
    stacked(ax, theme, steps, dict(zip(labels, rows, strict=True)))
    value_axis(ax, "seconds per step")
    step_axis(ax, size)
    legend(ax, columns=4)


def _stages(run: Run) -> list[str]:
    """What the ranks' time went into."""
    known = [f"time/{stage}" for stage in STAGES]
    elsewhere = {"time/rollout"} if run.recipe.rollout.engine == "vllm" else set()
    names = dict.fromkeys([*known, *run.names("time/")])
    return [name for name in names if run.has(name) and name not in elsewhere]


def _draw_timeline(canvas: Canvas, run: Run, theme: Theme) -> None:
    """The last step, a row per rank and server."""
    ax = canvas.subplots()
    last = max(event.step for event in run.timeline if event.stage == STEP)
    steps = [event for event in run.timeline if (event.step, event.stage) == (last, STEP)]
    begin, end = min(event.begin for event in steps), max(event.end for event in steps)
    events = [event for event in run.timeline if event.begin < end and event.end > begin]
    everywhere = dict.fromkeys(event.where for event in events)
    ranks = [where for where in everywhere if where.startswith(RANK)]
    servers = [where for where in everywhere if where not in ranks]
    rows = {where: i for i, where in enumerate([*ranks[:MOST_ROWS], *servers[:MOST_ROWS]])}
    for i, (stage, label) in enumerate(STAGES.items()):
        bars = [e for e in events if e.stage == stage and e.where in rows]
        if bars:
            color = theme.grid if stage == "rollout_wait" else theme.series[i % len(theme.series)]
            hatch = "//" if i >= len(theme.series) else None
            left = [max(e.begin - begin, 0) for e in bars]
            width = [min(e.end, end) - max(e.begin, begin) for e in bars]
            at = [rows[e.where] for e in bars]
            ax.barh(at, width, 0.7, left, color=color, hatch=hatch, label=label)
    numbers = {where: f"server {i}" for i, where in enumerate(servers)}
    names = [numbers.get(where, where) for where in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=9.5)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, end - begin)
    cut = f" ({len(rows)} of {len(everywhere)} rows)" if len(rows) < len(everywhere) else ""
    ax.set_xlabel(f"seconds of step {last}{cut}")
    legend(ax, columns=4)


def _draw_gate(canvas: Canvas, run: Run, theme: Theme) -> None:
    a = run.recipe.algorithm
    low, high = a.clip_range if a.loss_type == "grpo" else CLIP_DEFAULTS["grpo"]
    r = torch.linspace(0, 4, 801, dtype=torch.float64)
    one = torch.ones_like(r)
    top, bottom = canvas.subplots(2, sharex=True)
    for color, sign, tau, name, bound in (
        (theme.series[0], ">", a.tau_pos, "tau_pos", f"r <= {1 + high:g}"),
        (theme.series[1], "<", a.tau_neg, "tau_neg", f"r >= {1 - low:g}"),
    ):
        advantage = one if sign == ">" else -one
        loss = clipped_loss(Ratio.of(r.log(), advantage), low, high)
        kept = (~outside_clip(r, advantage, low, high)).double()
        for ax, soft, hard in (
            (top, sapo_gate(r, tau) - sapo_gate(one, tau), -loss / advantage - 1),
            (bottom, sapo_weight(r, tau), kept),
        ):
            ax.plot(r, soft, color=color, label=f"SAPO, A {sign} 0 ({name} {tau:g})")
            (line,) = ax.plot(r, hard, color=color, label=f"clip, A {sign} 0 ({bound})")
            line.set(linestyle=DASHES, linewidth=1.4)
    for ax in (top, bottom):
        ax.axvline(1, color=theme.muted, linewidth=0.8)
        ax.set_xlim(0, 4)
    top.set_ylabel("gate\nf(r) - f(1)")
    bottom.set_ylabel("gradient weight\nw(r) = f'(r)")
    bottom.set_xlabel("importance ratio r")
    legend(top, columns=2)


SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Learning": (
        Figure(
            "reward",
            "Reward and held-out evaluation",
            "Mean reward of the rollouts, and accuracy on problems that training never draws.",
            lambda run: run.has("reward/mean") or bool(run.scores()),
            _draw_reward,
            height=4.6,
        ),
        curves(
            "response",
            "Responses, and groups without a signal",
            "A truncated response reached max_response_length before its end-of-text token. A "
            "group whose responses all got the same reward has no gradient.",
            Panel("mean length\n(tokens)", {"response/length_mean": "mean length"}),
            Panel("truncated\n(share)", {"response/truncated": "truncated"}, percent=True),
            Panel("groups with\none reward", {"reward/zero_std_groups": "without a signal"}),
            height=4.6,
        ),
    ),
    "Ratios and the gate": (
        _histograms(
            "ratio_hist",
            "Importance ratios by sign of the advantage",
            "Ratio of the current to the old policy, per token, over all updates of the run. "
            "The outermost bins also hold what lies beyond them.",
            "ratio/hist",
            "importance ratio r",
        ),
        _histograms(
            "gate_hist",
            "Gate weights by sign of the advantage",
            "How much of a token's gradient the soft gate keeps: 1 on-policy, towards 0 far off.",
            "sapo/hist_weight",
            "gate weight w",
        ),
        curves(
            "ratio_var",
            "Variance of the log ratio",
            "How far the updates of a step move off the policy that made its samples.",
            Panel("Var[log r] (nats$^2$)", {"ratio/log_var": "Var[log r]"}, log=True),
        ),
        curves(
            "kept",
            "What the objective holds back",
            "The mean gate weight of SAPO, or the share of tokens that a clipped loss cuts off.",
            Panel(
                "mean over tokens",
                {"sapo/weight_mean": "gate weight w", "actor/clip_fraction": "share clipped"},
            ),
        ),
        Figure(
            "gate_curve",
            "The gate beside hard clipping",
            "For this run's temperatures. f(1) is subtracted, since a constant has no gradient. "
            "Beyond its bound, clipping drops a token's gradient at once; the gate fades it out.",
            lambda run: True,
            _draw_gate,
            height=5.2,
        ),
    ),
    "The router": ROUTER_FIGURES,
    "Optimisation": (
        curves(
            "loss",
            "Policy loss",
            "Its level says little, since advantages cancel within a group; jumps say more.",
            Panel("loss", {"actor/pg_loss": "policy loss"}),
        ),
        curves(
            "grad_norm",
            "Gradient norm",
            "Before clipping, on a logarithmic axis.",
            Panel("L2 norm", {"actor/grad_norm": "gradient norm"}, log=True),
        ),
        curves(
            "kl",
            "KL divergence",
            "Of the current policy from the one that made the samples and, where the loss has a KL "
            "term, from the frozen reference.",
            Panel(
                "nats per token",
                {"actor/ppo_kl": "from the old policy", "actor/kl_loss": "from the reference"},
            ),
        ),
        curves(
            "entropy",
            "Entropy",
            "Mean entropy of the next-token distribution on response tokens.",
            Panel("nats per token", {"actor/entropy": "entropy"}),
        ),
    ),
    "Speed": (
        Figure(
            "time",
            "Time by stage",
            "Wall time of each stage of a step.",
            lambda run: bool(_stages(run)),
            _draw_time,
            height=3.9,
        ),
        Figure(
            "timeline",
            "One step",
            "What each rank and server did in the last step; the rest is none of these stages. "
            "timeline.json has the last steps, and the servers' addresses, for Perfetto "
            "(ui.perfetto.dev).",
            lambda run: any(event.stage == STEP for event in run.timeline),
            _draw_timeline,
            height=3.9,
        ),
        curves(
            "idle",
            "Idle shares",
            "Share of a step in which nothing is generated, and in which nothing is trained.",
            Panel(
                "share of a step",
                {"perf/rollout_idle": "no rollout", "perf/train_idle": "no training"},
                percent=True,
            ),
            height=3.9,
        ),
        curves(
            "throughput",
            "Throughput",
            "Tokens per second over whole steps, all ranks together.",
            Panel("tokens per second", {"perf/tokens_per_s": "tokens per second"}),
            height=3.9,
        ),
    ),
}
"""The page's sections with their figures, in its order."""
