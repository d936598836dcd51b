"""Bytes of host memory on a node, by part: docs/plan-arithmetic.md explains them."""

from dataclasses import asdict, dataclass

from sapo_megatron.commands.plan.gpus import BYTES, GIB
from sapo_megatron.commands.plan.layout import Batches, Layout
from sapo_megatron.commands.plan.memory import Memory, route_bytes, sharded
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.policy.blueprint import Stage
from sapo_megatron.recipe.schema import Recipe

OFFLOADED_BYTES = 16
"""Per offloaded parameter: master weight, two moments and a copy of the gradient, fp32."""
SAMPLE_BYTES = 72
"""Per token of a sample: a whole number and a float of Python's with their places in lists, and
four letters of text."""
SENT_BYTES = 64
"""Per token while one rank sends its samples: the tensors, and the lists they are made from."""
PINNED = 2
"""Pinned memory is rounded up to powers of two: at most so many times what is asked for."""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes on the node that has most, as if all parts were at their largest at once."""

    samples: float
    """Tokens, log-probs and texts of a step and of those ahead, on every rank."""
    exchange: float
    """Routes, where they were made and where they are read; one rank's tokens in transit; for
    servers that the trainer starts the weights, and what leaves its GPUs for them meanwhile."""
    pinned: float
    """The copy of a GPU's state that a checkpoint is written from."""
    optimizer: float
    """What of the optimizer is offloaded."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def parts(self) -> dict[str, float]:
        """Parts by name, in GiB, without the total."""
        return {name: size / GIB for name, size in asdict(self).items()}


def host_memory(
    recipe: Recipe, arch: Architecture, layout: Layout, stages: list[Stage], gpus: list[Memory]
) -> HostMemory:
    """What a node needs; ``gpus``: what a GPU of each stage does."""
    batches = Batches.of(recipe, layout)
    ranks = min(recipe.cluster.gpus_per_node, layout.world_size)
    in_process = recipe.rollout.engine != "vllm"
    # In process, a rank of each model-parallel block keeps what the block made; else the first.
    parts = layout.dp_cp if in_process else 1
    makers = min(-(-ranks // layout.tp), parts)
    kept = 1 + recipe.rollout.async_steps
    made = -(-batches.sequences // parts) * kept
    model = sum(stage.total for stage in stages) * BYTES[recipe.model.params_dtype]
    routes = _routes(recipe, arch) * batches.length
    state = max(
        stage.parameters * BYTES[recipe.model.params_dtype] + gpu.optimizer
        for stage, gpu in zip(stages, gpus, strict=True)
    )
    offloaded = max(sharded(stage, layout) for stage in stages) * OFFLOADED_BYTES
    return HostMemory(
        samples=ranks * batches.tokens * kept * SAMPLE_BYTES,
        exchange=(makers * made + ranks * batches.sequences_per_rank) * routes
        + ranks * (made * batches.length * SENT_BYTES + max(gpu.waits for gpu in gpus))
        + (model if recipe.rollout.vllm_python else 0),
        pinned=ranks * state * PINNED,
        optimizer=ranks * offloaded * recipe.optimizer.optimizer_offload_fraction,
    )


def _routes(recipe: Recipe, arch: Architecture) -> float:
    """Bytes per token of the rollout engine's routes, in all layers; 0 where nothing reads them.

    Servers that the trainer starts return them for R3 alone.
    """
    wanted = recipe.routing.observe and not recipe.rollout.vllm_python
    if arch.experts is None or not (wanted or recipe.routing.router_replay == "R3"):
        return 0.0
    return route_bytes(arch, recipe, len(arch.experts.layers))
