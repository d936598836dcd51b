"""A plan as a table and as JSON."""

import textwrap
from dataclasses import asdict
from typing import Any

from sapo_megatron.commands.plan import Plan
from sapo_megatron.commands.plan.advice import changed
from sapo_megatron.commands.plan.gpus import GIB, RESERVE
from sapo_megatron.commands.plan.layout import longest
from sapo_megatron.commands.plan.memory import Memory
from sapo_megatron.commands.plan.seconds import seconds, slow
from sapo_megatron.commands.plan.servers import Servers

COLUMNS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "reserve": "rsrv",
    "batches": "batch",
    "activations": "activ",
    "logprobs": "logp",
    "kv_cache": "kv",
    "generation": "gen",
    "server": "serve",
}
"""Parts of the memory -> heads of the table."""
RED, PLAIN = "\033[31m", "\033[0m"


def as_json(plan: Plan) -> dict[str, Any]:
    """What ``plan --json`` prints: numbers of the worst stage's GPUs, and all stages."""
    worst, step = plan.memory[plan.worst], plan.step
    return {
        "model": plan.recipe.model.path,
        "recipe": plan.recipe.name,
        "gpu": plan.recipe.cluster.gpu,
        "world_size": plan.layout.world_size,
        "layout": _layout(plan),
        "params": {
            "total": plan.parameters.total,
            "active": plan.parameters.active,
            "active_without_embeddings": plan.parameters.active_without_embeddings,
            "per_rank_max": max(stage.parameters for stage in plan.stages),
        },
        "memory_gib": _gib(worst),
        "fits": plan.fits,
        "available_gib": round(plan.gpu.memory_gib, 2),
        "worst_stage": plan.worst,
        "peak": worst.peak,
        "largest": plan.largest,
        "host_memory_gib": {
            **{name: round(size, 2) for name, size in plan.host.parts().items()},
            "total": round(plan.host.total / GIB, 2),
        },
        "host_available_gib": round(plan.host_gib, 2),
        "servers": plan.servers and asdict(plan.servers),
        "stages": [
            {"layers": len(stage.layers), "params": stage.parameters, "memory_gib": _gib(memory)}
            for stage, memory in zip(plan.stages, plan.memory, strict=True)
        ],
        "step": {
            "sequences": plan.batches.sequences,
            "tokens": step.tokens,
            "micro_batches": plan.batches.micro_batches,
            "bubble": round(_bubble(plan), 4),
            "flops": step.flops,
            "seconds_at_peak": _at_peak(plan, sum(step.flops.values())),
            "gib_sent": {name: round(size / GIB, 2) for name, size in step.bytes_sent.items()},
        },
        "mean_length": plan.length,
        "seconds": {name: round(took, 2) for name, took in seconds(plan)[0].parts().items()},
        "slow": slow(plan),
        "suggestions": [
            {"settings": s.settings, "total_gib": round(s.total_gib, 2)} for s in plan.suggestions
        ],
    }


def as_table(plan: Plan, *, colour: bool = False) -> str:
    """What ``plan`` prints, in lines of at most 100 columns; ``colour``: what is slow in red."""
    parts = [_head(plan), _memory_table(plan), _step_table(plan)]
    if why := slow(plan):
        text = "\n".join(textwrap.wrap(f"slow: {why}", 100))
        parts.append(f"{RED}{text}{PLAIN}" if colour else text)
    return "\n\n".join(parts) + "\n"


def verdict(plan: Plan) -> str:
    """One line for a plan that does not fit: what is too large, and what would help."""
    if plan.servers and not plan.fits_servers:
        return _server_verdict(plan, plan.servers)
    if plan.total_gib <= plan.gpu.memory_gib:
        return _host_verdict(plan)
    worst = plan.memory[plan.worst]
    size = worst.parts()[plan.largest]
    helps = " or ".join(f"{s.words} ({s.total_gib:.1f} GiB)" for s in plan.suggestions)
    return (
        f"does not fit on {plan.recipe.cluster.gpu}: a GPU of stage {plan.worst} needs "
        f"{plan.total_gib:.1f} GiB of {plan.gpu.memory_gib:.1f}, most of it {plan.largest} "
        f"({size:.1f} GiB); "
        + (f"it would fit with {helps}" if helps else "no change that was tried makes it fit")
    )


def _host_verdict(plan: Plan) -> str:
    name, size = max(plan.host.parts().items(), key=lambda part: part[1])
    return (
        f"does not fit: a node needs {plan.host.total / GIB:.0f} GiB of host memory of "
        f"{plan.host_gib:.0f}, most of it {name} ({size:.0f} GiB); take more cluster.nodes, a "
        f"smaller optimizer.optimizer_offload_fraction or smaller batches, or say with "
        f"cluster.host_memory_gib what a node has"
    )


def _server_verdict(plan: Plan, servers: Servers) -> str:
    key = "rollout.server_tensor_parallel_size"
    larger = [changed(plan.recipe, {key: servers.gpus * factor}) for factor in (2, 4, 8, 16)]
    sizes = (plan.parameters.total, plan.layout.world_size)
    found = (s for s in (Servers.of(r, plan.arch, *sizes) for r in larger) if s and s.holds)
    enough = next((f"{key}={s.gpus}" for s in found), f"more of {key}")
    return (
        f"does not fit: a server takes {servers.utilization:g} of each of its {servers.gpus} GPUs, "
        f"{servers.share / GIB:.1f} GiB; weights are {servers.weights / GIB:.1f} of that, all else "
        f"{RESERVE / GIB:.1f}, and keys and values of one sequence {servers.least / GIB:.1f}; it "
        f"would fit with {enough} (servers larger than a node: docs/launch.md)"
    )


def _head(plan: Plan) -> str:
    recipe, layout, parameters = plan.recipe, plan.layout, plan.parameters
    sizes = "  ".join(f"{name} {size}" for name, size in _layout(plan).items() if name != "vpp")
    rank = max(stage.parameters for stage in plan.stages)
    beside = plan.servers.beside if plan.servers else 0
    used, without = parameters.active, parameters.active_without_embeddings
    rows = {
        "model": recipe.model.path,
        "cluster": f"{layout.world_size} x {recipe.cluster.gpu} ({plan.gpu.memory_gib:.1f} GiB)"
        + (f" that train, {beside} for servers" if beside else ""),
        "layout": sizes + (f"  vpp {layout.vpp}" if layout.vpp > 1 else ""),
        "parameters": f"{_billions(parameters.total)} in all, at most {_billions(rank)} on a GPU",
        "": f"a token uses {_billions(used)}, {_billions(without)} without embeddings",
    }
    return _rows(rows, recipe.name)


def _memory_table(plan: Plan) -> str:
    if plan.servers is None:
        absent, taken = {"server"}, "all but batch to logp"
    elif plan.recipe.rollout.colocate:
        absent, taken = {"generation"}, "rsrv, kv, serve, what stays"
    else:
        absent, taken = {"kv_cache", "generation", "server"}, "weights to rsrv"
    columns = {name: head for name, head in COLUMNS.items() if name not in absent}
    rows = [["stage", "layers", *columns.values(), "update", "rollout"]]
    for number, (stage, memory) in enumerate(zip(plan.stages, plan.memory, strict=True)):
        parts = memory.parts()
        sizes = [*(parts[name] for name in columns), memory.update / GIB, memory.rollout / GIB]
        rows.append([str(number), str(len(stage.layers)), *(f"{size:.1f}" for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    share = plan.total_gib / plan.gpu.memory_gib
    in_gpu = plan.total_gib <= plan.gpu.memory_gib
    lines += [
        f"update: weights to logp (activ and logp take turns); rollout: {taken}",
        f"{'fits' if in_gpu else 'does not fit'}: {plan.total_gib:.1f} of "
        f"{plan.gpu.memory_gib:.1f} GiB ({share:.0%}), on stage {plan.worst} in the "
        f"{plan.memory[plan.worst].peak}",
    ]
    on_host = ", ".join(f"{name} {size:.0f}" for name, size in plan.host.parts().items())
    lines.append(
        f"host memory per node: {on_host}; {'fits' if plan.fits_host else 'does not fit'}: "
        f"{plan.host.total / GIB:.0f} of {plan.host_gib:.0f} GiB"
    )
    lines += _server_lines(plan.servers) if plan.servers else []
    title = "memory per GPU, GiB (estimated, with rsrv and the experts' imbalance assumed)"
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _server_lines(servers: Servers) -> list[str]:
    where = "of their own" if servers.beside else "the trainer's, asleep in the update"
    fits = "fits" if servers.holds else "does not fit"
    return [
        f"servers: {servers.number}, each on {servers.gpus} GPUs, {where}; of a GPU "
        f"{servers.share / GIB:.1f} GiB ({servers.utilization:g}):",
        f"  weights {servers.weights / GIB:.1f}, all else {RESERVE / GIB:.1f}, keys and values "
        f"{servers.room / GIB:.1f}; {fits}: the longest sequence takes {servers.least / GIB:.1f}",
    ]


def _step_table(plan: Plan) -> str:
    step, batches, train = plan.step, plan.batches, plan.recipe.train
    sent = "  ".join(f"{name} {size / GIB:.1f}" for name, size in step.bytes_sent.items() if size)
    waits = f"; pipeline bubble {_bubble(plan):.0%}" if plan.layout.pp > 1 else ""
    idle = plan.layout.dp - batches.mini_batch
    waits += f"; {idle} of {plan.layout.dp} data-parallel ranks get none" if idle > 0 else ""
    taken, made = seconds(plan)
    each = 1e3 * sum(made.decode_step.values())
    passes = {"old log-probs": ("logprob", taken.logprobs), "update": ("update", taken.update)}
    rows = {
        "sequences": f"{batches.sequences} of {batches.length} tokens, {_short(step.tokens)} "
        f"tokens in all",
        "updates": f"{train.num_mini_batches} of {batches.mini_batch} sequences, "
        f"{batches.micro_batches} micro-batches per rank{waits}",
        "rollout": f"{taken.rollout:.0f} s: {made.engine}, {made.at_once:.0f} sequences at once, "
        f"{each:.0f} ms a step",
        **{
            name: f"{took:.0f} s: {_short(step.flops[stage])}FLOP, "
            f"{_at_peak(plan, step.flops[stage]):.3g} s at the GPUs' peak"
            for name, (stage, took) in passes.items()
        },
        "hand-over": f"{taken.handover:.0f} s",
        "step": f"{taken.step:.0f} s (all of these are estimated)",
        "GiB sent per GPU": f"{sent or 'nothing'} (log-probs and updates)",
    }
    at_most = "as long as it may be"
    length = at_most if plan.length == longest(plan.recipe) else "of the mean length"
    return _rows(rows, f"a step in which every sequence is {length}")


def _short(number: float) -> str:
    """A number with a decimal prefix, 12300 as ``12.3 k``; the unit follows."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "


def _rows(rows: dict[str, str], title: str) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name.ljust(width)}  {text}" for name, text in rows.items())])


def _layout(plan: Plan) -> dict[str, int]:
    layout = plan.layout
    sizes = {name: vars(layout)[name] for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    return {**sizes, "dp": layout.dp, "expert_dp": layout.expert_dp}


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _gib(memory: Memory) -> dict[str, float]:
    parts = {name: round(size, 3) for name, size in memory.parts().items()}
    return {**parts, "total": round(memory.total / GIB, 3)}


def _bubble(plan: Plan) -> float:
    """Share of an update in which a stage waits for others (arXiv 2104.04473, section 2.2)."""
    waits = plan.layout.pp - 1
    return waits / (plan.batches.micro_batches * plan.layout.vpp + waits)


def _at_peak(plan: Plan, flops: float) -> float:
    """The least that ``flops`` take on all GPUs of the cluster."""
    return flops / (plan.layout.world_size * plan.gpu.tflops * 1e12)
