"""The vLLM servers that a recipe generates on: how many, and what one has on each of its GPUs."""

import math
from dataclasses import dataclass

from sapo_megatron.commands.plan.gpus import BYTES, GIB, GPUS, RESERVE
from sapo_megatron.commands.plan.layout import longest
from sapo_megatron.hf.architecture import Architecture, GroupedQueryAttention
from sapo_megatron.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Those of the whole recipe; bytes are those on each GPU of one."""

    number: int
    gpus: int
    """Of one server."""
    beside: int
    """GPUs of all servers that the trainer has not."""
    utilization: float
    """Part of a GPU's memory that a server takes."""
    share: float
    """As many bytes."""
    weights: float
    cached: float
    """A token's keys and values; vLLM keeps latents whole on every GPU."""
    states: float
    """What layers of Gated DeltaNet keep of a sequence."""
    least: float
    """Room without which a server does not start: one longest sequence's."""

    @classmethod
    def of(
        cls, recipe: Recipe, arch: Architecture, parameters: int, world: int
    ) -> "Servers | None":
        """None: the trainer generates itself. ``world``: the trainer's GPUs."""
        r, memory = recipe.rollout, GPUS[recipe.cluster.gpu].memory_gib * GIB
        if r.engine != "vllm":
            return None
        dtype = BYTES[recipe.model.params_dtype]
        weights = parameters * dtype
        gpus = r.server_tensor_parallel_size
        if r.servers and gpus == 1:  # not said: as few as hold the weights in half of theirs
            least = 2 * weights / (r.server_share * memory)
            gpus = 2 ** max(math.ceil(math.log2(least)), 0)
        number = (r.num_servers or 1) * -(-world // recipe.cluster.gpus_per_node)
        if r.colocate and r.num_servers is None:
            number = max(world // gpus, 1)
        number = len(r.servers) or number
        states = kept_states(arch, gpus, dtype)
        cached = arch.attends(range(arch.num_layers)) * cached_numbers(arch, gpus) * dtype
        return cls(
            number=number,
            gpus=gpus,
            beside=0 if r.colocate else number * gpus,
            utilization=r.server_share,
            share=r.server_share * memory,
            weights=weights / gpus,
            cached=cached,
            states=states,
            least=longest(recipe) * cached + states,
        )

    @property
    def room(self) -> float:
        """Bytes for keys and values; below 0 where the weights alone are too large."""
        return self.share - RESERVE - self.weights

    @property
    def holds(self) -> bool:
        """Whether a server can start."""
        return self.room >= self.least


def cached_numbers(arch: Architecture, gpus: int) -> float:
    """Numbers that each GPU keeps of a token in one layer."""
    a = arch.attention
    if isinstance(a, GroupedQueryAttention):
        return 2 * a.head_dim * max(a.num_kv_heads / gpus, 1)
    return a.kv_lora_rank + a.qk_rope_head_dim


def kept_states(arch: Architecture, gpus: int, dtype: int) -> float:
    """Bytes that layers of Gated DeltaNet keep of a sequence on each GPU."""
    return arch.delta_net.kept(range(arch.num_layers), dtype) / gpus if arch.delta_net else 0.0
