"""Tiny models of every family as transformers makes them, and sequences for them.

Written from a seed: two machines that are compared write the same.
"""

import random
from pathlib import Path
from typing import Any

import torch
import transformers

from sapo_megatron.sample import Sample

VOCABULARY = 101  # divides by no tensor-parallel size
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
_QWEN3 = _COMMON | {
    "model_type": "qwen3",
    "head_dim": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_GROUPED = _COMMON | {  # routers that choose groups of experts, then experts
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "n_routed_experts": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "topk_group": 1,
}
_DEEPSEEK = _GROUPED | {
    "model_type": "deepseek_v3",
    "kv_lora_rank": 12,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "v_head_dim": 6,
}
_LOW_RANK_QUERIES = _DEEPSEEK | {"q_lora_rank": 16, "n_shared_experts": 1}
_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
_HYBRID = _QWEN3 | {  # three layers of Gated DeltaNet, one of attention
    "full_attention_interval": 4,
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 6,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 10,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-2,  # what the rule reads of a single token may be next to nothing
    "shared_expert_intermediate_size": 24,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": _QWEN3 | {"tie_word_embeddings": True},
    "qwen3-moe": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,  # fewer than tensor-parallel ranks in one layout
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "moonlight": _DEEPSEEK,
    "deepseek-v3": _LOW_RANK_QUERIES
    | {
        "n_group": 4,
        "n_routed_experts": 16,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "rope_scaling": _YARN,
    },
    "kimi-k2": _LOW_RANK_QUERIES
    | {"rope_scaling": _YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale_all_dim": 1.0}},
    "glm-4.5": _GROUPED
    | {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "head_dim": 8,
        "n_shared_experts": 1,
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
    "glm-4.7-flash": _LOW_RANK_QUERIES
    | {
        "model_type": "glm4_moe_lite",
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "v_head_dim": 12,  # as wide as query and key
    },
    "minimax-m2": _COMMON
    | {
        "model_type": "minimax_m2",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "rotary_dim": 4,
    },
    "qwen3-next": _HYBRID
    | {"model_type": "qwen3_next", "decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3.5-moe": {k: v for k, v in _HYBRID.items() if k != "intermediate_size"}
    | {"model_type": "qwen3_5_moe_text"},
}


def make_model(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    shard: str = "50KB",
    **changes: Any,
) -> Any:
    """A model of the family that transformers makes and saves, in files of ``shard``."""
    config = transformers.AutoConfig.for_model(**FAMILIES[family] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    fill(model)
    # transformers 5 has the first rank of a world save alone; these folders are each rank's own.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def fill(model: Any) -> None:
    """Draw the weights of a model of transformers.

    They are larger than at initialisation, so that attention and routing are far from uniform;
    biases and norms are random as well.
    """
    generator = torch.Generator().manual_seed(3)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        hybrid = any("linear_attn" in name for name, _ in model.named_parameters())
        for name, weight in model.named_parameters():
            if "norm" in name:
                zero_centered = hybrid and "linear_attn" not in name
                weight.copy_((not zero_centered) + 0.3 * noise(weight))
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise(weight))
            else:
                gain = 2.0 if name.endswith("mlp.gate.weight") else 0.7
                weight.copy_(gain * noise(weight) / weight.shape[1] ** 0.5)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Above 0: below it transformers may choose from a group that is ruled out.
                bias.copy_(0.1 * noise(bias).abs())


def sequences() -> list[Sample]:
    """Prompts and responses of several lengths."""
    rng = random.Random(5)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    return [
        Sample(
            uid=i,
            prompt_tokens=tuple(tokens(prompt)),
            response_tokens=tokens(response),
            rollout_logprobs=[0.0] * response,
            truncated=False,
        )
        for i, (prompt, response) in enumerate([(5, 9), (3, 12), (7, 2), (4, 7)])
    ]
