"""The arithmetic of a step: tokens, floating-point operations, bytes sent."""

from dataclasses import dataclass
from typing import NamedTuple

from sapo_megatron.commands.plan.gpus import BYTES
from sapo_megatron.commands.plan.layout import Batches, Layout
from sapo_megatron.commands.plan.memory import GRADIENT_BYTES
from sapo_megatron.hf.architecture import Architecture, GroupedQueryAttention
from sapo_megatron.policy.blueprint import Stage
from sapo_megatron.policy.delta_rule import CHUNK
from sapo_megatron.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters of the whole model."""

    total: int
    active: int
    """Those that one token passes: all but the routed experts it is not sent to. Embedding and
    output layer count whole."""
    active_without_embeddings: int

    @classmethod
    def of(cls, arch: Architecture, stages: list[Stage]) -> "Parameters":
        total = sum(s.total for s in stages)
        experts = sum(s.total_experts for s in stages)
        chosen = arch.experts.topk / arch.experts.number if arch.experts else 1
        active = total - experts + round(experts * chosen)
        embeddings = sum(s.total_embeddings for s in stages)
        return cls(total=total, active=active, active_without_embeddings=active - embeddings)


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
    batches, parameters = Batches.of(recipe, layout, length), Parameters.of(arch, stages)
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


def forward_flops(arch: Architecture, parameters: Parameters, length: int) -> float:
    """Floating-point operations of one sequence of ``length`` tokens.

    2 per parameter and token, and causal attention (arXiv 2204.02311, appendix B; 2104.04473).

    The input embedding is a look-up and multiplies nothing; the output layer does, also where its
    weight is the embedding's.
    """
    head = arch.vocab_size * arch.hidden_size
    a = arch.attention
    if isinstance(a, GroupedQueryAttention):
        widths = a.num_heads * 2 * a.head_dim
    else:
        widths = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
    # Scores and their product with the values, 2 FLOPs each, over half the square.
    attention = arch.attends(range(arch.num_layers)) * widths * length**2
    if d := arch.delta_net:
        # Of a token with the state, and with those of its chunk (policy/delta_rule.py).
        inside = d.num_value_heads * CHUNK * (5 * d.key_head_dim + 3 * d.value_head_dim)
        attention += len(d.layers) * (6 * d.state_size + inside) * length
    return 2 * (parameters.active_without_embeddings + head) * length + attention


class Passes(NamedTuple):
    """Passes over the sequences of a step."""

    forwards: int
    backwards: int

    @property
    def work(self) -> int:
        """In forward passes: a backward pass is two."""
        return self.forwards + 2 * self.backwards


def frozen(recipe: Recipe) -> int:
    """Forward passes before the updates: the old policy's and the reference's."""
    return (recipe.algorithm.old_policy == "recompute") + (recipe.algorithm.kl_coef > 0)


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
