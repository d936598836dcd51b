"""Gated DeltaNet layers (arXiv 2412.06464), as Qwen3-Next and Qwen3.5 have them.

In torch, with the parameters of megatron-core's ``GatedDeltaNet``, whose kernels need a GPU, or on
that. Tensor parallelism gives every rank some of the heads, and so does context parallelism while
the rule runs: its ranks exchange their tokens for heads, and what comes out for tokens again.

Shape legend: S sequence, T packed tokens of this context-parallel rank, B batch, N value heads, V
size of a value, F numbers of a token.
"""

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from sapo_megatron.errors import UserError
from sapo_megatron.policy import compat
from sapo_megatron.policy.delta_rule import causal_convolution, gated_delta_rule
from sapo_megatron.policy.layers import packed_layout


class _Mixer(nn.Module):
    """What a layer computes, on the parameters of whichever class has it."""

    config: TransformerConfig
    layer_number: int
    cp_group: dist.ProcessGroup
    sections: Sequence[int]
    """Rows of ``in_proj`` here: query, key, value, gate of the output, beta, alpha."""
    in_proj: nn.Module
    conv1d: nn.Conv1d
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    out_norm: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states [S, B, H]``, packed ``[T, 1, H]`` -> the same shape, and no bias.

        ``attention_mask`` is not read: causality keeps every position from the padding behind it.
        With a context, what follows what it has seen; the window of the convolution and the state
        are kept there in the place of keys and values.
        """
        q, k, v, gate, beta, alpha = self.in_proj(hidden_states)[0].split(self.sections, dim=-1)
        mixed = [q, k, v, beta, alpha]
        if packed_seq_params is not None:
            out = self._packed(mixed, packed_seq_params)
        else:
            assert self.cp_group.size() == 1, "context parallelism runs on packed sequences"
            kept = {} if inference_context is None else inference_context.key_value_memory_dict
            window, state = kept.get(self.layer_number, (None, None))
            x = torch.cat(mixed, dim=-1).transpose(0, 1)
            out, window, state = self._mix(x, window, state)
            kept[self.layer_number] = window, state
            out = out.transpose(0, 1)
        normed = self.out_norm(out.unflatten(-1, (-1, self.config.linear_value_head_dim)))
        gated = normed.flatten(-2) * F.silu(_wide(gate))
        return self.out_proj(gated.to(hidden_states.dtype))

    def _packed(self, mixed: list[Tensor], params: PackedSeqParams) -> Tensor:
        """``[T, 1, F]`` of query, key, value, beta and alpha -> ``[T, 1, N V]``."""
        ranks = self.cp_group.size()
        layout = packed_layout(params, self.cp_group, mixed[0].device)
        # Of every part each rank gets its heads, one part behind the other.
        parts = [x.squeeze(1).unflatten(-1, (ranks, -1)) for x in mixed]
        x = _exchange(torch.cat(parts, dim=-1).transpose(0, 1), self.cp_group).flatten(0, 1)
        out = self._mix(x[layout.key_rows])[0][layout.key_valid]
        rows = layout.key_rows[layout.key_valid]
        out = torch.empty_like(out).index_copy(0, rows, out).unflatten(0, (ranks, -1))
        return _exchange(out, self.cp_group).transpose(0, 1).flatten(1).unsqueeze(1)

    def _mix(
        self, x: Tensor, window: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, S, F]`` of this context-parallel rank's heads -> ``[B, S, N V]``.

        Also what the convolution and the rule need of it to go on; ``window`` and ``state`` are
        what they need of what came before.
        """
        config, ranks, rank = self.config, self.cp_group.size(), self.cp_group.rank()
        keys, _, values, _, heads, _ = (n // ranks for n in self.sections)
        x, beta, alpha = x.split((2 * keys + values, heads, heads), dim=-1)
        channels = self.conv1d.weight.split(self.sections[:3])
        weight = torch.cat([part.chunk(ranks)[rank] for part in channels])
        a_log, dt_bias = (part.chunk(ranks)[rank] for part in (self.A_log, self.dt_bias))
        mixed = causal_convolution(x, weight, window)
        q, k, v = mixed.split((keys, keys, values), dim=-1)
        q, k = (
            part.unflatten(-1, (-1, config.linear_key_head_dim)).repeat_interleave(
                config.linear_num_value_heads // config.linear_num_key_heads, dim=2
            )
            for part in (q, k)
        )
        out, state = gated_delta_rule(
            q,
            k,
            v.unflatten(-1, (heads, -1)),
            decay=-_wide(a_log).exp() * F.softplus(_wide(alpha) + dt_bias),
            beta=beta.sigmoid(),
            state=state,
        )
        seen = x if window is None else torch.cat((window, x), dim=1)
        width = config.linear_conv_kernel_dim - 1
        # Of a sequence that is shorter than the window, zeros before it.
        window = F.pad(seen, (0, 0, max(width - seen.shape[1], 0), 0))[:, -width:]
        return out.flatten(2), window, state


class TorchGatedDeltaNet(_Mixer, MegatronModule):
    """The mixer of one layer: packed or padded, in any layout, and token by token."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        ranks = self.tp_group.size()
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        heads = config.linear_num_value_heads
        self.sections = tuple(n // ranks for n in (keys, keys, values, values, heads, heads))
        settings = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            2 * (keys + values + heads),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **settings,
        )
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        mixed, width = (2 * keys + values) // ranks, config.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(mixed, mixed, width, groups=mixed, bias=False, **place)
        self.dt_bias = nn.Parameter(torch.ones(heads // ranks, **place))
        self.A_log = nn.Parameter(torch.zeros(heads // ranks, **place))
        self.out_norm = build_module(
            submodules.out_norm,
            config=config,
            hidden_size=config.linear_value_head_dim,
            eps=config.layernorm_epsilon,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            values,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **settings,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """What upstream's default does not know: the weights of heads are cut along them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        cut = {
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "conv1d.weight": self.conv1d.weight,
        }
        sharded = make_sharded_tensors_for_checkpoint(
            cut,
            prefix,
            dict.fromkeys(cut, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in ("in_proj", "out_norm", "out_proj"):
            sharded |= sharded_state_dict_default(
                getattr(self, name),
                f"{prefix}{name}.",
                sharded_offsets,
                metadata,
                tp_group=self.tp_group,
            )
        return sharded


class KernelGatedDeltaNet(_Mixer, GatedDeltaNet):
    """megatron-core's module, on the kernels of flash-linear-attention; in torch token by token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        GatedDeltaNet.__init__(self, *args, **kwargs)
        upstream: Any = self
        self.sections = upstream.in_proj_split_sections
        self.cp_group = upstream.pg_collection.cp

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As :class:`TorchGatedDeltaNet`."""
        mixer = GatedDeltaNet if inference_context is None else _Mixer
        return mixer.forward(
            self, hidden_states, attention_mask, inference_context, packed_seq_params, **rest
        )


def delta_net(*, kernels: bool) -> type[MegatronModule]:
    """The class of the layers. Raises UserError where there are no ``kernels`` to run them on."""
    if not kernels:
        return TorchGatedDeltaNet
    if not hasattr(GatedDeltaNet, "_resolve_cu_seqlens"):
        raise UserError(
            f"model.layers: expected torch for Gated DeltaNet, of which megatron-core "
            f"{compat.release()} packs no sequences, got transformer_engine; install 0.19"
        )
    if find_spec("fla") is None:
        raise UserError(
            "model.layers: expected torch for Gated DeltaNet without flash-linear-attention, got "
            "transformer_engine; pip install flash-linear-attention"
        )
    return KernelGatedDeltaNet


class PlainNorm:
    """Makes a norm whose weight multiplies, also where those of the model are zero-centred."""

    def __new__(cls, norm: type, config: TransformerConfig, **sizes: Any) -> Any:
        plain = copy.copy(config)
        plain.layernorm_zero_centered_gamma = False
        return norm(config=plain, **sizes)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        # Over context parallelism: each of its ranks runs this layer on its piece of the batch.
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x [ranks, ...]``, a piece for each rank -> this rank's piece from each; differentiable."""
    return x if group.size() == 1 else _Exchange.apply(x, group)
