"""What weights are moved by: an optimizer, noise, or a rounding to fewer bits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.studies.router_law.measure import Weights
from benchmarks.studies.router_law.models import step, training_samples
from sapo_megatron.hf import fp8
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import OptimizerConfig, Recipe
from sapo_megatron.sample import Sample

LR = 1e-4
UPDATES = 4
"""A move of e = 1 is that of so many updates at this learning rate."""
ADAM = OptimizerConfig(lr=LR)
KEPT = ("embed", "lm_head", "output_layer", ".router.", "mlp.gate.weight")
FIRST_UPDATE = 1_000_000
"""Number of the first of their training batches, which is none that the model was trained on."""


def update(
    policy: Policy, weights: Weights, recipe: Recipe, batches: Sequence[Sequence[Sample]]
) -> list[Tensor]:
    """The move of Adam updates, one a batch; the policy's optimizer is ``ADAM``."""
    for samples in batches:
        step(policy, recipe, list(samples))
    found = weights.direction()
    weights.restore()
    return found


def update_batches(length: int) -> list[list[Sample]]:
    """The training sequences of ``UPDATES`` updates."""
    return [training_samples(FIRST_UPDATE + i, length) for i in range(UPDATES)]


def noise(weights: Weights, seed: int = 5) -> list[Tensor]:
    """Of every weight a random part up to 2^-9, as much as a rounding to bf16."""
    generator = torch.Generator().manual_seed(seed)
    return [w * (torch.rand(w.shape, generator=generator) * 2 - 1) * 2**-9 for w in weights.start]


def to_bf16(weights: Weights) -> list[Tensor]:
    """The rounding of every weight to bf16."""
    return [w.bfloat16().float() - w for w in weights.start]


def to_fp8(weights: Weights) -> list[Tensor]:
    """The rounding of matrices to fp8 with a scale for each block."""
    named = zip(weights.names, weights.start, strict=True)
    return [in_fp8(w) - w if is_in_fp8(name, w) else torch.zeros_like(w) for name, w in named]


def is_in_fp8(name: str, weight: Tensor) -> bool:
    """Whether published models in fp8 have this weight in it: not embedding, head and routers."""
    return weight.ndim == 2 and not any(part in name for part in KEPT)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in e4m3 and the scales of its blocks."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(fp8.scale_shape(weight.shape))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = tuple(slice(n * fp8.BLOCK, (n + 1) * fp8.BLOCK) for n in (i, j))
            scales[i, j] = weight[block].abs().max().clamp(min=1e-12) / 448
            values[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def in_fp8(weight: Tensor) -> Tensor:
    """The matrix as it comes back from there."""
    return fp8.dequantised(*quantised(weight), [slice(0, size) for size in weight.shape])


ROUNDINGS: dict[str, Callable[[Weights], list[Tensor]]] = {
    "noise": noise,
    "bf16 weights": to_bf16,
    "fp8 weights": to_fp8,
}
