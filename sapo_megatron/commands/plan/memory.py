"""Bytes on a GPU, by part: the memory model that docs/plan-arithmetic.md explains."""

from dataclasses import dataclass, fields

from sapo_megatron.commands.plan import activations
from sapo_megatron.commands.plan.gpus import BYTES, GIB, RESERVE
from sapo_megatron.commands.plan.layout import Batches, Layout, in_flight
from sapo_megatron.commands.plan.servers import Servers
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.objective.logprob import BLOCK_NUMEL, CHUNK_NUMEL
from sapo_megatron.policy.blueprint import Stage
from sapo_megatron.recipe.schema import Recipe

GRADIENT_BYTES = {"bfloat16": 4, "float32": 4, "float64": 8}
"""Per number of DDP's gradient buffer: fp32 also for bf16 weights (grad_reduce_in_fp32)."""
OPTIMIZER_BYTES = {"bfloat16": 12, "float32": 8, "float64": 16}
"""Adam's two moments in the dtype of the master weights, and those where weights are bf16."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU of a stage. The first four stay; what follows takes turns."""

    weights: float
    """Of the policy, and of the reference model where there is one."""
    gradients: float
    optimizer: float
    reserve: float
    """Of the trainer's process, and of a server's on the same GPU, also while that sleeps."""
    batches: float
    """The step's packed sequences and the routes that come with them."""
    activations: float
    """Stored until the backward passes, and the recomputed layer with its gradients."""
    logprobs: float
    """Logits and what works on them."""
    kv_cache: float
    """Of what this rank generates itself; all the room that a server on its GPU has for it."""
    generation: float
    """Prefill, sampling or gathered routes, whichever is largest; none with servers."""
    server: float
    """The weights of a server on the same GPU."""
    waits: float
    """What leaves for host memory while that server is awake."""
    stored: float
    """The part of ``activations`` that is there while log-probs are computed."""

    @property
    def resident(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.reserve

    @property
    def update(self) -> float:
        """Peak of the updates: log-probs and the backward pass of a layer take turns."""
        return self.resident + self.batches + max(self.activations, self.stored + self.logprobs)

    @property
    def rollout(self) -> float:
        """Peak of generation, before the step's batches are made."""
        left = self.resident - (self.gradients if self.server else 0.0) - self.waits
        return left + self.kv_cache + self.generation + self.server

    @property
    def total(self) -> float:
        return max(self.update, self.rollout)

    @property
    def peak(self) -> str:
        return "update" if self.update >= self.rollout else "rollout"

    def at_peak(self) -> dict[str, float]:
        """The parts that are there at the peak, in GiB."""
        idle = {"kv_cache", "generation", "server"}
        if self.peak == "rollout":
            idle = {"batches", "activations", "logprobs"}
            idle |= {"gradients"} if self.server else set()
        return {name: size for name, size in self.parts().items() if name not in idle}

    def parts(self) -> dict[str, float]:
        """Parts by name, in GiB, without the total."""
        names = [f.name for f in fields(self) if f.name not in ("waits", "stored")]
        return {name: vars(self)[name] / GIB for name in names}


def memory(
    recipe: Recipe,
    arch: Architecture,
    layout: Layout,
    stages: list[Stage],
    number: int,
    servers: Servers | None,
) -> Memory:
    """The memory of each GPU of stage ``number``; ``servers``: None where ranks generate."""
    stage, batches, r = stages[number], Batches.of(recipe, layout), recipe.rollout
    dtype = recipe.model.params_dtype
    here = servers if r.colocate else None
    models = 2 if recipe.algorithm.kl_coef > 0 else 1
    on_gpu = 1 - recipe.optimizer.optimizer_offload_fraction
    stored, working = _activations(recipe, arch, layout, stage, number, batches)
    last = number == layout.pp - 1
    weights = stage.parameters * BYTES[dtype]
    optimizer = on_gpu * sharded(stage, layout) * OPTIMIZER_BYTES[dtype]
    leaves = ("gradients", "optimizer", "weights").index(r.colocate_offload) if here else 0
    generated = batches.generated_at_once * _cached(arch, layout, stage, batches, BYTES[dtype])
    return Memory(
        weights=models * weights,
        gradients=stage.parameters * GRADIENT_BYTES[dtype],
        optimizer=optimizer,
        batches=_batches(recipe, arch, layout, stage, batches),
        reserve=RESERVE * (2 if here else 1),
        stored=stored,
        activations=stored + working,
        logprobs=_logprobs(recipe, arch, layout) if last else 0.0,
        kv_cache=(max(here.room, 0.0) if here else 0.0) if servers else generated,
        generation=0.0 if servers else _generation(recipe, arch, stage, batches, last=last),
        server=here.weights if here else 0.0,
        waits=sum((optimizer, weights)[:leaves]),
    )


def _cached(
    arch: Architecture, layout: Layout, stage: Stage, batches: Batches, dtype: int
) -> float:
    """Bytes of a sequence's keys and values, and of what Gated DeltaNet keeps in their place."""
    kept = arch.delta_net.kept(stage.layers, dtype) if arch.delta_net else 0
    return batches.length * stage.cached_per_token * dtype + kept / layout.tp


def sharded(stage: Stage, layout: Layout) -> float:
    """Parameters whose optimizer state one rank keeps (ZeRO stage 1, arXiv 1910.02054)."""
    return stage.dense / layout.dp_cp + stage.experts / layout.expert_dp


def _activations(
    recipe: Recipe, arch: Architecture, layout: Layout, stage: Stage, number: int, batches: Batches
) -> tuple[float, float]:
    """Bytes per GPU of stage ``number``: stored, and working on top."""
    dtype = BYTES[recipe.model.params_dtype]
    tokens = recipe.train.max_tokens_per_gpu
    chunks = [activations.chunk(arch, layers, recipe.parallel) for layers in stage.chunks]
    # The embedding's output is the first layer's input; the last norm keeps its input and output.
    head = 2 * arch.hidden_size if number == layout.pp - 1 else 0
    held = in_flight(layout, number, batches.micro_batches)
    numbers = held * max(c.stored for c in chunks) + head
    # Linear layers gather the tokens of all tensor-parallel ranks: input and its gradient.
    gathered = 2 * arch.hidden_size if layout.tp > 1 else 0
    working = max(c.working for c in chunks) / layout.tp + gathered
    return numbers / layout.tp * tokens * dtype, working * tokens * dtype


def _logprobs(recipe: Recipe, arch: Architecture, layout: Layout) -> float:
    """Bytes that objective/logprob.py takes: in place, or fused with the output layer."""
    dtype = BYTES[recipe.model.params_dtype]
    wide = max(dtype, 4)
    tokens, columns = recipe.train.max_tokens_per_gpu, -(-arch.vocab_size // layout.tp)
    rows = recipe.train.logprob_chunk_size
    if recipe.train.logprob == "inplace":
        chunk = min(CHUNK_NUMEL["cuda"], tokens * columns // 64)
        return tokens * columns * dtype + 2 * wide * (rows * columns if rows else chunk)
    block = min(rows * columns if rows else BLOCK_NUMEL["cuda"], tokens * columns)
    hidden = tokens * arch.hidden_size * (dtype + wide)
    return block * (dtype + 2 * wide) + hidden + columns * arch.hidden_size * dtype


def _batches(
    recipe: Recipe, arch: Architecture, layout: Layout, stage: Stage, batches: Batches
) -> float:
    """Bytes of all micro-batches of a step, on the GPU from its old log-probs to its end."""
    tokens = batches.sequences_per_rank * batches.length / layout.cp
    per_token = 45.0  # four int64, four fp32 less one, a mask: see sample.PackedBatch
    if arch.experts:
        here = len(set(stage.layers) & set(arch.experts.layers)) / layout.tp
        per_token += 8 + route_bytes(arch, recipe, len(arch.experts.layers), cp=layout.cp)
        # Those of the old policy, and the rollout engine's in the same layout.
        per_token += 2 * route_bytes(arch, recipe, here)
    return tokens * per_token


def route_bytes(
    arch: Architecture, recipe: Recipe, layers: float, *, cp: int = 1, index: int = 2
) -> float:
    """Bytes per token of the chosen experts and, at some positions, fp32 router probabilities."""
    assert arch.experts, "only models with experts have routes"
    every = recipe.routing.kept_every
    kept = 4 * arch.experts.number * cp / every if every else 0.0
    return layers * (index * arch.experts.topk + kept)


def _generation(
    recipe: Recipe, arch: Architecture, stage: Stage, batches: Batches, *, last: bool
) -> float:
    """Bytes of prefill, sampling or gathered routes, whichever takes most."""
    dtype, rows = BYTES[recipe.model.params_dtype], batches.generated_at_once
    block = max(activations.forward_block(arch, n, recipe.parallel) for n in stage.layers)
    prefill = rows * recipe.rollout.max_prompt_length * block * dtype
    # rollout/generate.py samples in fp64: logits, log-probs, probabilities, their sums; sorted.
    copies = 4 if recipe.rollout.top_p == 1 else 8
    sampling = rows * arch.vocab_size * (dtype + 8 * copies) if last else 0.0
    routes = 0.0
    if arch.experts:
        here = len(set(stage.layers) & set(arch.experts.layers))
        per_token = route_bytes(arch, recipe, len(arch.experts.layers), index=4)
        per_token += route_bytes(arch, recipe, here)
        routes = rows * batches.length * per_token
    return max(prefill, sampling, routes)
