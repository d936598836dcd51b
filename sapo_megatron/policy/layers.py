"""Torch layers under Transformer Engine's parameter names.

With them a model built on CPU has the same parameters, shapes and checkpoint as one built with
Transformer Engine, and the same Hugging Face mapping serves both. On a GPU they are a reference.

Shape legend: S sequence, T packed tokens, B batch, N heads on this tensor-parallel rank, G
key/value groups on it, D head size, H hidden size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from sapo_megatron.policy import compat


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension.

    Under sequence parallelism the weight sees a slice of the sequence on each tensor-parallel
    rank; its mark tells megatron-core to sum the gradients over them.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        self.weight = norm_weight(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, zero_centered=self.zero_centered)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool = False) -> Tensor:
    """RMS norm of ``x [..., H]`` with at least fp32 arithmetic, in the dtype of ``x``.

    ``zero_centered``: the weight is what is above 1, and multiplies before the dtype is narrowed.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = F.rms_norm(wide, (x.shape[-1],), None, eps)
    if zero_centered:
        return (normed * (1 + weight.to(wide.dtype))).to(x.dtype)
    return normed.to(x.dtype) * weight


def norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    """Ones, marked as :class:`RMSNorm` says."""
    weight: Any = nn.Parameter(
        torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device())
    )
    weight.sequence_parallel = config.sequence_parallel
    return weight


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMS norm, then a column-parallel linear that owns the norm's weight."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.layer_norm_weight = norm_weight(self.config, input_size)
        self.eps = self.config.layernorm_epsilon

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed = rms_norm(
            input_,
            self.layer_norm_weight,
            self.eps,
            zero_centered=self.config.layernorm_zero_centered_gamma,
        )
        return super().forward(normed, *args, **kwargs)


class DuplicatedLinear(nn.Module):
    """A linear whole on every tensor-parallel rank, each of which applies it to its tokens.

    Latent attention projects down with it. Upstream's other way, a column-parallel linear whose
    output is gathered, loses gradients of the rotary part of the keys under tensor parallelism.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias, "latent attention has no biases"
        weight = torch.empty(
            output_size,
            input_size,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )
        parameter: Any = nn.Parameter(weight)
        if config.perform_initialization:
            init_method(parameter)
        parameter.sequence_parallel = config.sequence_parallel
        self.weight = parameter

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class GroupedLinear(nn.Module):
    """One linear per local expert, applied to consecutive runs of rows.

    Weights are ``weight0 .. weight{n-1}``, each ``[out, in]``. Experts are whole on their rank:
    only ``expert_tensor_parallel_size`` 1.
    """

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias, "expert biases are not supported"
        assert pg_collection.expt_tp.size() == 1, "the config refuses expert tensor parallelism"
        self.num_gemms = num_gemms
        self.groups = pg_collection
        for i in range(num_gemms):
            weight = nn.Parameter(
                torch.empty(
                    output_size,
                    input_size,
                    dtype=config.params_dtype,
                    device=torch.cuda.current_device(),
                )
            )
            if config.perform_initialization:
                init_method(weight)
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, rows: Sequence[int]) -> tuple[Tensor, None]:
        """``x [sum(rows), in]``, the first ``rows[0]`` of them for expert 0, and so on."""
        outputs = [
            F.linear(part, self.get_parameter(f"weight{i}"))
            for i, part in enumerate(torch.split(x, list(rows)))
        ]
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Experts along a leading axis, as the grouped and the sequential modules save them."""
        experts = self.groups.ep.size() * self.num_gemms
        first = self.groups.ep.rank() * self.num_gemms
        sharded = {}
        for i in range(self.num_gemms):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + i, experts))
            shards = make_sharded_tensors_for_checkpoint(
                {"weight": self.get_parameter(f"weight{i}")},
                prefix,
                {},
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=self.groups.expt_dp,
            )
            sharded[f"{prefix}weight{i}"] = shards[f"{prefix}weight"]
        return sharded

    def backward_dw(self) -> None:
        """Weight gradients are computed with the input's; nothing is delayed."""


class TorchAttention(nn.Module):
    """Core attention on ``scaled_dot_product_attention``: padded, packed (THD), with or without
    context parallelism (zigzag split, keys and values gathered), and with a KV cache.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert pg_collection is not None, "attention needs its process groups"
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Causal attention.

        ``query [S, B, N, D]``, ``key``, ``value [S', B, G, D]`` -> ``[S, B, N D]``; packed:
        ``[T, N, D]``, ``[T, G, D]`` -> ``[T, N D]``. ``attention_mask`` is not read: causality
        keeps every position from the padding behind it.
        """
        assert attention_bias is None, "attention bias is not supported"
        if packed_seq_params is None:
            assert self.cp_group.size() == 1, "context parallelism runs on packed sequences"
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            causal = attn_mask_type != AttnMaskType.no_mask and query.shape[0] > 1
            out = self._attend(q, k, v, causal=causal)
            return out.permute(2, 0, 1, 3).flatten(2)
        layout = packed_layout(packed_seq_params, self.cp_group, query.device)
        if self.cp_group.size() > 1:
            both = _gather_sequence(torch.cat((key, value), dim=-1), self.cp_group)
            key, value = both.split((key.shape[-1], value.shape[-1]), dim=-1)
        q = query[layout.query_rows].transpose(1, 2)
        k, v = (x[layout.key_rows].transpose(1, 2) for x in (key, value))
        out = self._attend(q, k, v, mask=layout.mask, causal=layout.mask is None)
        return out.transpose(1, 2)[layout.valid].flatten(1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None
    ) -> Tensor:
        """``q [B, N, S, D]``, ``k``, ``v [B, G, S', D]`` -> ``[B, N, S, D]``."""
        share = q.shape[1] // k.shape[1]
        if share > 1:
            k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.softmax_scale
        )


class _PackedLayout:
    """Where the tokens of a packed micro-batch lie, as a padded ``[sequences, longest]`` grid."""

    def __init__(self, cu_seqlens: Tensor, cp_rank: int, cp_size: int, device: torch.device):
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        starts = cu_seqlens[:-1].long() // cp_size
        local = lengths // cp_size
        grid = torch.arange(int(local.max()), device=device)
        self.valid = grid < local[:, None]
        self.query_rows = torch.where(self.valid, starts[:, None] + grid, 0)
        if cp_size == 1:
            self.key_rows, self.key_valid, self.mask = self.query_rows, self.valid, None
            return
        # Rank r of c holds chunks r and 2c - 1 - r of each sequence's 2c chunks. Rows of the
        # gathered keys stand rank by rank, each rank's in its own packed order.
        position = torch.arange(int(lengths.max()), device=device)
        chunk = (lengths // (2 * cp_size))[:, None].clamp(min=1)
        which = position // chunk
        owner = torch.minimum(which, 2 * cp_size - 1 - which)
        inside = position % chunk + torch.where(which >= cp_size, chunk, 0)
        self.key_valid = position < lengths[:, None]
        per_rank = int(cu_seqlens[-1]) // cp_size
        self.key_rows = torch.where(self.key_valid, owner * per_rank + starts[:, None] + inside, 0)
        first = torch.where(grid < chunk, cp_rank, 2 * cp_size - 1 - cp_rank)
        query_position = first * chunk + grid % chunk
        visible = position[None, None, :] <= query_position[:, :, None]
        self.mask = (visible & self.key_valid[:, None, :])[:, None]


def packed_layout(
    params: PackedSeqParams, cp_group: dist.ProcessGroup, device: torch.device
) -> _PackedLayout:
    """The layout of a micro-batch, made once and kept with it for the other layers."""
    if not hasattr(params, "sapo_layout"):
        params.sapo_layout = _PackedLayout(
            params.cu_seqlens_q, cp_group.rank(), cp_group.size(), device
        )
    return params.sapo_layout


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        # Over context parallelism: each of its ranks runs this layer on its piece of the batch.
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        # Every rank attended to every key: a key's gradient is the sum over the same group.
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


def _gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x [T, G, D]`` of every rank of ``group`` -> ``[T * size, G, D]``, differentiable."""
    return _GatherSequence.apply(x, group)


class TorchSpecProvider(BackendSpecProvider):
    """These layers as a backend of megatron-core's layer specs, beside its TESpecProvider."""

    def linear(self) -> type:
        return DuplicatedLinear

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, *legacy: bool) -> Any:
        return compat.grouped_mlp(GroupedLinear)

    def activation_func(self) -> type | None:
        return None
