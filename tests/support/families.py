"""Tiny models of every family as transformers makes them, and what a rank makes of them."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.policy import parallel
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    RolloutConfig,
    SourceConfig,
    TrainConfig,
)
from sapo_megatron.sample import Sample
from sapo_megatron.training.coldstart import supervised_loss
from tests.support.exactness import (
    grad_norms,
    gradients_as_weights,
    left_by_transformer_engine,
)
from tests.support.gloo import TIMEOUT_S

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
_DEEPSEEK = _COMMON | {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "topk_group": 1,
    "v_head_dim": 6,
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
    "deepseek-v3": _DEEPSEEK
    | {
        "q_lora_rank": 16,
        "n_group": 4,
        "n_routed_experts": 16,
        "topk_group": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
        },
    },
    "glm-4.5": _COMMON
    | {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    },
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A family under a layout."""

    family: str
    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    dtype: str = "float32"
    packing: bool = True

    @property
    def name(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "CP": self.cp, "EP": self.ep}
        words = "x".join(f"{key}{n}" for key, n in sizes.items() if n and n > 1) or "one rank"
        extra = "" if self.packing else "-padded"
        return f"{self.family}-{words}{extra}-{self.dtype}"

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            name="families",
            model=ModelConfig(path="unread", params_dtype=self.dtype),
            data=DataConfig(train=SourceConfig()),
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.vpp,
                context_parallel_size=self.cp,
                expert_model_parallel_size=self.ep,
                distributed_timeout_s=TIMEOUT_S,
            ),
            rollout=RolloutConfig(max_response_length=12),
            train=TrainConfig(max_tokens_per_gpu=48 // self.cp, packing=self.packing),
        )


def make_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A model of the family that transformers makes and saves, in several files.

    Its weights are larger than at initialisation, so that attention and routing are far from
    uniform; biases and norms are random as well.
    """
    config = transformers.AutoConfig.for_model(**FAMILIES[family] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise(weight))
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise(weight))
            else:
                gain = 2.0 if name.endswith("mlp.gate.weight") else 0.7
                weight.copy_(gain * noise(weight) / weight.shape[1] ** 0.5)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Above 0: below it transformers may choose from a group that is ruled out.
                bias.copy_(0.1 * noise(bias).abs())
    model.to(dtype).save_pretrained(folder, max_shard_size="50KB")
    return model


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


def measure(place: Place, model: Path, out: Path) -> dict[str, Any] | None:
    """Logits of a sample and the norms of the gradient, on leaders; writes two folders."""
    recipe = place.recipe
    groups = parallel.setup(recipe.parallel, seed=1)
    arch = read_architecture(model)
    policy = Policy(recipe, arch, groups, model, optimizer=recipe.optimizer, total_updates=1)
    policy.model.weights.save(out / "weights")
    logits = _logits(policy, sequences()[1])
    samples = sequences()
    sizes = denominators(samples)
    policy.backward(
        micro_batches(samples, groups.micro_batching(recipe)),
        lambda batch, logprob, entropy: supervised_loss(
            batch, logprob, entropy, denominators=sizes
        ),
    )
    with left_by_transformer_engine():
        other = Policy(recipe, arch, groups, model, optimizer=recipe.optimizer, total_updates=1)
    norms = grad_norms(policy, other)
    other.close()
    gradients_as_weights(policy)
    policy.model.weights.save(out / "gradients")
    policy.close()
    parallel.teardown()
    return {"logits": logits, "grad_norms": norms} if groups.is_leader else None


def _logits(policy: Policy, sample: Sample) -> Any:
    """``[S, V]`` of a sequence: a prompt, then token by token through the KV cache."""
    tokens = torch.tensor([[*sample.prompt_tokens, *sample.response_tokens]])
    decoder = MegatronDecoder(policy.model)
    start, length = len(sample.prompt_tokens), tokens.shape[1]
    with torch.no_grad(), decoder.generating():
        decoder.start(1, length)
        found = [decoder.logits(tokens[:, :start])]
        found += [decoder.logits(tokens[:, i : i + 1]) for i in range(start, length)]
    return None if found[0] is None else torch.cat(found).float().numpy()
