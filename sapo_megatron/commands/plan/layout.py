"""How a recipe is spread over its GPUs: sizes of groups, shares of a batch, work in flight."""

from dataclasses import dataclass

from sapo_megatron.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Layout:
    world_size: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int

    @classmethod
    def of(cls, recipe: Recipe, world_size: int) -> "Layout":
        p = recipe.parallel
        return cls(
            world_size=world_size,
            tp=p.tensor_model_parallel_size,
            pp=p.pipeline_model_parallel_size,
            vpp=p.virtual_pipeline_model_parallel_size or 1,
            cp=p.context_parallel_size,
            ep=p.expert_model_parallel_size,
            etp=p.expert_tensor_parallel_size,
        )

    @property
    def dp(self) -> int:
        """Ranks with the same weights and different sequences."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def dp_cp(self) -> int:
        """Ranks that hold the same dense weights and share their optimizer state."""
        return self.dp * self.cp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts and share their optimizer state."""
        return self.world_size // (self.etp * self.ep * self.pp)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A step's batches where all sequences are of one length."""

    length: int
    """Tokens of a sequence."""
    sequences: int
    """Sequences of a step, over all ranks."""
    mini_batch: int
    """Sequences of an optimizer step, over all ranks."""
    sequences_per_rank: int
    """Sequences of a step on the busiest data-parallel rank."""
    micro_batches: int
    """Micro-batches of an optimizer step on each data-parallel rank."""
    generated_at_once: int
    """Sequences that one rank decodes together."""

    @classmethod
    def of(cls, recipe: Recipe, layout: Layout, length: int | None = None) -> "Batches":
        """With sequences of ``length`` tokens; None: as long as the recipe allows."""
        r = recipe.rollout
        length = length or longest(recipe)
        sequences = r.rollout_batch_size * r.num_generations
        mini_batch = sequences // recipe.train.num_mini_batches
        per_rank = -(-mini_batch // layout.dp)
        share = -(-sequences // layout.dp_cp)
        return cls(
            length=length,
            sequences=sequences,
            mini_batch=mini_batch,
            sequences_per_rank=per_rank * recipe.train.num_mini_batches,
            micro_batches=_micro_batches(recipe, layout, length, mini_batch),
            generated_at_once=min(r.generation_batch_size, share),
        )

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def longest(recipe: Recipe) -> int:
    """Tokens of the longest sequence that the recipe allows."""
    return recipe.rollout.max_prompt_length + recipe.rollout.max_response_length


def _micro_batches(recipe: Recipe, layout: Layout, length: int, mini_batch: int) -> int:
    """How many ``data.batch.plan_micro_batches`` makes of sequences of one length."""
    multiple = 2 * layout.cp if layout.cp > 1 else 1
    fed = -(-(length - 1) // multiple) * multiple
    at_once = recipe.train.max_tokens_per_gpu * layout.cp // fed
    count = -(-mini_batch // (layout.dp * at_once))
    rounded = layout.pp if layout.vpp > 1 else 1
    return -(-count // rounded) * rounded


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Chunk-sized forward passes whose activations a stage holds at once.

    1F1B lets stage s run pp - s micro-batches ahead of its first backward; interleaved, it runs
    2 (pp - s - 1) + (v - 1) pp chunks ahead, and one more (arXiv 2104.04473; megatron-core's
    ``get_pp_rank_microbatches``).
    """
    ahead = layout.pp - stage - 1
    if layout.vpp > 1:
        ahead = 2 * ahead + (layout.vpp - 1) * layout.pp
    return min(ahead + 1, micro_batches * layout.vpp)


def away(inner: int, size: int, node: int) -> float:
    """The share of what a rank sends to its group of ``size`` ranks that goes to other nodes.

    Ranks of the group are ``inner`` apart: so many are in the groups that lie within theirs.
    """
    here = max(1, min(size, node // inner))
    return (size - here) / max(size - 1, 1)
