"""Models, mini-batches and objectives of the exactness tests, for the package and the reference."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sapo_megatron.recipe.schema import AlgorithmConfig
from sapo_megatron.sample import Sample, SampleRoutes
from tests.support import reference
from tests.support.layouts import Layout

_BASE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 61,
}
MODELS: dict[str, dict[str, Any]] = {
    "moe": _BASE,
    "tied": _BASE | {"tie_word_embeddings": True},
    "mixed": _BASE | {"mlp_only_layers": [0, 2]},
    "unnormed": _BASE | {"norm_topk_prob": False},
    "dense": {
        k: v
        for k, v in (_BASE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}).items()
        if not any(word in k for word in ("moe", "expert", "sparse", "only", "topk"))
    },
    "hybrid": {k: v for k, v in _BASE.items() if k != "intermediate_size"}
    | {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 2],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 6,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 10,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-2,  # what is read of a state may be next to nothing
        "shared_expert_intermediate_size": 24,
    },
}
"""The vocabulary of 61 divides by no tensor-parallel size."""


OBJECTIVES: dict[str, tuple[AlgorithmConfig, reference.Objective]] = {
    "sapo": (AlgorithmConfig(), reference.Objective()),
    "token-mean": (
        AlgorithmConfig(loss_agg_mode="token-mean"),
        reference.Objective(aggregation="tokens"),
    ),
    "gspo": (
        AlgorithmConfig(loss_type="gspo", clip_ratio_low=0.5, clip_ratio_high=1.0),
        reference.Objective(loss="gspo", clip=(0.5, 1.0)),
    ),
    "warm": (
        AlgorithmConfig(tau_pos=2.0, tau_neg=3.0, entropy_coef=0.05),
        reference.Objective(tau_pos=2.0, tau_neg=3.0, entropy_coef=0.05, temperature=0.7),
    ),
    "balanced": (AlgorithmConfig(), reference.Objective(aux_loss_coeff=0.5)),
}
"""By name: the package's settings and the reference's for the same thing."""


def random_weights(arch: dict[str, Any], folder: Path, seed: int = 2) -> None:
    """A Hugging Face folder of random weights, larger than at initialisation.

    Attention and routing are then far from uniform, and no gradient is close to zero. Layers add
    half of what they could to the residual stream, which keeps fp32's rounding errors small. With
    some seeds the gradient of one expert all but cancels, and one rank in fp32 has a relative error
    of 2e-5 there; with this one it stays below 4e-6.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, size = arch["hidden_size"], arch["head_dim"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)

    kinds = arch.get("layer_types", ["full_attention"] * arch["num_hidden_layers"])
    hybrid = "linear_attention" in kinds

    def norm(width: int, around: float = 0.0 if hybrid else 1.0) -> torch.Tensor:
        return around + 0.3 * torch.randn(width, generator=generator)

    def mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}gate_proj.weight": matrix(width, hidden),
            f"{prefix}up_proj.weight": matrix(width, hidden),
            f"{prefix}down_proj.weight": matrix(hidden, width, gain=0.5),
        }

    heads, groups = arch["num_attention_heads"], arch["num_key_value_heads"]
    embedding = 0.5 * torch.randn(arch["vocab_size"], hidden, generator=generator)
    weights = {"model.embed_tokens.weight": embedding}
    for i in range(arch["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = norm(hidden)
        if kinds[i] == "linear_attention":
            keys = arch["linear_num_key_heads"] * arch["linear_key_head_dim"]
            many, wide = arch["linear_num_value_heads"], arch["linear_value_head_dim"]
            mixer = f"{layer}linear_attn."
            rows = {"qkv": 2 * keys + many * wide, "z": many * wide, "b": many, "a": many}
            weights |= {f"{mixer}in_proj_{n}.weight": matrix(rows[n], hidden) for n in rows}
            window = matrix(rows["qkv"], arch["linear_conv_kernel_dim"], gain=2.0)
            weights[f"{mixer}conv1d.weight"] = window[:, None]
            weights |= {f"{mixer}{n}": norm(many, around=0.0) for n in ("A_log", "dt_bias")}
            weights[f"{mixer}norm.weight"] = norm(wide, around=1.0)
            weights[f"{mixer}out_proj.weight"] = matrix(hidden, many * wide, gain=0.5)
        else:
            gated = 2 if hybrid else 1
            for name, count in (("q", gated * heads), ("k", groups), ("v", groups)):
                weights[f"{layer}self_attn.{name}_proj.weight"] = matrix(count * size, hidden)
            for name in "qk":
                weights[f"{layer}self_attn.{name}_norm.weight"] = norm(size)
            weights[f"{layer}self_attn.o_proj.weight"] = matrix(hidden, heads * size, gain=0.5)
        if "num_experts" not in arch or i in arch["mlp_only_layers"]:
            weights |= mlp(f"{layer}mlp.", arch["intermediate_size"])
            continue
        if hybrid:
            weights |= mlp(f"{layer}mlp.shared_expert.", arch["shared_expert_intermediate_size"])
            weights[f"{layer}mlp.shared_expert_gate.weight"] = matrix(1, hidden)
        weights[f"{layer}mlp.gate.weight"] = matrix(arch["num_experts"], hidden, gain=2.0)
        for expert in range(arch["num_experts"]):
            weights |= mlp(f"{layer}mlp.experts.{expert}.", arch["moe_intermediate_size"])
    weights["model.norm.weight"] = norm(hidden)
    if arch["tie_word_embeddings"]:
        weights["model.norm.weight"] *= 2 / math.sqrt(hidden)  # the embedding is too large a head
    else:
        weights["lm_head.weight"] = matrix(arch["vocab_size"], hidden)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(arch))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sequences(kind: str) -> list[reference.Sequence]:
    """The mini-batch of a test. Numbers that fp32 holds exactly, so that every dtype sees the same.

    ``ragged``: three groups; the second has advantages of zero, one response of the third is empty.
    ``reversed``: the same in another order. ``few``: the first two, fewer than ranks. ``same``:
    eight copies of one sequence whose length divides by every layout's sizes, for losses that are
    defined on a micro-batch.
    """
    rng = random.Random(5)

    def sequence(prompt: int, response: int, advantage: float) -> reference.Sequence:
        return reference.Sequence(
            prompt=tuple(rng.randrange(61) for _ in range(prompt)),
            response=tuple(rng.randrange(61) for _ in range(response)),
            # Far from what the model gives (ratios of about 0.1 to 30): the gate acts.
            old_logprobs=tuple(round(rng.gauss(-4.5, 0.7) * 1024) / 1024 for _ in range(response)),
            advantage=advantage,
        )

    if kind == "same":
        return [sequence(6, 11, 0.75)] * 8
    groups = [
        [sequence(5, 9, 1.25), sequence(5, 3, -0.75), sequence(5, 12, -0.5)],
        [sequence(9, 4, 0.0), sequence(9, 1, 0.0)],
        [sequence(2, 7, 0.875), sequence(2, 0, -0.875)],
    ]
    ragged = [s for group in groups for s in group]
    return {"ragged": ragged, "reversed": ragged[::-1], "few": ragged[:2]}[kind]


def mini_batch(layout: Layout) -> list[reference.Sequence]:
    """The mini-batch of a layout, with routes at random where it replays them.

    The seed is one with which the reference itself, in fp32, stays within 3e-6 of fp64: an expert
    whose only token has a ratio of 90 has a gradient that fp32 cannot hold.
    """
    batch = sequences(layout.batch)
    if not layout.replay:
        return batch
    arch, rng = MODELS[layout.model], random.Random(14)
    layers = arch["num_hidden_layers"] - len(arch["mlp_only_layers"])

    def experts() -> tuple[int, ...]:
        return tuple(rng.sample(range(arch["num_experts"]), arch["num_experts_per_tok"]))

    return [
        replace(
            s,
            routes=tuple(
                tuple(experts() for _ in range(layers))
                for _ in range(len(s.prompt) + len(s.response) - 1)
            ),
        )
        for s in batch
    ]


def samples(layout: Layout) -> list[Sample]:
    """The same mini-batch as the package takes it; old log-probs stand in for the rollout's."""
    return [
        Sample(
            uid=i,
            prompt_tokens=s.prompt,
            response_tokens=list(s.response),
            rollout_logprobs=list(s.old_logprobs),
            truncated=False,
            advantage=s.advantage,
            routes=s.routes and SampleRoutes(experts=np.array(s.routes, dtype=np.int16)),
        )
        for i, s in enumerate(mini_batch(layout))
    ]


def make_reference(layout: Layout, folder: Path) -> reference.Outcome:
    """What a layout has to reproduce: fp64, on the weights of ``folder``."""
    weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    objective = OBJECTIVES[layout.objective][1]
    return reference.evaluate(
        weights, MODELS[layout.model], mini_batch(layout), objective, layout.replay_threshold
    )
