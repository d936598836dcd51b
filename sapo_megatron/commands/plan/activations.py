"""What a layer keeps for its backward pass, and what recomputation spares.

The counts follow Korthikanti et al. (arXiv 2205.05198), extended to grouped queries, latent
attention, SwiGLU and experts, with an attention kernel that stores no scores. They are numbers per
token before tensor parallelism, which with sequence parallelism divides all of them.

Shape legend: H hidden size, D heads times head size, F inner width of an MLP, E experts, k experts
per token.
"""

from dataclasses import dataclass
from typing import NamedTuple

from sapo_megatron.hf.architecture import (
    Architecture,
    Experts,
    GatedDeltaNet,
    GroupedQueryAttention,
)
from sapo_megatron.policy.delta_rule import CHUNK
from sapo_megatron.recipe.schema import ParallelConfig

IMBALANCE = 1.5
"""Tokens that the busiest of several expert-parallel ranks receives, as a multiple of the mean.
Assumed."""


class Kept(NamedTuple):
    """Numbers per token that one operation keeps."""

    name: str
    numbers: float
    spared_by: str = ""
    """Modules of ``recompute_modules`` under which it is computed again instead."""


class Layer(NamedTuple):
    """What a layer keeps, by block: what is recomputed, and differentiated, together."""

    attention: list[Kept]
    mlp: list[Kept]
    states: float = 0.0
    """Numbers per token that only its backward pass has: states between chunks, and gradients."""


def layer(arch: Architecture, number: int, parallel: ParallelConfig) -> Layer:
    """What layer ``number`` (from 0) keeps."""
    states, experts = 0.0, _experts(arch, number)
    if (d := arch.delta_net) and number in d.layers:
        attention, states = _delta_net(arch.hidden_size, d), 2 * d.state_size / CHUNK
    else:
        attention = _attention(arch, parallel.tensor_model_parallel_size)
    if experts is None:
        return Layer(attention, _dense(arch), states)
    imbalance = IMBALANCE if parallel.expert_model_parallel_size > 1 else 1.0
    return Layer(attention, _moe(arch, experts, imbalance), states)


def _experts(arch: Architecture, number: int) -> Experts | None:
    """The experts of layer ``number``; None where it is dense."""
    return arch.experts if arch.experts and number in arch.experts.layers else None


def _attention(arch: Architecture, tp: int) -> list[Kept]:
    a, hidden = arch.attention, arch.hidden_size
    kept = [Kept("input", hidden)]
    if isinstance(a, GroupedQueryAttention):
        queries = a.num_heads * a.head_dim
        # Fewer key heads than ranks: each rank has one of its own.
        keys = max(a.num_kv_heads, tp) * a.head_dim
        kept += [Kept("normed", hidden)]
        kept += [Kept("q and k before their norms", queries + keys)] if a.qk_norm else []
        kept += [Kept("q, k and v", queries + 2 * keys), Kept("output", queries)]
        kept += [Kept("gate, and what passes it", 2 * queries)] if a.output_gate else []
    else:
        queries = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        values = a.num_heads * a.v_head_dim
        latent = 2 * a.kv_lora_rank + a.qk_rope_head_dim + 2 * (a.q_lora_rank or 0)
        kept += [
            Kept("normed", hidden, "layernorm"),
            Kept("latents, before and after their norms", latent),
            Kept("q, k and v", 2 * queries + values, "mla_up_proj"),
            Kept("output", values),
        ]
    return kept


def _delta_net(hidden: int, d: GatedDeltaNet) -> list[Kept]:
    """What flash-linear-attention's kernels keep: no states, which are computed again."""
    heads, values = d.num_value_heads, d.num_value_heads * d.value_head_dim
    return [
        Kept("input", hidden),
        Kept("normed", hidden),
        Kept("projected", d.mixed_size + values + 2 * heads),
        Kept("convolved", d.mixed_size),
        Kept("q and k of every value head", 2 * heads * d.key_head_dim),
        Kept("systems of the chunks", heads * CHUNK),
        Kept("read and gated", 2 * values),
    ]


def _dense(arch: Architecture) -> list[Kept]:
    inner = arch.ffn_hidden_size
    return [
        Kept("input", arch.hidden_size),
        Kept("normed", arch.hidden_size, "mlp"),
        Kept("gate and up", 2 * inner, "mlp"),
        Kept("activation", inner, "mlp"),
    ]


def _moe(arch: Architecture, experts: Experts, imbalance: float) -> list[Kept]:
    copies = experts.topk * imbalance
    inner, shared = experts.hidden_size, experts.shared_hidden_size
    kept = [
        Kept("input", arch.hidden_size),
        Kept("normed", arch.hidden_size, "layernorm"),
        # fp32 logits and probabilities, in numbers of two bytes.
        Kept("router", 4 * experts.number, "moe"),
        Kept("dispatched tokens", copies * arch.hidden_size, "moe"),
        Kept("gate and up", copies * 2 * inner, "moe"),
        Kept("activation", copies * inner, "moe moe_act"),
    ]
    if shared:
        kept.append(Kept("shared experts", 3 * shared, "moe shared_experts"))
    return kept


def _sum(kept: list[Kept]) -> float:
    return sum(k.numbers for k in kept)


@dataclass(frozen=True, kw_only=True)
class ChunkActivations:
    """Numbers per token, before tensor parallelism, of the layers of one chunk."""

    stored: float
    """Kept from a forward pass until its backward pass."""
    working: float
    """On top during the backward pass: what is recomputed at once, and a block's gradients."""


def chunk(
    arch: Architecture, layers: tuple[int, ...], parallel: ParallelConfig
) -> ChunkActivations:
    """Activations of a virtual stage's ``layers`` under the recipe's recomputation."""
    kept = [layer(arch, number, parallel) for number in layers]
    whole = [_sum(attention + mlp) for attention, mlp, _ in kept]
    gradients = max((max(_sum(a) + states, _sum(m)) for a, m, states in kept), default=0.0)
    if parallel.recompute_granularity == "full":
        n = min(parallel.recompute_num_layers or 1, len(layers))
        if parallel.recompute_method == "uniform":
            groups = [whole[i : i + n] for i in range(0, len(whole), n)]
            stored: float = len(groups) * arch.hidden_size
            again = max((sum(group) for group in groups), default=0.0)
        else:
            stored = n * arch.hidden_size + sum(whole[n:])
            again = max(whole[:n], default=0.0)
        return ChunkActivations(stored=stored, working=again + gradients)
    modules: set[str] = set()
    if parallel.recompute_granularity == "selective":
        modules = set(parallel.recompute_modules or ())
    spared = [_sum([k for k in a + m if modules & set(k.spared_by.split())]) for a, m, _ in kept]
    return ChunkActivations(
        stored=sum(whole) - sum(spared), working=max(spared, default=0.0) + gradients
    )


def forward_block(arch: Architecture, number: int, parallel: ParallelConfig) -> float:
    """Numbers per token that one block of layer ``number`` has at once on one rank.

    Without sequence parallelism: attention and dense layers are cut, tokens and routed experts are
    not.
    """
    tp = parallel.tensor_model_parallel_size
    attention, mlp = map(_sum, layer(arch, number, parallel)[:2])
    routed = _experts(arch, number) is not None
    return 2 * arch.hidden_size + max(attention / tp, mlp if routed else mlp / tp)
