"""Seconds of a step, by stage: docs/plan-arithmetic.md has the formulae, and how well they do."""

from dataclasses import asdict, dataclass

from sapo_megatron.commands.plan import Plan
from sapo_megatron.commands.plan.activations import IMBALANCE
from sapo_megatron.commands.plan.decoding import Rollout, in_process, on_servers
from sapo_megatron.commands.plan.gpus import BYTES, CONSTANTS, Constants
from sapo_megatron.commands.plan.layout import away
from sapo_megatron.commands.plan.memory import sharded
from sapo_megatron.commands.plan.step import bytes_sent, moe_layers, update_passes
from sapo_megatron.policy.flops import Passes, forward_flops, frozen

ADAM_BYTES = 28
"""Per parameter that Adam reads and writes: gradient, master weight and two moments, fp32."""
LAYER_TENSORS = 10
"""Tensors of a layer without its routed experts, about; each of those has three."""
TOO_LONG = 1.5
"""Where a rollout takes more than so many times as long as log-probs and update, it is slow."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    rollout: float
    logprobs: float
    """Of the old policy and, where there is one, of the reference."""
    update: float
    handover: float
    """Of the weights to the servers, and of GPUs that they share with the trainer."""
    step: float

    def parts(self) -> dict[str, float]:
        return asdict(self)


def seconds(plan: Plan, constants: Constants = CONSTANTS) -> tuple[Seconds, Rollout]:
    """The plan's step, with rollout and training overlapped where servers run ahead."""
    recipe, updates = plan.recipe, plan.recipe.train.num_mini_batches
    servers = plan.servers
    made = on_servers(plan, servers, constants) if servers else in_process(plan, constants)
    logprobs = _passes(plan, constants, Passes(frozen(recipe), 0), drains=1)
    update = _passes(plan, constants, update_passes(recipe), drains=updates)
    update += updates * _optimizer(plan, constants)
    handover = _handover(plan, constants) if servers else 0.0
    both = (made.seconds, logprobs + update)
    # In process nothing overlaps; on servers new weights wait for all that is under way.
    ahead = recipe.rollout.async_steps > 0 and servers is not None
    step = handover + (max(both) if ahead else sum(both))
    parts = {"logprobs": logprobs, "update": update, "handover": handover, "step": step}
    return Seconds(rollout=made.seconds, **parts), made


def slow(plan: Plan) -> str | None:
    """Why the rollout holds up the run; None where it does not."""
    taken, made = seconds(plan)
    training = taken.logprobs + taken.update
    if taken.rollout <= TOO_LONG * training:
        return None
    whole = sum(made.decode_step.values())
    name, most = max(made.decode_step.items(), key=lambda part: part[1])
    return (
        f"the rollout takes {taken.rollout / training:.1f} times as long as log-probs and update, "
        f"and more than {TOO_LONG} is slow: {made.engine}, {made.at_once:.0f} sequences at once, "
        f"{1e3 * whole:.0f} ms a decode step, {most / whole:.0%} of it {name}"
    )


def _passes(plan: Plan, c: Constants, passes: Passes, *, drains: int) -> float:
    """Passes over the step's sequences, in which the pipeline runs empty ``drains`` times."""
    arch, layout, gpu = plan.arch, plan.layout, plan.gpu
    if not passes.work:
        return 0.0
    flops = forward_flops(arch, plan.parameters, plan.length)
    if arch.experts and layout.ep > 1:
        share = arch.experts.topk / arch.experts.number
        routed = share * sum(stage.total_experts for stage in plan.stages)
        flops += (IMBALANCE - 1) * 2 * routed * plan.length
    busiest = max(plan.stages, key=lambda stage: len(stage.layers))
    flops *= len(busiest.layers) / arch.num_layers / (layout.tp * layout.cp)
    work = plan.batches.sequences_per_rank * flops * passes.work
    compute = work / (gpu.tflops * 1e12 * c.matrix)
    # Routing waits for the GPU, so that a layer with experts is not launched ahead of its time.
    micro_batches = plan.batches.micro_batches * plan.recipe.train.num_mini_batches
    launches = c.launch * moe_layers(arch, busiest) * micro_batches * passes.work
    sent = bytes_sent(plan.recipe, arch, layout, plan.stages, plan.length, passes)
    sent["ep"] *= IMBALANCE
    links = {group: _link(plan, c, group, size) for group, size in sent.items()}
    reduced = links.pop("dp")
    bubble = 1 + drains * (layout.pp - 1) / (micro_batches * layout.vpp)
    return (compute + launches + sum(links.values())) * bubble + reduced


def _link(plan: Plan, c: Constants, group: str, size: float) -> float:
    """Seconds in which a GPU sends ``size`` bytes to the others of its group."""
    layout, gpu = plan.layout, plan.gpu
    inner, ranks = {
        "tp": (1, layout.tp),
        "cp": (layout.tp, layout.cp),
        "ep": (layout.etp, layout.ep),
        "dp": (layout.tp, layout.dp_cp),
        "pp": (layout.world_size // layout.pp, layout.pp),
    }[group]
    out = away(inner, ranks, plan.recipe.cluster.gpus_per_node)
    return size * (out / gpu.network + (1 - out) / gpu.nvlink) / c.bandwidth


def _optimizer(plan: Plan, c: Constants) -> float:
    """An Adam step: on the GPU, and on the host what of it is offloaded there."""
    ranks = min(plan.recipe.cluster.gpus_per_node, plan.layout.world_size)
    on_host = plan.recipe.optimizer.optimizer_offload_fraction
    # Gradients go to the host in fp32, weights come back in their own dtype.
    moved = 4 + BYTES[plan.recipe.model.params_dtype]
    host = ranks * ADAM_BYTES / plan.gpu.host + moved / plan.gpu.pcie
    each = (1 - on_host) * ADAM_BYTES / plan.gpu.memory + on_host * host
    return max(sharded(stage, plan.layout) for stage in plan.stages) * each / c.bandwidth


def _handover(plan: Plan, c: Constants) -> float:
    """All weights to all servers, and the trainer's state off its GPUs and back onto them."""
    arch, gpu, r = plan.arch, plan.gpu, plan.recipe.rollout
    model = plan.parameters.total * BYTES[plan.recipe.model.params_dtype]
    tensors = LAYER_TENSORS * arch.num_layers
    tensors += 3 * arch.experts.number * len(arch.experts.layers) if arch.experts else 0
    loading = tensors * c.tensor
    if r.weight_transfer == "nccl":  # a tensor is loaded while the next one comes
        return max(loading, model / (gpu.network * c.bandwidth))
    if r.servers:
        return loading + 2 * model / c.files
    # Into each node's memory: each rank what its peers on other nodes have of the node's part.
    world = plan.layout.world_size
    ranks = min(plan.recipe.cluster.gpus_per_node, world)
    sent = model / ranks * ((1 - ranks / world) / gpu.network + 2 / gpu.pcie)
    moved = max(m.waits for m in plan.memory)
    return loading + (sent + 2 * moved / gpu.pcie) / c.bandwidth
