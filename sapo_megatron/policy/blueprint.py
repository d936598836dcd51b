"""The model of a layout at its full world size, built by megatron-core without processes or memory.

Process groups are pretended and tensors are on the meta device, so what is counted are the modules
that training builds, with torch's layers in the place of Transformer Engine's.
"""

from dataclasses import dataclass, replace

from megatron.core.transformer.attention import Attention
from torch import Tensor

from sapo_megatron.errors import UserError, one_line
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.policy import parallel
from sapo_megatron.policy.gpt import LogprobGPT, build_model
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.spec import transformer_config
from sapo_megatron.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pipeline stage: what each of its ranks holds, and what they hold together."""

    chunks: tuple[tuple[int, ...], ...]
    """Numbers, from 0, of the layers of each virtual chunk."""
    dense: int
    """Parameters on a rank that every data- and context-parallel rank has as well."""
    experts: int
    """Parameters of routed experts on a rank."""
    total: int
    """Parameters of the whole stage, each counted once."""
    total_experts: int
    """Those of ``total`` that belong to routed experts."""
    total_embeddings: int
    """Those of ``total`` in the input embedding and the output layer."""
    cached_per_token: int
    """Numbers that a rank's KV cache keeps of one token."""

    @property
    def parameters(self) -> int:
        """On one rank."""
        return self.dense + self.experts

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for chunk in self.chunks for layer in chunk)


def stages(recipe: Recipe, arch: Architecture, world_size: int) -> list[Stage]:
    """Every distinct position of the layout: one rank of each pipeline stage, all its chunks.

    The other ranks of a stage have tensors of the same shapes: whatever tensor, expert and context
    parallelism cut, they cut into equal parts, or megatron-core refuses. Raises UserError where it
    does.
    """
    pp = recipe.parallel.pipeline_model_parallel_size
    return [
        _stage(recipe, arch, world_size, rank) for rank in range(0, world_size, world_size // pp)
    ]


def _stage(recipe: Recipe, arch: Architecture, world_size: int, rank: int) -> Stage:
    # Of the same shapes as those that the recipe may ask for, which need a GPU.
    recipe = replace(
        recipe,
        model=replace(recipe.model, layers="torch", attention_backend="auto"),
        parallel=replace(recipe.parallel, moe_token_dispatcher_type="alltoall"),
    )
    config = transformer_config(arch, recipe.model, recipe.parallel)
    # Random numbers for tensors without data are most of the time that building takes.
    config.perform_initialization = False
    with parallel.pretended(recipe.parallel, rank=rank, world_size=world_size) as groups:
        try:
            chunks = build_model(arch, config, groups, recipe)
        except (AssertionError, ValueError) as error:
            message = one_line(error)
            raise UserError(
                f"parallel: expected a layout that megatron-core can build, got: {message}; change "
                f"the size that does not divide"
            ) from None
        return _count(chunks, groups, expert_tp=recipe.parallel.expert_tensor_parallel_size)


def _count(chunks: list[LogprobGPT], groups: ParallelGroups, *, expert_tp: int) -> Stage:
    tp, expert_ranks = groups.tp.size(), groups.ep.size() * expert_tp
    dense = experts = total = total_experts = embeddings = 0
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            count = weight.numel()
            if not getattr(weight, "allreduce", True):
                experts += count
                total_experts += count * expert_ranks
                continue
            whole = count * (tp if _is_cut(weight) else 1)
            dense += count
            if name.startswith("output_layer.") and chunk.share_embeddings_and_output_weights:
                continue  # the last stage's copy of the first stage's embedding
            total += whole
            if name.startswith(("embedding.", "output_layer.")):
                embeddings += whole
    attentions = [layer.self_attention for chunk in chunks for layer in chunk.decoder.layers]
    return Stage(
        chunks=tuple(
            tuple(layer.layer_number - 1 for layer in chunk.decoder.layers) for chunk in chunks
        ),
        dense=dense,
        experts=experts,
        total=total + total_experts,
        total_experts=total_experts,
        total_embeddings=embeddings,
        cached_per_token=sum(
            a.num_query_groups_per_partition * (a.key_hidden_size + a.val_hidden_size)
            for a in attentions
            if isinstance(a, Attention)  # others keep a state, however long a sequence is
        ),
    )


def _is_cut(weight: Tensor) -> bool:
    """Whether each tensor-parallel rank holds a part of it."""
    return getattr(weight, "tensor_model_parallel", False)
