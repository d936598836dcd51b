"""The models of the study: small ones, trained on bytes of Python source and kept below ``runs/``.

    python -m benchmarks.studies.router_law.models [NAME ...]

Each is an ordinary Hugging Face folder, trained by the project's own policy on one process.
"""

import argparse
import functools
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from benchmarks.studies.router_law import CACHE
from benchmarks.studies.router_law.routers import ROUTERS
from benchmarks.studies.router_law.text import VOCABULARY, sequences, stdlib
from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.files import whole_folder
from sapo_megatron.hf.architecture import parse_architecture, read_architecture
from sapo_megatron.policy import parallel, routers, weights
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RoutingConfig,
    SourceConfig,
    TrainConfig,
)
from sapo_megatron.sample import Sample
from sapo_megatron.training.coldstart import supervised_loss

logger = logging.getLogger(__name__)

LENGTH = 128
TOKENS = 1024
"""Of a training step."""
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 192,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.06,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GLM4_MOE = COMMON | {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model, and how long it is trained."""

    config: dict[str, Any]
    steps: int = 80
    router: str = "told"
    """One of ``ROUTERS``."""
    weights: str | None = None
    """Another variant whose weights it has."""
    start: str | None = None
    """Another variant from whose weights its training starts."""
    length: int = LENGTH
    """Tokens of a sequence, in training and measurement."""
    bf16_weights: bool = False
    """Whether weights are measured as bf16 holds them, and their moves with them."""


MODELS = {
    "base": Variant(config=QWEN3_MOE, steps=500),
    "depth 3": Variant(config=QWEN3_MOE | {"num_hidden_layers": 3}, steps=120),
    "depth 24": Variant(config=QWEN3_MOE | {"num_hidden_layers": 24}, steps=40),
    "8 experts": Variant(config=QWEN3_MOE | {"num_experts": 8}),
    "64 experts": Variant(config=QWEN3_MOE | {"num_experts": 64}, steps=60),
    "top 1": Variant(
        config=QWEN3_MOE | {"num_experts_per_tok": 1, "norm_topk_prob": False},
        steps=30,
        start="base",
    ),
    "top 8": Variant(config=QWEN3_MOE | {"num_experts_per_tok": 8}, steps=30, start="base"),
    "length 32": Variant(config=QWEN3_MOE, weights="base", length=32),
    "length 512": Variant(config=QWEN3_MOE, steps=30, start="base", length=512),
    "sigmoid, biased": Variant(config=GLM4_MOE, steps=80),
    "grouped": Variant(
        config=GLM4_MOE | {"n_group": 4, "topk_group": 2}, steps=20, start="sigmoid, biased"
    ),
    "dense": Variant(
        config=COMMON | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, steps=60
    ),
    "cloned experts": Variant(config=QWEN3_MOE, weights="base"),
    "vanishing weight": Variant(config=QWEN3_MOE, steps=150, router="vanishing"),
    "bf16 router": Variant(config=QWEN3_MOE, router="rounded", weights="base"),
    "bf16 weights": Variant(config=QWEN3_MOE, weights="base", bf16_weights=True),
}
Dtype = Literal["float32", "bfloat16"]
BIAS = 0.1
"""Standard deviation of a selection bias, where a router has one."""


def recipe_of(folder: Path, *, dtype: Dtype = "float32") -> Recipe:
    """One process; micro-batches of 4096 tokens."""
    return Recipe(
        name="router-law",
        model=ModelConfig(path=str(folder), params_dtype=dtype, moe_aux_loss_coeff=1e-3),
        data=DataConfig(train=SourceConfig()),
        train=TrainConfig(max_tokens_per_gpu=4096),
        routing=RoutingConfig(prob_every=0),
    )


@contextmanager
def opened(
    folder: Path,
    *,
    router: str = "own",
    recipe: Recipe | None = None,
    optimizer: OptimizerConfig | None = None,
    updates: int = 1,
) -> Iterator[Policy]:
    """The policy of a model folder on one process, with routers of another kind if asked for."""
    recipe = recipe or recipe_of(folder)
    groups = parallel.setup(recipe.parallel, seed=1)
    with patch.object(routers, "LayerRouter", ROUTERS[router]):
        policy = Policy(
            recipe,
            read_architecture(folder),
            groups,
            folder,
            optimizer=optimizer or recipe.optimizer,
            total_updates=updates,
        )
    try:
        with closing(policy):
            yield policy
    finally:
        parallel.teardown()


def step(policy: Policy, recipe: Recipe, samples: list[Sample]) -> float:
    """One supervised update; its loss, nats a token."""
    batches = micro_batches(samples, policy.groups.micro_batching(recipe))
    loss = functools.partial(supervised_loss, denominators=denominators(samples))
    metrics, _ = policy.update(
        [batch.to(policy.groups.device) for batch in batches], loss, where="router-law"
    )
    return metrics.gather(policy.groups.world).values()["actor/pg_loss"]


def training_samples(number: int, length: int = LENGTH) -> list[Sample]:
    """The sequences of the ``number``-th step."""
    return sequences(stdlib(held_out=False), TOKENS // length, length, seed=number)


def folder_of(name: str, cache: Path = CACHE) -> Path:
    """The trained model of a variant; trains it if it is not there."""
    variant = MODELS[name]
    if variant.weights and name != "cloned experts":
        return folder_of(variant.weights, cache)
    folder = cache / name.replace(", ", "-").replace(" ", "-")
    if folder.exists():
        return folder
    if name == "cloned experts":
        _clone(folder_of("base", cache), folder)
    else:
        _train(variant, folder)
    return folder


def _train(variant: Variant, folder: Path) -> None:
    began = time.process_time()
    arch = parse_architecture(variant.config)
    start = folder.with_name(f"{folder.name}-start")
    recipe = recipe_of(start)
    if not start.exists() and variant.start:
        shutil.copytree(folder_of(variant.start, folder.parent), start)
        (start / "config.json").write_text(json.dumps(variant.config))
    elif not start.exists():
        weights.save_random(arch, recipe.model, start, seed=1)
        _draw_biases(start)
    optimizer = OptimizerConfig(
        lr=3e-3,
        min_lr=1e-4,
        lr_warmup_steps=min(30, variant.steps // 4),
        lr_decay_style="cosine",
        adam_beta2=0.95,
    )
    losses = []
    with opened(
        start, router=variant.router, recipe=recipe, optimizer=optimizer, updates=variant.steps
    ) as policy:
        for number in range(variant.steps):
            losses.append(step(policy, recipe, training_samples(number, variant.length)))
            if (number + 1) % 50 == 0:
                seconds = time.process_time() - began
                last = sum(losses[-50:]) / 50
                logger.info(
                    "%s: step %d, loss %.3f, %.0f s", folder.name, number + 1, last, seconds
                )
        policy.model.weights.save(folder)
    said = {
        "steps": variant.steps,
        "loss": sum(losses[-50:]) / len(losses[-50:]),
        "cpu_s": round(time.process_time() - began, 1),
    }
    (folder / "trained.json").write_text(json.dumps(said))


def _draw_biases(folder: Path) -> None:
    """Give routers that have a selection bias one that is not 0."""
    generator = torch.Generator().manual_seed(2)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(BIAS * torch.randn(tensor.shape, generator=generator))
        save_file(tensors, path, metadata={"format": "pt"})


def _clone(source: Path, folder: Path) -> None:
    """The same model with the first expert of a layer in the place of all."""
    with whole_folder(folder) as temporary:
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                (temporary / path.name).write_bytes(path.read_bytes())
                continue
            tensors = load_file(path)
            for name in tensors:
                before, _, after = name.partition(".experts.")
                if after:
                    rest = after.partition(".")[2]
                    tensors[name] = tensors[f"{before}.experts.0.{rest}"].clone()
            save_file(tensors, temporary / path.name, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names or list(MODELS)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    for name in names:
        folder_of(name)


if __name__ == "__main__":
    main()
