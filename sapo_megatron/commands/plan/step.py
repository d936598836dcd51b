"""The arithmetic of a step: tokens, floating-point operations, bytes sent."""

from dataclasses import dataclass

from sapo_megatron.commands.plan.gpus import BYTES
from sapo_megatron.commands.plan.layout import Batches, Layout
from sapo_megatron.commands.plan.memory import GRADIENT_BYTES
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.policy.blueprint import Stage
from sapo_megatron.policy.flops import Parameters, Passes, forward_flops, frozen
from sapo_megatron.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step (rollout, old log-probs, updates) whose sequences are all of one length."""

    tokens: int
    flops: dict[str, float]
    """Of ``rollout``, ``logprob`` and ``update``."""
    bytes_sent: dict[str, float]
    """By group, what the busiest GPU sends in log-prob and update passes, not in generation."""


def step(
    recipe: Recipe, arch: Architecture, layout: Layout, stages: list[Stage], length: int
) -> Step:
    """What a step with sequences of ``length`` tokens costs (:class:`Step`)."""
    batches, parameters = Batches.of(recipe, layout, length), counted(arch, stages)
    forward = batches.sequences * forward_flops(arch, parameters, length)
    updates = update_passes(recipe)
    sent = [
        bytes_sent(recipe, arch, layout, stages, length, passes)
        for passes in (Passes(frozen(recipe), 0), updates)
    ]
    return Step(
        tokens=batches.tokens,
        flops={
            "rollout": forward,
            "logprob": frozen(recipe) * forward,
            "update": updates.work * forward,
        },
        bytes_sent={group: sum(s[group] for s in sent) for group in sent[0]},
    )


def counted(arch: Architecture, stages: list[Stage]) -> Parameters:
    """The parameters of all stages."""
    return Parameters.of(
        arch,
        total=sum(s.total for s in stages),
        experts=sum(s.total_experts for s in stages),
        embeddings=sum(s.total_embeddings for s in stages),
    )


def update_passes(recipe: Recipe) -> Passes:
    """Those of the updates, full recomputation among them."""
    return Passes(2 if recipe.parallel.recompute_granularity == "full" else 1, 1)


def bytes_sent(
    recipe: Recipe,
    arch: Architecture,
    layout: Layout,
    stages: list[Stage],
    length: int,
    passes: Passes,
) -> dict[str, float]:
    """Bytes that one GPU of the busiest stage sends, by group, in rings and all-to-alls."""
    dtype = BYTES[recipe.model.params_dtype]
    forwards, backwards = passes
    batches = Batches.of(recipe, layout, length)
    tokens = batches.sequences_per_rank * length / layout.cp
    hidden = tokens * arch.hidden_size * dtype
    busiest = max(stages, key=lambda s: len(s.layers))
    layers, moe = len(busiest.layers), moe_layers(arch, busiest)
    experts = arch.experts
    shared = moe if experts and experts.shared_hidden_size else 0
    # With sequence parallelism a block gathers its input and scatters its output; backward does
    # the same the other way, and gathers the input once more (arXiv 2205.05198).
    blocks = layers + (layers - moe) + shared
    gathers = blocks * (2 * forwards + 3 * backwards)
    sent = {"tp": hidden * gathers * _others(layout.tp)}
    # Keys and values once around the ring; backward they come with their gradients.
    keys = tokens * busiest.cached_per_token * dtype
    sent["cp"] = keys * (layout.cp - 1) * passes.work
    if d := arch.delta_net:  # its ranks exchange tokens for heads, and back
        here = len(set(busiest.layers) & set(d.layers)) / layout.tp
        values = d.num_value_heads * d.value_head_dim
        exchanged = here * (d.mixed_size + 2 * (values + d.num_value_heads)) * tokens * dtype
        sent["cp"] += exchanged * (forwards + backwards) * _others(layout.cp)
    # To the experts and back, forward and backward.
    copies = hidden / layout.tp * (experts.topk if experts else 0) * moe
    sent["ep"] = copies * 2 * (forwards + backwards) * _others(layout.ep)
    # Layers that are computed again hand nothing over.
    handed = min(forwards, 1) + backwards if backwards else forwards
    chunks = layout.vpp if layout.pp > 1 else 0
    sent["pp"] = hidden / layout.tp * chunks * handed
    # Gradients scattered, weights gathered, once an optimizer step.
    each = GRADIENT_BYTES[recipe.model.params_dtype] + dtype
    reduced = max(
        s.dense * _others(layout.dp_cp) + s.experts * _others(layout.expert_dp) for s in stages
    )
    sent["dp"] = backwards * recipe.train.num_mini_batches * reduced * each
    return sent


def moe_layers(arch: Architecture, stage: Stage) -> int:
    """How many of the stage's layers have experts."""
    return len(set(stage.layers) & set(arch.experts.layers)) if arch.experts else 0


def _others(size: int) -> float:
    """The share of a tensor that a ring or an all-to-all over ``size`` ranks sends elsewhere."""
    return (size - 1) / size
