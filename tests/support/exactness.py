"""What one rank measures under a layout: the loss of a mini-batch, and its gradients."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.metrics import Metrics, Sum
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.objective.reduce import megatron_loss
from sapo_megatron.policy import compat, model, parallel
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.spec import transformer_config
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import (
    DataConfig,
    ModelConfig,
    Recipe,
    RolloutConfig,
    RoutingConfig,
    SourceConfig,
    TrainConfig,
)
from tests.support.layouts import Layout
from tests.support.minibatches import MODELS, OBJECTIVES, samples

LONGEST_RESPONSE = 12


@dataclass(kw_only=True)
class Measured:
    """What a layout computed, as its first rank knows it."""

    loss: float
    metrics: dict[str, float]
    replicas_differ: bool
    """Whether a replicated gradient is not the same to the bit on all tensor-parallel ranks."""
    micro_batches: int
    idle_ranks: int
    """Data- and context-parallel ranks that had no valid token."""
    grad_norms: list[float]
    """What :func:`grad_norms` found."""


def make_recipe(layout: Layout, folder: Path, dtype: str) -> Recipe:
    algorithm, objective = OBJECTIVES[layout.objective]
    return Recipe(
        name="matrix",
        model=ModelConfig(
            path=str(folder), params_dtype=dtype, moe_aux_loss_coeff=objective.aux_loss_coeff
        ),
        data=DataConfig(train=SourceConfig()),
        parallel=layout.parallel,
        rollout=RolloutConfig(
            temperature=objective.temperature, max_response_length=LONGEST_RESPONSE
        ),
        routing=RoutingConfig(replay_threshold=layout.replay_threshold),
        algorithm=algorithm,
        train=TrainConfig(
            max_tokens_per_gpu=layout.max_tokens // layout.cp,
            logprob="fused" if layout.fused else "inplace",
            packing=layout.packing,
        ),
    )


def measure(layout: Layout, dtype: str, folder: Path, gradients: Path) -> Measured:
    """Run one mini-batch forward and backward under ``layout``, on every rank of its world.

    Writes the gradients as a Hugging Face folder, in the place of the weights.
    """
    recipe = make_recipe(layout, folder, dtype)
    groups = parallel.setup(recipe.parallel, seed=1)
    policy = _policy(recipe, layout, groups, folder)
    batch_samples = samples(layout)
    batches = [
        dataclasses.replace(batch, old_logprob=batch.rollout_logprob)
        for batch in micro_batches(batch_samples, groups.micro_batching(recipe))
    ]
    # All micro-batches have as many in the only batch that is used with auxiliary losses.
    router_tokens = compat.auxiliary_loss_tokens(len(batches[0].tokens), groups.tp.size())
    view = policy.model.view
    reports, _ = policy.backward(
        batches,
        functools.partial(
            policy_loss,
            algorithm=recipe.algorithm,
            denominators=denominators(batch_samples),
            max_response_length=LONGEST_RESPONSE,
            cp_group=groups.cp,
        ),
        contract=functools.partial(
            megatron_loss,
            contract=layout.contract,
            num_tokens=router_tokens if recipe.model.moe_aux_loss_coeff else 1,
        ),
        replay=[view.rollout_routes(b).experts for b in batches] if layout.replay else None,
    )
    metrics = Metrics()
    if groups.is_leader:
        for report in reports:
            metrics.update(report)
        idle = not any(bool(batch.mask.any()) for batch in batches)
        metrics.add("idle_ranks", Sum(float(idle)))
    values = metrics.gather(groups.world).values()
    with left_by_transformer_engine():
        other = _policy(recipe, layout, groups, folder)
    norms = grad_norms(policy, other)
    other.close()
    gradients_as_weights(policy)
    differ = _replicas_differ(policy)
    policy.model.weights.save(gradients)
    policy.close()
    parallel.teardown()
    return Measured(
        loss=values.pop("actor/pg_loss"),
        idle_ranks=int(values.pop("idle_ranks")),
        metrics=values,
        replicas_differ=differ,
        micro_batches=len(batches),
        grad_norms=norms,
    )


def _policy(recipe: Recipe, layout: Layout, groups: ParallelGroups, folder: Path) -> Policy:
    """A policy under the layout's loss contract, which is no setting of a recipe."""

    def config(*args: Any) -> TransformerConfig:
        return dataclasses.replace(
            transformer_config(*args), calculate_per_token_loss=layout.per_token_loss
        )

    with mock.patch.object(model, "transformer_config", config):
        return Policy(
            recipe,
            parse_architecture(MODELS[layout.model]),
            groups,
            folder,
            optimizer=recipe.optimizer,
            total_updates=1,
        )


@contextmanager
def left_by_transformer_engine() -> Iterator[None]:
    """Models built in the block find their weights marked as Transformer Engine's layers do it.

    Experts do not say that they are cut, and latent attention's down-projections, which every
    tensor-parallel rank has whole, say that they are.
    """
    init = GPTModel.__init__

    def build(self: GPTModel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for name, weight in self.named_parameters():
            if ".mlp.experts." in name:
                vars(weight).pop("tensor_model_parallel", None)
            elif name.endswith("_down_proj.weight"):
                vars(weight)["tensor_model_parallel"] = True

    with mock.patch.object(GPTModel, "__init__", build):
        yield


def grad_norms(policy: Policy, other: Policy) -> list[float]:
    """The norm of ``policy``'s gradients as its optimizer and ``other``'s find it, on every rank.

    ``other`` has the same weights, and gets the gradients. Collective over all ranks.
    """
    mine = []
    for one in (policy, other):
        for buffer, source in zip(_buffers(one), _buffers(policy), strict=True):
            buffer.grad_data.copy_(source.grad_data)
        one.optimizer.prepare_grads()
        mine.append(float(one.optimizer.get_grad_norm()))
    found: list[Any] = [None] * dist.get_world_size()
    # Over the world: every rank says what its optimizers found.
    dist.all_gather_object(found, mine, group=policy.groups.world)
    return list(itertools.chain(*found))


def _buffers(policy: Policy) -> list[Any]:
    return [b for chunk in policy.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def gradients_as_weights(policy: Policy) -> None:
    """Overwrite the weights with their gradients, whole on every rank.

    The distributed optimizer left each rank its shard of the reduced gradients, laid out as the
    weights are: what gathers weights after a step gathers these.
    """
    for buffer in _buffers(policy):
        buffer.param_data.copy_(buffer.grad_data)
    for chunk in policy.ddp:
        chunk.start_param_sync(force_sync=True)


def _replicas_differ(policy: Policy) -> bool:
    """Whether ranks that hold the same weight disagree on it."""
    groups = policy.groups
    differ = False

    def compare(weight: torch.Tensor, group: dist.ProcessGroup) -> None:
        nonlocal differ
        first = weight.detach().clone()
        dist.broadcast(first, dist.get_global_rank(group, 0), group=group)
        differ |= not torch.equal(first, weight)

    for chunk in policy.model.chunks:
        for weight in chunk.parameters():
            sharded = getattr(weight, "tensor_model_parallel", False)
            if not sharded and getattr(weight, "allreduce", True):
                # Tensor-parallel group: its ranks hold the same replicated weights, in one order.
                compare(weight, groups.tp)
    ends = [c for c in policy.model.chunks if c.pre_process or c.post_process]
    if ends and ends[0].share_embeddings_and_output_weights:
        # Embedding group: the first and the last stage, each with its copy of a tied embedding.
        compare(ends[0].shared_embedding_or_output_weight(), groups.megatron.embd)
    votes = torch.tensor([float(differ)])
    dist.all_reduce(votes, group=groups.world)
    return bool(votes)
