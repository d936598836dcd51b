"""Policies of tiny models: opened in a setting, given sequences, read out under any layout."""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from sapo_megatron.commands.qualify.models import make_model, sequences
from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.policy import parallel
from sapo_megatron.policy.step import LossFunction, Policy
from sapo_megatron.recipe.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RolloutConfig,
    SourceConfig,
    TrainConfig,
)
from sapo_megatron.sample import PackedBatch, Sample, SampleRoutes

Dtype = Literal["float32", "bfloat16"]
Layers = Literal["torch", "transformer_engine"]
Result = dict[str, Any]
"""Tensors, all on the CPU, and numbers, by name."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a process measures with."""

    folder: Path
    """Where models and runs are written."""
    layers: Layers
    """As ``model.layers``."""
    full: bool
    """Sizes for a GPU, not those that two cores get through in seconds."""
    reference: bool = False
    """Measure exactly, where that is another computation."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def recipe_for(
    setting: Setting, model: Path, dtype: Dtype, *, offload: float = 0.0, **layout: Any
) -> Recipe:
    """The recipe of a tiny model; ``layout`` are keys of its section ``parallel``."""
    config = ParallelConfig(**layout, distributed_timeout_s=120.0)
    return Recipe(
        name="qualify",
        model=ModelConfig(path=str(model), params_dtype=dtype, layers=setting.layers),
        data=DataConfig(train=SourceConfig()),
        parallel=config,
        rollout=RolloutConfig(max_response_length=12),
        # A learning rate at which a wrong step count of Adam shows in the weights.
        optimizer=OptimizerConfig(lr=3e-2, optimizer_offload_fraction=offload),
        train=TrainConfig(max_tokens_per_gpu=48 // config.context_parallel_size),
    )


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A policy of a tiny model, and what is asked of it. Methods are collective over all ranks."""

    recipe: Recipe
    policy: Policy

    def samples(self, *, given: bool) -> list[Sample]:
        """Sequences with log-probs of an old policy and advantages of both signs.

        ``given``: with experts of their own, so that no near tie of a router decides anything.
        """
        routers, rng = self.policy.model.routers, np.random.default_rng(7)
        samples = sequences()
        for sample in samples:
            length = len(sample.response_tokens)
            sample.rollout_logprobs = rng.uniform(-6.0, -3.0, length).tolist()
            sample.advantage = (1.0, -0.7)[sample.uid % 2]
            if given and routers.moe_layers:
                fed = len(sample.prompt_tokens) + length - 1
                first = rng.integers(routers.num_experts, size=(fed, len(routers.moe_layers), 1))
                experts = (first + np.arange(routers.topk)) % routers.num_experts
                sample.routes = SampleRoutes(experts=experts.astype(np.int16))
        return samples

    def batches(self, samples: Sequence[Sample]) -> list[PackedBatch]:
        """This rank's micro-batches, on its device."""
        groups = self.policy.groups
        batches = micro_batches(samples, groups.micro_batching(self.recipe))
        return [
            dataclasses.replace(batch, old_logprob=batch.rollout_logprob).to(groups.device)
            for batch in batches
        ]

    def replayed(self, batches: Sequence[PackedBatch]) -> list[Tensor] | None:
        """The experts that come with the sequences; None: none do."""
        if batches[0].rollout_experts is None:
            return None
        return [self.policy.model.view.rollout_routes(batch).experts for batch in batches]

    def logprobs(self, samples: Sequence[Sample]) -> Tensor:
        """Those of all response tokens, in order."""
        batches, groups = self.batches(samples), self.policy.groups
        forwards = self.policy.model.forward(batches, replay=self.replayed(batches))
        mine: dict[tuple[int, int], float] = {}
        for batch, forward in zip(batches, forwards, strict=True):
            if forward.logprob is None:
                continue
            uids = torch.tensor(batch.sample_uids)[batch.sequence_ids[batch.mask].cpu()]
            places = zip(uids.tolist(), batch.position_ids[batch.mask].tolist(), strict=True)
            mine.update(zip(places, forward.logprob[batch.mask].tolist(), strict=True))
        found: list[Any] = [None] * dist.get_world_size()
        # Over the world: each rank brings the tokens that it has.
        dist.all_gather_object(found, mine, group=groups.world)
        whole = {place: value for part in found for place, value in part.items()}
        return torch.tensor([whole[place] for place in sorted(whole)], dtype=torch.float64)

    def gradients(self, samples: Sequence[Sample]) -> Tensor:
        """Of SAPO's loss on the sequences, as one fp32 vector. The weights are gone afterwards."""
        batches = self.batches(samples)
        self.policy.backward(batches, self._loss(samples), replay=self.replayed(batches))
        for chunk in self.policy.ddp:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                # The optimizer's shards of the gradients lie as those of the weights do: what
                # gathers weights behind a step gathers these.
                buffer.param_data.copy_(buffer.grad_data)
            chunk.start_param_sync(force_sync=True)
        return self.weights()

    def weights(self) -> Tensor:
        """All of the model, in the order of their names, as one fp32 vector."""
        box: list[Any] = [tempfile.mkdtemp()]
        # Over the world: the folder that all write to.
        dist.broadcast_object_list(box, group=self.policy.groups.world)
        folder = Path(box[0])
        self.policy.model.weights.save(folder / "out")
        found: dict[str, Tensor] = {}
        for file in (folder / "out").glob("*.safetensors"):
            found |= load_file(file)
        # Over the world: every rank measures this, and none goes on before all have.
        dist.barrier(self.policy.groups.world)
        shutil.rmtree(folder, ignore_errors=True)
        return torch.cat([found[name].float().flatten() for name in sorted(found)])

    def step(self, samples: Sequence[Sample]) -> None:
        """One update."""
        batches = self.batches(samples)
        loss = self._loss(samples)
        self.policy.update(batches, loss, where="qualify", replay=self.replayed(batches))

    def _loss(self, samples: Sequence[Sample]) -> LossFunction:
        return functools.partial(
            policy_loss,
            algorithm=self.recipe.algorithm,
            denominators=denominators(samples),
            max_response_length=self.recipe.rollout.max_response_length,
            cp_group=self.policy.groups.cp,
        )


@contextmanager
def opened(setting: Setting, family: str, dtype: Dtype, **options: Any) -> Iterator[Tiny]:
    """A policy of ``family``'s tiny model, while the block lasts. Collective over all ranks.

    ``options`` as of :func:`recipe_for`.
    """
    model = setting.folder / f"{family}-{dtype}"
    if not model.exists():
        make_model(family, model, getattr(torch, dtype))
    with policy_of(recipe_for(setting, model, dtype, **options)) as tiny:
        yield tiny


@contextmanager
def policy_of(recipe: Recipe) -> Iterator[Tiny]:
    """The recipe's policy, while the block lasts. Collective over all ranks."""
    groups = parallel.setup(recipe.parallel, seed=1)
    model, optimizer = Path(recipe.model.path), recipe.optimizer
    policy = Policy(
        recipe, read_architecture(model), groups, model, optimizer=optimizer, total_updates=10
    )
    try:
        with closing(policy):
            yield Tiny(recipe=recipe, policy=policy)
    finally:
        parallel.teardown()
