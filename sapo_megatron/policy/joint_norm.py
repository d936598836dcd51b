"""Attention whose query and key norms are each one over all heads (MiniMax-M2).

Tensor parallelism gives every rank some of the heads, so the norm's mean square is one over its
ranks. It is differentiable: a sum that is reduced in place, behind autograd's back, has the right
value and loses what the other ranks' heads say of this rank's.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sapo_megatron.policy.layers import norm_weight


class JointNormSelfAttention(SelfAttention):
    """Self-attention with such norms, which megatron-core has none of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, tp_group = self.config, self.pg_collection.tp
        self.q_layernorm = JointNorm(config, config.num_attention_heads, tp_group)
        self.k_layernorm = JointNorm(config, config.num_query_groups, tp_group)


class JointNorm(nn.Module):
    """RMS norm over all heads, of which this rank has some.

    Each rank holds the whole weight and uses its heads' part of it; the weight's mark tells
    megatron-core to sum the gradients over the ranks, which is exact also where several ranks have
    the same key head.
    """

    def __init__(
        self, config: TransformerConfig, num_heads: int, tp_group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.num_heads, self.tp_group = num_heads, tp_group
        self.eps = config.layernorm_epsilon
        self.weight = norm_weight(config, num_heads * config.kv_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., N, D]``, the heads of this rank, with at least fp32 arithmetic."""
        wide = x if x.dtype == torch.float64 else x.float()
        # Every rank has as many heads, and every head is on as many ranks: the mean of the ranks'
        # means is that of all heads.
        mean = wide.square().mean((-2, -1), keepdim=True)
        mean = _MeanOverRanks.apply(mean, self.tp_group)
        first = self.tp_group.rank() * self.num_heads // self.tp_group.size()
        weight = self.weight.view(self.num_heads, -1)[first : first + x.shape[-2]]
        return (wide * (mean + self.eps).rsqrt()).to(x.dtype) * weight


class _MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over the ranks of a group; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _mean(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mean(grad, ctx.group), None


def _mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    # Over tensor parallelism: its ranks have the heads of the same tokens, in every pass.
    dist.all_reduce(total, group=group)
    return total.div_(group.size())
