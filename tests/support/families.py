"""What a rank makes of the tiny models of every family."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sapo_megatron.commands.qualify.models import FAMILIES, fill, make_model, sequences
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

__all__ = ["FAMILIES", "Place", "can_be_made", "fill", "make_model", "measure", "sequences"]


def can_be_made(family: str) -> bool:
    """Whether the installed transformers has the family: 4 lacks those that are newer than it."""
    kind = FAMILIES[family]["model_type"]
    return kind == "kimi_k2" or kind in transformers.CONFIG_MAPPING  # the hub's name for another


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
    found = {"logits": logits, "grad_norms": norms} if groups.is_leader else None
    parallel.teardown()
    return found


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
