"""What a recipe needs of its cluster, without a GPU: layout, parameters, memory, arithmetic.

Every pipeline stage is built at the recipe's full world size by megatron-core itself, on the meta
device (:mod:`sapo_megatron.policy.blueprint`); all the rest is arithmetic, explained in
``docs/plan-arithmetic.md``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from sapo_megatron.commands.plan.advice import Suggestion, suggestions
from sapo_megatron.commands.plan.gpus import GIB, GPUS, Gpu
from sapo_megatron.commands.plan.host import HostMemory, host_memory
from sapo_megatron.commands.plan.layout import Batches, Layout, longest
from sapo_megatron.commands.plan.memory import Memory, memory
from sapo_megatron.commands.plan.servers import Servers
from sapo_megatron.commands.plan.step import Step, counted, step
from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.hf.folder import find_architecture
from sapo_megatron.policy import blueprint
from sapo_megatron.policy.blueprint import Stage
from sapo_megatron.policy.flops import Parameters
from sapo_megatron.recipe.check import (
    check_architecture,
    check_generation,
    check_world,
    smallest_world,
)
from sapo_megatron.recipe.schema import ParallelConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    recipe: Recipe
    arch: Architecture
    gpu: Gpu
    layout: Layout
    length: int
    """Tokens of a sequence of the step: its mean, or the longest that the recipe allows."""
    batches: Batches
    """The step's, with sequences of that length."""
    stages: list[Stage]
    """One rank of each pipeline stage."""
    memory: list[Memory]
    """Bytes on that rank, by stage."""
    parameters: Parameters
    step: Step
    servers: Servers | None
    """None: the trainer's processes generate."""
    host: HostMemory
    host_gib: float
    """What a node has of it."""
    suggestions: tuple[Suggestion, ...] = ()
    """Changes with which it would fit, where it does not."""

    @property
    def worst(self) -> int:
        """The stage whose GPUs need most memory."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def total_gib(self) -> float:
        """What a GPU of the worst stage needs."""
        return self.memory[self.worst].total / GIB

    @property
    def fits(self) -> bool:
        return self.total_gib <= self.gpu.memory_gib and self.fits_host and self.fits_servers

    @property
    def fits_host(self) -> bool:
        return self.host.total / GIB <= self.host_gib

    @property
    def fits_servers(self) -> bool:
        return self.servers is None or self.servers.holds

    @property
    def largest(self) -> str:
        """The largest part of the worst stage's memory at its peak."""
        parts = self.memory[self.worst].at_peak()
        return max(parts, key=lambda name: parts[name])


def plan(recipe: Recipe, mean_length: int | None = None) -> Plan:
    """The plan of ``recipe`` on its ``cluster``; where it does not fit, with changes that help.

    Memory is for sequences that are as long as they may be, the step for the ``mean_length`` of a
    sequence, prompt included. For a process without CUDA and without a process group of its own,
    both of which it leaves as they are. Raises UserError for what training would refuse as well,
    and for a mean length that no sequence has.
    """
    length = longest(recipe) if mean_length is None else mean_length
    if not 2 <= length <= longest(recipe):
        raise UserError(
            f"--mean-length: expected at least 2 tokens and at most {longest(recipe)}, "
            f"rollout.max_prompt_length and max_response_length together, got {length}; change it"
        )
    _check_servers(recipe)
    arch = find_architecture(recipe.model.path, recipe.model.architecture)
    built: dict[tuple[ParallelConfig, int], list[Stage]] = {}

    def build(recipe: Recipe, world: int) -> list[Stage]:
        layout = recipe.parallel, world
        if layout not in built:
            built[layout] = blueprint.stages(recipe, arch, world)
        return built[layout]

    made = _plan(recipe, arch, length, build)
    if made.total_gib <= made.gpu.memory_gib:
        return made

    def needed(changed: Recipe) -> float:
        other = _plan(changed, arch, length, build)
        return other.total_gib if other.fits_host and other.fits_servers else math.inf

    found = suggestions(recipe, made.largest, made.gpu.memory_gib, needed)
    return replace(made, suggestions=tuple(found))


def _check_servers(recipe: Recipe) -> None:
    """Raises UserError for more servers than the trainer's GPUs on a node can be."""
    r, here = recipe.rollout, recipe.cluster.gpus_per_node
    most = here // r.server_tensor_parallel_size
    if r.colocate and r.vllm_python and (r.num_servers or 1) > most:
        raise UserError(
            f"rollout.num_servers: expected at most {most} servers with rollout."
            f"server_tensor_parallel_size {r.server_tensor_parallel_size} on the {here} GPUs of a "
            f"node, got {r.num_servers or 1}; start fewer, or smaller ones, or give those that "
            f"span nodes as rollout.servers"
        )


def world_size(recipe: Recipe) -> int:
    """The cluster's GPUs, or as many as the layout takes where the recipe names no nodes."""
    cluster = recipe.cluster
    if cluster.nodes is None:
        return smallest_world(recipe.parallel)
    return cluster.nodes * cluster.gpus_per_node


def _plan(
    recipe: Recipe, arch: Architecture, length: int, build: Callable[[Recipe, int], list[Stage]]
) -> Plan:
    world = world_size(recipe)
    check_architecture(recipe, arch)
    check_generation(recipe.rollout, arch)
    check_world(recipe, world)
    layout = Layout.of(recipe, world)
    stages = build(recipe, world)
    gpu, cluster = GPUS[recipe.cluster.gpu], recipe.cluster
    parameters = counted(arch, stages)
    servers = Servers.of(recipe, arch, parameters.total, world)
    gpus = [memory(recipe, arch, layout, stages, n, servers) for n in range(layout.pp)]
    return Plan(
        recipe=recipe,
        arch=arch,
        gpu=gpu,
        layout=layout,
        length=length,
        batches=Batches.of(recipe, layout, length),
        stages=stages,
        memory=gpus,
        parameters=parameters,
        step=step(recipe, arch, layout, stages, length),
        servers=servers,
        host=host_memory(recipe, arch, layout, stages, gpus),
        host_gib=cluster.host_memory_gib or gpu.host_memory_gib * cluster.gpus_per_node / 8,
    )
