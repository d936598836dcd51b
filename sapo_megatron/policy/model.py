"""The policy: a megatron-core GPTModel made from a Hugging Face style ``config.json``.

Transformer Engine's layers where there is CUDA, torch layers of the same names elsewhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from sapo_megatron.config import ModelConfig, ParallelConfig, Recipe, UserError
from sapo_megatron.objective.logprob import linear_logprobs, vocab_parallel_logprobs
from sapo_megatron.policy.layers import TorchSpecProvider
from sapo_megatron.policy.parallel import ParallelGroups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def transformer_config(
    arch: dict[str, Any], model: ModelConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """megatron-core's configuration of a Qwen3 or Qwen3-MoE ``config.json``.

    Raises UserError for another architecture and for what megatron-core refuses.
    """
    kind = arch.get("model_type")
    if kind not in ("qwen3", "qwen3_moe"):
        raise UserError(f"model.path: expected model_type qwen3 or qwen3_moe, got {kind}")
    dtype = DTYPES[model.params_dtype]
    on_gpu = torch.cuda.is_available()
    if on_gpu and dtype == torch.float64:
        raise UserError(
            "model.params_dtype: expected float32 or bfloat16 on a GPU, got float64, which "
            "Transformer Engine does not compute in; change it"
        )
    tp = parallel.tensor_model_parallel_size
    settings: dict[str, Any] = {
        "num_layers": arch["num_hidden_layers"],
        "hidden_size": arch["hidden_size"],
        "num_attention_heads": arch["num_attention_heads"],
        "num_query_groups": arch["num_key_value_heads"],
        "kv_channels": arch["head_dim"],
        "ffn_hidden_size": arch["intermediate_size"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch["rms_norm_eps"],
        "qk_layernorm": True,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch["attention_bias"],
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
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
        "moe_token_dispatcher_type": "alltoall",
        "deallocate_pipeline_outputs": True,
        # Interleaved stages send both ways at once; batched, two ranks would mistake one transfer
        # for the other.
        "overlap_p2p_comm": parallel.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": False,
        "use_cpu_initialization": not on_gpu,
        "gradient_accumulation_fusion": on_gpu,
        "masked_softmax_fusion": on_gpu,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": on_gpu,
    }
    if parallel.recompute_modules is not None:
        settings["recompute_modules"] = list(parallel.recompute_modules)
    if kind == "qwen3_moe":
        settings |= {
            "num_moe_experts": arch["num_experts"],
            "moe_ffn_hidden_size": arch["moe_intermediate_size"],
            "moe_layer_freq": _moe_layers(arch),
            "moe_router_topk": arch["num_experts_per_tok"],
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not arch["norm_topk_prob"],
            "moe_router_dtype": "fp64" if dtype == torch.float64 else model.moe_router_dtype,
            "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff else "none",
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
            "moe_grouped_gemm": True,
            "moe_permute_fusion": on_gpu,
        }
    try:
        return TransformerConfig(**settings)
    except (AssertionError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"model and parallel: megatron-core refuses them: {message}") from None


class PolicyModel(GPTModel):
    """A GPTModel that answers ``labels`` with log-probs and entropy instead of a loss."""

    def __init__(self, *, recipe: Recipe, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fused = recipe.train.logprob == "fused"
        self.chunk_size = recipe.train.logprob_chunk_size
        self.temperature = recipe.rollout.temperature
        self.entropy_has_gradient = recipe.algorithm.entropy_coef > 0
        self.true_vocab_size = true_vocab_size
        if self.config.params_dtype == torch.float64:
            # Upstream computes the rotary frequencies in fp32, whatever the model's dtype.
            dim = self.config.kv_channels
            exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            self.rotary_pos_emb.inv_freq = 1.0 / self.rotary_base**exponents
        for name, weight in self.named_parameters():
            # Experts are reduced over their own data-parallel group in every layout. Upstream
            # marks them only where ep > 1, which leaves tp > 1 with ep = 1 without a reduction
            # over the ranks that the tokens are split over.
            if ".mlp.experts." in name:
                weight.allreduce = False

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """With ``labels [B, S]`` on the last stage: log-probs and entropy, ``[2, B, S]``."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, **kwargs)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        options = {
            "temperature": self.temperature,
            "with_entropy": True,
            "chunk_size": self.chunk_size,
            "vocab_size": self.true_vocab_size,
        }
        # [B, S] -> [S, B], the order of the hidden states.
        targets = labels.transpose(0, 1).contiguous()
        if self.fused:
            logprob, entropy = linear_logprobs(
                hidden_states.flatten(0, 1),
                weight,
                targets.flatten(),
                self.pg_collection.tp,
                sequence_parallel=self.config.sequence_parallel,
                **options,
            )
            logprob, entropy = logprob.view_as(targets), entropy.view_as(targets)
        else:
            logits, _ = self.output_layer(hidden_states, weight=weight)
            logprob, entropy = vocab_parallel_logprobs(
                logits, targets, self.pg_collection.tp, **options
            )
        if not self.entropy_has_gradient:
            entropy = entropy.detach()
        return torch.stack((logprob, entropy)).transpose(1, 2)


def build_model(
    arch: dict[str, Any], config: TransformerConfig, groups: ParallelGroups, recipe: Recipe
) -> list[PolicyModel]:
    """This rank's chunks of the model, one per virtual stage; weights are not initialised."""
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for chunk in range(stages or 1):
        vp_stage = None if stages is None else chunk
        first, last = chunk == 0, chunk == (stages or 1) - 1
        model = PolicyModel(
            config=config,
            transformer_layer_spec=_block_spec(config, groups, vp_stage),
            vocab_size=padded_vocab_size(arch, config),
            max_sequence_length=arch["max_position_embeddings"],
            pre_process=groups.is_first_stage and first,
            post_process=groups.is_last_stage and last,
            share_embeddings_and_output_weights=arch["tie_word_embeddings"],
            position_embedding_type="rope",
            rotary_base=arch["rope_theta"],
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
            recipe=recipe,
            true_vocab_size=arch["vocab_size"],
        )
        chunks.append(model.to(groups.device))
    return chunks


def padded_vocab_size(arch: dict[str, Any], config: TransformerConfig) -> int:
    """The vocabulary rounded up so that it divides by the tensor-parallel size."""
    tp = config.tensor_model_parallel_size
    return -(-arch["vocab_size"] // tp) * tp


def _moe_layers(arch: dict[str, Any]) -> list[int]:
    """1 where a layer has experts, 0 where it is dense."""
    dense, step = arch["mlp_only_layers"], arch["decoder_sparse_step"]
    return [
        int(layer not in dense and (layer + 1) % step == 0)
        for layer in range(arch["num_hidden_layers"])
    ]


def moe_layers(config: TransformerConfig) -> list[int]:
    """Numbers, from 0, of the layers that have experts."""
    return [layer for layer, freq in enumerate(_layer_freq(config)) if freq]


def _backend() -> BackendSpecProvider:
    if not torch.cuda.is_available():
        return TorchSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _block_spec(
    config: TransformerConfig, groups: ParallelGroups, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The specs of the layers that this virtual stage holds."""
    backend = _backend()
    dense = _layer_spec(config, backend, num_experts=None)
    moe = _layer_spec(config, backend, config.num_moe_experts) if config.num_moe_experts else dense
    layers = [moe if freq else dense for freq in _layer_freq(config)]
    stage = {"vp_stage": vp_stage, "pp_rank": groups.pp.rank()}
    first = get_transformer_layer_offset(config, **stage)
    count = get_num_layers_to_build(config, **stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + count], layer_norm=backend.layer_norm(rms_norm=True)
    )


def _layer_freq(config: TransformerConfig) -> list[int]:
    if config.num_moe_experts is None:
        return [0] * config.num_layers
    return config.moe_layer_freq


def _layer_spec(
    config: TransformerConfig, backend: BackendSpecProvider, num_experts: int | None
) -> ModuleSpec:
    qk_norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_layer_norm_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(rms_norm=True) if num_experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(
                backend, num_experts=num_experts, moe_grouped_gemm=True
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
