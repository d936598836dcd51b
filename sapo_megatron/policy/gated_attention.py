"""Attention whose queries come with gates for what was attended to (Qwen3-Next, Qwen3.5)."""

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class GatedSelfAttention(SelfAttention):
    """megatron-core's, exact in fp64 and with fewer heads of keys than tensor-parallel ranks."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """``x [..., N D]`` times the sigmoid of ``gate [S, B, N, D]``.

        Upstream takes every gate for fp32, and 0.16 hands over those of all query heads of a key
        head that several ranks share.
        """
        sharing = gate.shape[-2] * gate.shape[-1] // x.shape[-1]
        gate = gate.chunk(sharing, dim=-2)[self.pg_collection.tp.rank() % sharing]
        wide = torch.promote_types(gate.dtype, torch.float32)
        return (x * gate.reshape(x.shape).to(wide).sigmoid()).to(x.dtype)
