"""Which ``model_type`` is one of ours: text models inside others, and what is said of the rest."""

import re
from typing import Any

from sapo_megatron.errors import UserError, nearest

CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
"""Our families, and the class of each in transformers."""
_TEXT = {"glm4v_moe_text": "glm4_moe", "qwen3_vl_text": "qwen3"}
"""Text models of other names that compute, on text, what one of ours does."""
_OTHERS = {
    "bailing_moe_v2": ("its attention has one weight for query, key and value", "glm4_moe"),
    "deepseek": ("its router is a softmax over other experts", "deepseek_v3"),
    "deepseek_v2": ("its router is a softmax, over groups", "deepseek_v3"),
    "deepseek_v32": ("its attention is sparse", "deepseek_v3"),
    "deepseek_v4": ("its attention is compressed", "deepseek_v3"),
    "glm4": ("it has norms behind attention and MLP", "glm4_moe"),
    "glm_moe_dsa": ("its attention is sparse", "glm4_moe_lite"),
    "gpt_oss": ("its attention has sinks and windows", "qwen3_moe"),
    "kimi_linear": ("its attention is linear in most layers", "kimi_k2"),
    "llama": ("it has no norms of query and key", "qwen3"),
    "minimax": ("its attention is linear in most layers", "minimax_m2"),
    "mixtral": ("it has no norms of query and key", "qwen3_moe"),
    "nemotron_h": ("most of its layers are state-space models", "qwen3_moe"),
    "qwen2": ("it has biases and no norms of query and key", "qwen3"),
    "qwen2_moe": ("its shared expert has a gate", "qwen3_moe"),
    "qwen3_5_moe": ("it has no text_config", "qwen3_5_moe_text"),
    "qwen3_5_text": ("none of its layers has experts", "qwen3_5_moe_text"),
    "qwen3_vl_moe_text": ("all experts of a layer are one tensor on disk", "qwen3_moe"),
}
"""``model_type`` of models that people train -> why not, and the nearest family."""


def text_model(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model, where ``config`` is of one that also sees or hears.

    Under the name of ours that computes the same; of what stands outside, what text needs.
    """
    inside = config.get("text_config")
    if not isinstance(inside, dict):
        return config
    text = dict(inside)
    for key in ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config"):
        if config.get(key) is not None:
            text[key] = config[key]
    ends = [config.get("eos_token_id"), inside.get("eos_token_id")]  # all of which end a response
    text["eos_token_id"] = [
        token
        for end in ends
        if end is not None
        for token in (end if isinstance(end, list) else [end])
    ]
    kind = text.get("model_type")
    text["model_type"] = kind = _TEXT.get(kind, kind) if isinstance(kind, str) else kind
    if isinstance(kind, str) and kind in CLASSES:
        text["architectures"] = [CLASSES[kind]]
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict):  # positions in an image; those of text are all one
            text[key] = {k: x for k, x in text[key].items() if not k.startswith("mrope_")}
    return text


def text_name(name: str) -> str:
    """What a tensor of such a model is called in its text model alone."""
    return re.sub(r"^(model\.)?language_model\.", lambda match: match[1] or "", name)


def not_ours(kind: Any, path: Any) -> UserError:
    """What to say of a model of another family; ``path`` is the file that names it."""
    named = kind if isinstance(kind, str) else ""
    why, family = _OTHERS.get(named, ("", nearest(named, CLASSES)))
    reason = f" ({why})" if why else ""
    closest = f", the nearest of which is {family}" if family else ""
    return UserError(
        f"{path}: model_type: expected {' or '.join(CLASSES)}, got {kind!r}{reason}; use a model "
        f"of such a family{closest}"
    )
