"""Seconds of a rollout: decode steps, each with what it reads, computes, sends and launches."""

import math
from dataclasses import dataclass

from sapo_megatron.commands.plan import Plan
from sapo_megatron.commands.plan.gpus import BYTES, Constants
from sapo_megatron.commands.plan.layout import longest
from sapo_megatron.commands.plan.servers import Servers, cached_numbers, kept_states

SLICES = 32
"""Points of time at which a batch that runs out is looked at."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    seconds: float
    engine: str
    """Who generates, in words."""
    at_once: float
    """Sequences that a server, or a rank in process, decodes together."""
    decode_step: dict[str, float]
    """Seconds of a step with so many, by what they are spent on."""


def in_process(plan: Plan, c: Constants) -> Rollout:
    """Batches one after the other, each until its longest response ends, at the limit."""
    r, at_once = plan.recipe.rollout, plan.batches.generated_at_once
    batches = -(-plan.batches.sequences // plan.layout.dp_cp // at_once)
    context = longest(plan.recipe) - r.max_response_length / 2
    each = _decode_step(plan, c, plan.layout.tp, at_once, context, launch=c.launch)
    return Rollout(
        seconds=batches * r.max_response_length * sum(each.values()),
        engine=f"in process, {batches} batches in turn",
        at_once=at_once,
        decode_step=each,
    )


def on_servers(plan: Plan, servers: Servers, c: Constants) -> Rollout:
    """A batch with which servers are full until it runs out.

    Each token ends a response with the same chance, such that the mean is the plan's: lengths are
    exponential, up to the limit.
    """
    r, number, gpus = plan.recipe.rollout, servers.number, servers.gpus
    limit, prompt = r.max_response_length, plan.length * r.max_prompt_length / longest(plan.recipe)
    response, asked = plan.length - prompt, plan.batches.sequences / number
    held = max(servers.room / (servers.cached * plan.length + servers.states), 1.0)
    at_once = min(asked, r.server_concurrency, held)
    rate = _rate(response / limit)
    times = [(i + 0.5) / SLICES for i in range(SLICES)]
    left = [math.exp(-rate * time) for time in times]

    def step(share: float, time: float) -> dict[str, float]:
        return _decode_step(plan, c, gpus, at_once * share, prompt + time * limit, launch=c.graph)

    pairs = list(zip(left, times, strict=True))
    full = step(1.0, sum(share * time for share, time in pairs) / sum(left))
    last = sum(sum(step(share, time).values()) for share, time in pairs) / SLICES
    seconds = last * limit + (asked / at_once - 1) * response * sum(full.values())
    # The responses to a prompt share what is computed of it.
    seconds += r.rollout_batch_size / number * prompt * _computing(plan, c, gpus)
    engine = f"{number} vLLM servers of {gpus} GPUs"
    return Rollout(seconds=seconds, engine=engine, at_once=at_once, decode_step=full)


def _rate(share: float) -> float:
    """The rate at which responses end, per limit, with which their mean is so much of the limit."""
    low, high = 1e-6, 1e6
    for _ in range(60):
        rate = math.sqrt(low * high)
        low, high = (rate, high) if -math.expm1(-rate) / rate > share else (low, rate)
    return low


def _computing(plan: Plan, c: Constants, gpus: int) -> float:
    """Seconds of one token's matrix products on each of ``gpus``."""
    head = plan.arch.vocab_size * plan.arch.hidden_size
    flops = 2 * (plan.parameters.active_without_embeddings + head) / gpus
    return flops / (plan.gpu.tflops * 1e12 * c.matrix)


def _decode_step(
    plan: Plan, c: Constants, gpus: int, sequences: float, context: float, *, launch: float
) -> dict[str, float]:
    """Seconds of a step that adds a token to each of ``sequences``, by what they are spent on."""
    arch, experts = plan.arch, plan.arch.experts
    dtype, memory = BYTES[plan.recipe.model.params_dtype], plan.gpu.memory * c.bandwidth
    cached = arch.attends(range(arch.num_layers)) * cached_numbers(arch, gpus) * dtype
    idle = (1 - experts.topk / experts.number) ** sequences if experts else 0.0
    routed = sum(stage.total_experts for stage in plan.stages)
    weights = plan.parameters.total - idle * routed - arch.vocab_size * arch.hidden_size
    reading = weights * dtype / gpus / memory
    nodes = -(-gpus // plan.recipe.cluster.gpus_per_node)
    message = 2 * sequences * arch.hidden_size * dtype * (gpus > 1)
    reducing = (nodes - 1) * c.hop + message / (plan.gpu.nvlink * c.bandwidth)
    return {
        "reading weights": reading,
        # Beyond what is done while weights are read.
        "computing": max(sequences * _computing(plan, c, gpus) - reading, 0.0),
        # States are written as well.
        "reading keys and values": sequences
        * (context * cached + 2 * kept_states(arch, gpus, dtype))
        / memory,
        "launching kernels": arch.num_layers * launch,
        "all-reduces": 2 * arch.num_layers * reducing,
    }
