"""How many floating-point operations the model takes, and how many a GPU can do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sapo_megatron.hf.architecture import Architecture, GroupedQueryAttention
from sapo_megatron.hf.folder import Listed
from sapo_megatron.policy.delta_rule import CHUNK
from sapo_megatron.recipe.schema import GpuName, Recipe

PEAK_TFLOPS: dict[GpuName, float] = {
    "a100-80gb": 312,
    "h100-80gb": 989,
    "h20-96gb": 148,
    "h200-141gb": 989,
    "b200-180gb": 2250,
}
"""Peak of dense bf16 matrix products, 1e12 FLOP/s, of SXM boards (docs/plan-arithmetic.md)."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters of the whole model."""

    total: int
    active: int
    """Those that one token passes: all but the routed experts it is not sent to. Embedding and
    output layer count whole."""
    active_without_embeddings: int

    @classmethod
    def of(cls, arch: Architecture, *, total: int, experts: int, embeddings: int) -> "Parameters":
        """``experts`` and ``embeddings`` (the output layer among them) are parts of ``total``."""
        chosen = arch.experts.topk / arch.experts.number if arch.experts else 1
        active = total - experts + round(experts * chosen)
        return cls(total=total, active=active, active_without_embeddings=active - embeddings)

    @classmethod
    def listed(cls, arch: Architecture, tensors: Iterable[Listed]) -> "Parameters":
        """Of all tensors of the model under their names in Hugging Face files."""
        total = experts = embeddings = 0
        for name, _, shape in tensors:
            total += (size := shape.numel())
            experts += size if ".experts." in name else 0
            embeddings += size if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0
        return cls.of(arch, total=total, experts=experts, embeddings=embeddings)


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
