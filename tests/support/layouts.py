"""Layouts, models and batches of the exactness tests, and what one rank of a layout measures."""

import dataclasses
import functools
import gc
import json
import math
import random
import time
import traceback
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file

from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.metrics import Metrics, Sum
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.objective.reduce import megatron_loss
from sapo_megatron.policy import compat, parallel, step
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.spec import transformer_config
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import (
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    RolloutConfig,
    SourceConfig,
    TrainConfig,
)
from sapo_megatron.sample import Sample, SampleRoutes
from tests.support import reference

LONGEST_RESPONSE = 12
TIMEOUT_S = 60.0
"""Beyond it a collective of a layout that has gone wrong gives up."""

_BASE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 61,
}
MODELS: dict[str, dict[str, Any]] = {
    "moe": _BASE,
    "tied": _BASE | {"tie_word_embeddings": True},
    "mixed": _BASE | {"mlp_only_layers": [0, 2]},
    "unnormed": _BASE | {"norm_topk_prob": False},
    "dense": {
        k: v
        for k, v in (_BASE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}).items()
        if not any(word in k for word in ("moe", "expert", "sparse", "only", "topk"))
    },
}
"""The vocabulary of 61 divides by no tensor-parallel size."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to cut the work, and what is computed under it."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    first_stage: int | None = None
    last_stage: int | None = None
    recompute: str | None = None
    """``uniform`` or ``block`` (full), or modules joined by commas (selective)."""
    model: str = "moe"
    objective: str = "sapo"
    packing: bool = True
    fused: bool = False
    replay: bool = False
    """Experts are those of the samples' routes."""
    batch: str = "ragged"
    max_tokens: int = 48
    """Of a micro-batch, over all context-parallel ranks."""
    contract: str = "2-tuple"
    per_token_loss: bool = False

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def name(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "CP": self.cp, "EP": self.ep}
        sizes["DP"] = self.dp
        words = ["x".join(f"{key}{n}" for key, n in sizes.items() if n and n > 1) or "one rank"]
        words += [f"first stage {self.first_stage}"] if self.first_stage else []
        words += [f"last stage {self.last_stage}"] if self.last_stage else []
        words += [f"recompute {self.recompute}"] if self.recompute else []
        for f in ("model", "objective", "batch", "contract", "max_tokens"):
            value = getattr(self, f)
            words += [f"{f.replace('_', ' ')} {value}"] if value != getattr(Layout, f) else []
        words += ["per-token loss"] if self.per_token_loss else []
        words += [] if self.packing else ["padded"]
        words += ["fused"] if self.fused else []
        words += ["replay"] if self.replay else []
        return ", ".join(words)

    @property
    def parallel(self) -> ParallelConfig:
        full = self.recompute in ("uniform", "block")
        selective = self.recompute is not None and not full
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            num_layers_in_first_pipeline_stage=self.first_stage,
            num_layers_in_last_pipeline_stage=self.last_stage,
            recompute_granularity="full" if full else "selective" if selective else None,
            recompute_method=self.recompute if full else None,
            recompute_num_layers=1 if full else None,
            recompute_modules=tuple(self.recompute.split("+")) if selective else None,
        )


REPRESENTATIVE = (
    Layout(),
    Layout(world=8),
    Layout(world=2, tp=2, fused=True, objective="warm"),
    Layout(world=4, tp=4, model="tied"),
    Layout(world=2, pp=2, first_stage=1),
    Layout(world=2, pp=2, vpp=2, max_tokens=24),
    Layout(world=4, pp=2, vpp=2, model="tied", packing=False),
    Layout(world=4, cp=2, objective="gspo"),
    Layout(world=4, cp=4, objective="token-mean"),
    Layout(world=2, ep=2),
    Layout(world=4, ep=4, batch="few"),
    Layout(world=4, tp=2, cp=2),
    Layout(world=4, cp=2, pp=2, model="mixed"),
    Layout(world=4, tp=2, pp=2, ep=2),
    Layout(world=8, tp=2, pp=2, cp=2, ep=4, vpp=2, model="tied", fused=True),
    Layout(world=4, cp=2, ep=2, recompute="uniform"),
    Layout(world=2, tp=2, packing=False, recompute="layernorm+moe_act"),
    Layout(world=2, tp=2, model="dense", recompute="core_attn"),
    Layout(world=4, tp=2, contract="3-tuple", per_token_loss=True),
    Layout(world=4, tp=2, ep=2, objective="balanced", batch="same", max_tokens=16),
    Layout(replay=True, model="mixed"),
    Layout(world=4, tp=2, pp=2, ep=2, replay=True, recompute="uniform"),
    Layout(world=4, cp=2, pp=2, vpp=2, replay=True, max_tokens=24, recompute="moe"),
)
"""What an ordinary test run walks through, in fp64."""

NARROW = tuple(
    layout
    for layout in REPRESENTATIVE
    if layout.world == 8 or layout.contract == "3-tuple" or layout.replay and layout.vpp
)
"""What it walks through in fp32 as well."""

LAYOUTS = (
    *REPRESENTATIVE,
    Layout(max_tokens=21),
    Layout(max_tokens=256),
    Layout(batch="reversed"),
    Layout(packing=False),
    Layout(fused=True, objective="warm"),
    Layout(model="dense"),
    Layout(model="unnormed"),
    Layout(world=2, batch="few", max_tokens=21),
    Layout(world=2, tp=2),
    Layout(world=2, tp=2, packing=False),
    Layout(world=2, tp=2, packing=False, fused=True, model="dense"),
    Layout(world=4, tp=4, model="tied", fused=True),
    Layout(world=4, tp=2, objective="warm"),
    Layout(world=2, pp=2),
    Layout(world=2, pp=2, model="tied", packing=False),
    Layout(world=2, pp=2, last_stage=1, model="mixed"),
    Layout(world=4, pp=4, model="tied"),
    Layout(world=2, cp=2),
    Layout(world=4, cp=4, objective="gspo"),
    Layout(world=4, cp=2, objective="token-mean"),
    Layout(world=4, ep=2, packing=False),
    Layout(world=8, ep=8, batch="reversed"),
    Layout(world=4, tp=2, cp=2, fused=True, model="dense"),
    Layout(world=4, cp=2, pp=2),
    Layout(world=4, cp=2, pp=2, vpp=2, model="mixed"),
    Layout(world=4, tp=2, ep=4, model="unnormed"),
    Layout(world=8, tp=2, pp=2, ep=2),
    Layout(world=8, tp=2, pp=2, ep=4, vpp=2, model="mixed"),
    Layout(world=8, tp=2, cp=2, ep=8, objective="token-mean"),
    Layout(world=2, tp=2, recompute="uniform"),
    Layout(world=4, tp=2, pp=2, recompute="block", model="mixed"),
    Layout(world=2, tp=2, recompute="core_attn"),
    Layout(world=2, cp=2, recompute="core_attn"),
    Layout(world=2, pp=2, recompute="moe"),
    Layout(world=2, tp=2, model="dense", recompute="mlp"),
    Layout(world=8, tp=2, cp=2, contract="3-tuple"),
    Layout(world=8, tp=2, cp=2, per_token_loss=True),
    Layout(world=4, cp=2, contract="3-tuple", per_token_loss=True),
    Layout(world=4, pp=2, contract="3-tuple", per_token_loss=True, model="tied"),
    Layout(objective="balanced", batch="same", max_tokens=16),
    Layout(objective="balanced", batch="same", max_tokens=64),
    Layout(world=2, cp=2, objective="balanced", batch="same", max_tokens=16),
    Layout(world=4, pp=2, ep=2, objective="balanced", batch="same", max_tokens=16),
    Layout(world=4, objective="balanced", batch="same", max_tokens=16, contract="3-tuple"),
    Layout(
        world=4,
        tp=2,
        objective="balanced",
        batch="same",
        max_tokens=16,
        contract="3-tuple",
        per_token_loss=True,
    ),
    Layout(replay=True),
    Layout(world=2, tp=2, replay=True),
    Layout(world=2, tp=2, replay=True, packing=False),
    Layout(world=4, tp=2, ep=2, replay=True, recompute="moe"),
    Layout(world=2, pp=2, vpp=2, replay=True, model="mixed"),
    Layout(world=2, pp=2, replay=True, recompute="block", max_tokens=24),
    Layout(world=4, cp=4, replay=True, model="unnormed"),
    Layout(world=4, ep=4, replay=True, batch="few"),
    Layout(world=8, tp=2, pp=2, cp=2, ep=4, replay=True, fused=True),
)


OBJECTIVES: dict[str, tuple[AlgorithmConfig, reference.Objective]] = {
    "sapo": (AlgorithmConfig(), reference.Objective()),
    "token-mean": (
        AlgorithmConfig(loss_agg_mode="token-mean"),
        reference.Objective(aggregation="tokens"),
    ),
    "gspo": (
        AlgorithmConfig(loss_type="gspo", clip_ratio_low=0.5, clip_ratio_high=1.0),
        reference.Objective(loss="gspo", clip=(0.5, 1.0)),
    ),
    "warm": (
        AlgorithmConfig(tau_pos=2.0, tau_neg=3.0, entropy_coef=0.05),
        reference.Objective(tau_pos=2.0, tau_neg=3.0, entropy_coef=0.05, temperature=0.7),
    ),
    "balanced": (AlgorithmConfig(), reference.Objective(aux_loss_coeff=0.5)),
}
"""By name: the package's settings and the reference's for the same thing."""


def random_weights(arch: dict[str, Any], folder: Path, seed: int = 2) -> None:
    """A Hugging Face folder of random weights, larger than at initialisation.

    Attention and routing are then far from uniform, and no gradient is close to zero. Layers add
    half of what they could to the residual stream, which keeps fp32's rounding errors small. With
    some seeds the gradient of one expert all but cancels, and one rank in fp32 has a relative error
    of 2e-5 there; with this one it stays below 4e-6.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, size = arch["hidden_size"], arch["head_dim"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)

    def norm(width: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(width, generator=generator)

    def mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}gate_proj.weight": matrix(width, hidden),
            f"{prefix}up_proj.weight": matrix(width, hidden),
            f"{prefix}down_proj.weight": matrix(hidden, width, gain=0.5),
        }

    heads, groups = arch["num_attention_heads"], arch["num_key_value_heads"]
    embedding = 0.5 * torch.randn(arch["vocab_size"], hidden, generator=generator)
    weights = {"model.embed_tokens.weight": embedding}
    for i in range(arch["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = norm(hidden)
        for name, count in (("q", heads), ("k", groups), ("v", groups)):
            weights[f"{layer}self_attn.{name}_proj.weight"] = matrix(count * size, hidden)
        for name in "qk":
            weights[f"{layer}self_attn.{name}_norm.weight"] = norm(size)
        weights[f"{layer}self_attn.o_proj.weight"] = matrix(hidden, heads * size, gain=0.5)
        if "num_experts" not in arch or i in arch["mlp_only_layers"]:
            weights |= mlp(f"{layer}mlp.", arch["intermediate_size"])
            continue
        weights[f"{layer}mlp.gate.weight"] = matrix(arch["num_experts"], hidden, gain=2.0)
        for expert in range(arch["num_experts"]):
            weights |= mlp(f"{layer}mlp.experts.{expert}.", arch["moe_intermediate_size"])
    weights["model.norm.weight"] = norm(hidden)
    if arch["tie_word_embeddings"]:
        weights["model.norm.weight"] *= 2 / math.sqrt(hidden)  # the embedding is too large a head
    else:
        weights["lm_head.weight"] = matrix(arch["vocab_size"], hidden)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(arch))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sequences(kind: str) -> list[reference.Sequence]:
    """The mini-batch of a test. Numbers that fp32 holds exactly, so that every dtype sees the same.

    ``ragged``: three groups; the second has advantages of zero, one response of the third is empty.
    ``reversed``: the same in another order. ``few``: the first two, fewer than ranks. ``same``:
    eight copies of one sequence whose length divides by every layout's sizes, for losses that are
    defined on a micro-batch.
    """
    rng = random.Random(5)

    def sequence(prompt: int, response: int, advantage: float) -> reference.Sequence:
        return reference.Sequence(
            prompt=tuple(rng.randrange(61) for _ in range(prompt)),
            response=tuple(rng.randrange(61) for _ in range(response)),
            # Far from what the model gives (ratios of about 0.1 to 30): the gate acts.
            old_logprobs=tuple(round(rng.gauss(-4.5, 0.7) * 1024) / 1024 for _ in range(response)),
            advantage=advantage,
        )

    if kind == "same":
        return [sequence(6, 11, 0.75)] * 8
    groups = [
        [sequence(5, 9, 1.25), sequence(5, 3, -0.75), sequence(5, 12, -0.5)],
        [sequence(9, 4, 0.0), sequence(9, 1, 0.0)],
        [sequence(2, 7, 0.875), sequence(2, 0, -0.875)],
    ]
    ragged = [s for group in groups for s in group]
    return {"ragged": ragged, "reversed": ragged[::-1], "few": ragged[:2]}[kind]


def mini_batch(layout: Layout) -> list[reference.Sequence]:
    """The mini-batch of a layout, with routes at random where it replays them.

    The seed is one with which the reference itself, in fp32, stays within 3e-6 of fp64: an expert
    whose only token has a ratio of 90 has a gradient that fp32 cannot hold.
    """
    batch = sequences(layout.batch)
    if not layout.replay:
        return batch
    arch, rng = MODELS[layout.model], random.Random(14)
    layers = arch["num_hidden_layers"] - len(arch["mlp_only_layers"])

    def experts() -> tuple[int, ...]:
        return tuple(rng.sample(range(arch["num_experts"]), arch["num_experts_per_tok"]))

    return [
        replace(
            s,
            routes=tuple(
                tuple(experts() for _ in range(layers))
                for _ in range(len(s.prompt) + len(s.response) - 1)
            ),
        )
        for s in batch
    ]


def samples(layout: Layout) -> list[Sample]:
    """The same mini-batch as the package takes it; old log-probs stand in for the rollout's."""
    return [
        Sample(
            uid=i,
            prompt_tokens=s.prompt,
            response_tokens=list(s.response),
            rollout_logprobs=list(s.old_logprobs),
            truncated=False,
            advantage=s.advantage,
            routes=s.routes and SampleRoutes(experts=np.array(s.routes, dtype=np.int16)),
        )
        for i, s in enumerate(mini_batch(layout))
    ]


def make_reference(layout: Layout, folder: Path) -> reference.Outcome:
    """What a layout has to reproduce: fp64, on the weights of ``folder``."""
    weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    objective = OBJECTIVES[layout.objective][1]
    return reference.evaluate(weights, MODELS[layout.model], mini_batch(layout), objective)


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
    seconds: float


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
    began = time.perf_counter()
    recipe = make_recipe(layout, folder, dtype)
    groups = parallel.setup(recipe.parallel, seed=1, timeout_s=TIMEOUT_S)
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
        seconds=time.perf_counter() - began,
    )


def _policy(recipe: Recipe, layout: Layout, groups: ParallelGroups, folder: Path) -> Policy:
    """A policy under the layout's loss contract, which is no setting of a recipe."""

    def config(*args: Any) -> TransformerConfig:
        return replace(transformer_config(*args), calculate_per_token_loss=layout.per_token_loss)

    with mock.patch.object(step, "transformer_config", config):
        return Policy(
            recipe,
            parse_architecture(MODELS[layout.model]),
            groups,
            folder,
            optimizer=recipe.optimizer,
            total_updates=1,
        )


def gradients_as_weights(policy: Policy) -> None:
    """Overwrite the weights with their gradients, whole on every rank.

    The distributed optimizer left each rank its shard of the reduced gradients, laid out as the
    weights are: what gathers weights after a step gathers these.
    """
    for chunk in policy.ddp:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.param_data.copy_(buffer.grad_data)
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


def walk(cases: Seq[tuple[Layout, str]], models: Path, out: Path) -> list[Measured | str]:
    """Measure the layouts one after the other on processes that were started once.

    Each layout gets a world of its own, made of the first processes; largest worlds come first, so
    that none waits for another. A failure is returned as text, and the walk goes on.
    """
    rank = dist.get_rank()
    assert [c[0].world for c in cases] == sorted((c[0].world for c in cases), reverse=True)
    # The world that started these processes: all have joined it before any leaves.
    dist.barrier()
    dist.destroy_process_group()
    results: list[Measured | str] = []
    for i, (layout, dtype) in enumerate(cases):
        if rank >= layout.world:
            break
        dist.init_process_group(
            "gloo",
            init_method=f"file://{out}/store{i}",
            rank=rank,
            world_size=layout.world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        try:
            results.append(measure(layout, dtype, models / layout.model, out / f"gradients{i}"))
        except Exception:
            results.append(traceback.format_exc())
            parallel.teardown()
        gc.collect()  # a model is full of cycles that hold its groups, and a group has threads
        dist.destroy_process_group()
    return results
