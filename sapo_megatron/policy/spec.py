"""What megatron-core builds of an architecture: its TransformerConfig and its layer specs.

Transformer Engine's layers, or torch layers of the same names, as ``model.layers`` says.
"""

import functools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from sapo_megatron.errors import UserError, one_line
from sapo_megatron.hf.architecture import (
    Architecture,
    Experts,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    Rope,
)
from sapo_megatron.policy import compat
from sapo_megatron.policy.compat import LatentSelfAttention
from sapo_megatron.policy.delta_net import PlainNorm, delta_net
from sapo_megatron.policy.gated_attention import GatedSelfAttention
from sapo_megatron.policy.joint_norm import JointNormSelfAttention
from sapo_megatron.policy.layers import DuplicatedLinear, TorchSpecProvider
from sapo_megatron.policy.machine import with_transformer_engine
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.recipe.schema import ModelConfig, ParallelConfig

FUSED_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""Apex's module that adds weight gradients to DDP's buffer inside the matrix product."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def transformer_config(
    arch: Architecture, model: ModelConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """megatron-core's configuration of ``arch``. Raises UserError for what it refuses."""
    dtype = DTYPES[model.params_dtype]
    settings = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "layernorm_zero_centered_gamma": arch.zero_centered_norm,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        **_execution(arch, model, parallel),
    }
    if arch.experts:
        settings |= _expert_settings(arch, arch.experts, model)
    if arch.delta_net:
        settings |= _delta_net_settings(arch.delta_net)
    kind: type[TransformerConfig] = TransformerConfig
    if isinstance(arch.attention, LatentAttention):
        kind = MLATransformerConfig
        settings |= _latent_settings(arch.attention, arch.rope)
    else:
        settings |= _grouped_query_settings(arch.attention)
    try:
        return kind(**settings)
    except (AssertionError, ValueError) as error:
        message = one_line(error)
        raise UserError(f"model and parallel: megatron-core refuses them: {message}") from None


def _execution(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """How the model is cut and run."""
    on_gpu, with_te = torch.cuda.is_available(), with_transformer_engine(model)
    tp = parallel.tensor_model_parallel_size
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "recompute_granularity": parallel.recompute_granularity,
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
        "variable_seq_lengths": True,
        # Also where there are no experts: the default does not go with variable lengths.
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "attention_backend": AttnBackend[model.attention_backend],
        "deallocate_pipeline_outputs": True,
        # Interleaved stages send both ways at once; batched, two ranks would mistake one transfer
        # for the other.
        "overlap_p2p_comm": parallel.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": False,
        "use_cpu_initialization": not on_gpu,
        # The output layer is megatron-core's own, and refuses without this module of Apex's.
        "gradient_accumulation_fusion": on_gpu and find_spec(FUSED_GRADIENTS) is not None,
        "masked_softmax_fusion": on_gpu,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        # Of latent attention upstream fuses yarn only, and not in inference.
        "apply_rope_fusion": with_te and isinstance(arch.attention, GroupedQueryAttention),
    }
    if parallel.recompute_modules is not None:
        settings["recompute_modules"] = list(parallel.recompute_modules)
    return settings


def _grouped_query_settings(attention: GroupedQueryAttention) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_query_groups": attention.num_kv_heads,
        "kv_channels": attention.head_dim,
        "qk_layernorm": attention.qk_norm and not attention.joint_norm,  # which is not upstream's
        "add_qkv_bias": attention.qkv_bias,
        "attention_output_gate": attention.output_gate,
    }


def _delta_net_settings(kind: GatedDeltaNet) -> dict[str, Any]:
    return {
        "linear_conv_kernel_dim": kind.conv_size,
        "linear_key_head_dim": kind.key_head_dim,
        "linear_value_head_dim": kind.value_head_dim,
        "linear_num_key_heads": kind.num_key_heads,
        "linear_num_value_heads": kind.num_value_heads,
    }


def _latent_settings(attention: LatentAttention, rope: Rope) -> dict[str, Any]:
    yarn = rope.yarn
    settings = {
        "num_attention_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_head_dim": attention.qk_nope_head_dim,
        "qk_pos_emb_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "qk_layernorm": True,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rope.theta,
        # Also without yarn: the scale of the scores is computed from it.
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
    }
    if yarn:
        settings |= {
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return settings


def _expert_settings(arch: Architecture, experts: Experts, model: ModelConfig) -> dict[str, Any]:
    settings = {
        "num_moe_experts": experts.number,
        "moe_ffn_hidden_size": experts.hidden_size,
        "moe_layer_freq": [int(i in experts.layers) for i in range(arch.num_layers)],
        "moe_router_topk": experts.topk,
        "moe_router_score_function": experts.score_function,
        "moe_router_pre_softmax": experts.score_function == "softmax" and not experts.normalised,
        "moe_router_topk_scaling_factor": experts.scaling_factor,
        "moe_router_enable_expert_bias": experts.bias,
        "moe_router_bias_update_rate": 0.0,  # a checkpoint's bias stays as it is
        "moe_shared_expert_intermediate_size": experts.shared_hidden_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_router_dtype": "fp64" if model.params_dtype == "float64" else model.moe_router_dtype,
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": with_transformer_engine(model),
    }
    if experts.groups > 1:
        settings["moe_router_num_groups"] = experts.groups
        settings["moe_router_group_topk"] = experts.group_topk
    return settings


def moe_layers(config: TransformerConfig) -> list[int]:
    """Numbers, from 0, of the layers that have experts."""
    return [layer for layer, freq in enumerate(_layer_freq(config)) if freq]


def block_spec(
    arch: Architecture,
    config: TransformerConfig,
    groups: ParallelGroups,
    vp_stage: int | None,
    model: ModelConfig,
) -> TransformerBlockSubmodules:
    """The specs of the layers that this virtual stage holds."""
    backend = _backend(model)
    linear = arch.delta_net.layers if arch.delta_net else ()

    @functools.cache  # layers of one kind share a spec
    def layer(is_linear: bool, num_experts: int | None) -> ModuleSpec:
        return _layer_spec(arch.attention, config, backend, num_experts, linear=is_linear)

    experts = config.num_moe_experts
    layers = [
        layer(number in linear, experts if freq else None)
        for number, freq in enumerate(_layer_freq(config))
    ]
    stage = {"vp_stage": vp_stage, "pp_rank": groups.pp.rank()}
    first = get_transformer_layer_offset(config, **stage)
    count = get_num_layers_to_build(config, **stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + count], layer_norm=backend.layer_norm(rms_norm=True)
    )


def _backend(model: ModelConfig) -> BackendSpecProvider:
    if not with_transformer_engine(model):
        compat.allow_torch_layers(DuplicatedLinear)
        return TorchSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _layer_freq(config: TransformerConfig) -> list[int]:
    if config.num_moe_experts is None:
        return [0] * config.num_layers
    return config.moe_layer_freq


def _layer_spec(
    kind: GroupedQueryAttention | LatentAttention,
    config: TransformerConfig,
    backend: BackendSpecProvider,
    num_experts: int | None,
    *,
    linear: bool,
) -> ModuleSpec:
    if latent := isinstance(kind, LatentAttention):
        attention = _latent_attention(backend)
    elif linear:
        attention = _delta_net(backend, kernels=not isinstance(backend, TorchSpecProvider))
    else:
        attention = _grouped_query_attention(kind, config, backend)
    norm = backend.layer_norm(rms_norm=True)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            # Of grouped-query attention, and of an MLP, the first linear layer owns the norm.
            input_layernorm=norm if latent else IdentityOp,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm if num_experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(
                backend, num_experts=num_experts, moe_grouped_gemm=True
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _grouped_query_attention(
    kind: GroupedQueryAttention, config: TransformerConfig, backend: BackendSpecProvider
) -> ModuleSpec:
    qk_norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    module = GatedSelfAttention if kind.output_gate else SelfAttention
    if kind.joint_norm:
        module = JointNormSelfAttention
    return ModuleSpec(
        module=module,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _delta_net(backend: BackendSpecProvider, *, kernels: bool) -> ModuleSpec:
    return ModuleSpec(
        module=delta_net(kernels=kernels),
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.column_parallel_layer_norm_linear(),
            out_norm=ModuleSpec(PlainNorm, {"norm": backend.layer_norm(rms_norm=True)}),
            out_proj=backend.row_parallel_linear(),
        ),
    )


def _latent_attention(backend: BackendSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            linear_q_down_proj=backend.linear(),
            linear_q_up_proj=backend.column_parallel_layer_norm_linear(),
            linear_kv_down_proj=backend.linear(),
            linear_kv_up_proj=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )
