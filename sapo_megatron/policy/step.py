"""One optimizer step, and log-probs without one, on megatron-core's pipeline schedules."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sapo_megatron.data.batch import micro_batches
from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.objective.reduce import megatron_loss
from sapo_megatron.policy import weights
from sapo_megatron.policy.model import build_model
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.routers import ModelRouters, RouterView
from sapo_megatron.policy.spec import moe_layers, transformer_config
from sapo_megatron.recipe.schema import OptimizerConfig, Recipe
from sapo_megatron.sample import PackedBatch, Routes, Sample

logger = logging.getLogger(__name__)

LossFunction = Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, Metrics]]
"""(micro-batch, logprob [T], entropy [T]) -> (share of the global loss, metrics)."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What one rank has of a micro-batch's forward pass."""

    logprob: Tensor | None
    """[T] of the targets; None off the last stage."""
    routes: Routes | None = None
    """None where nothing was recorded, or this rank has no layer with experts."""


class FrozenPolicy:
    """A model that is only asked for log-probs: the reference of a KL penalty."""

    def __init__(
        self, recipe: Recipe, arch: Architecture, groups: ParallelGroups, folder: Path
    ) -> None:
        self.groups = groups
        self.config = transformer_config(arch, recipe.model, recipe.parallel)
        self.chunks = build_model(arch, self.config, groups, recipe)
        self.checkpoint = weights.HuggingFaceWeights(self.chunks, arch, groups, folder)
        self.checkpoint.load()
        self.routers = ModelRouters(self.chunks, self.config, moe_layers(self.config))
        self.view = RouterView(
            routers=self.routers, groups=groups, prob_every=recipe.routing.prob_every
        )

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[PackedBatch],
        *,
        replay: Sequence[Tensor] | None = None,
        record: bool = False,
    ) -> list[Forward]:
        """Each micro-batch's log-probs and, with ``record``, routes. Collective over all ranks.

        ``replay`` has each micro-batch's experts ``[M, N, k]``, as in ``sample.Routes``.
        """

        def loss_function(batch: PackedBatch) -> Callable:
            return lambda output, non_loss_data: output[0].flatten()

        outputs, routes = self._run(batches, loss_function, replay=replay, record=record)
        return _forwards(outputs, routes, batches)

    def _run(
        self,
        batches: Sequence[PackedBatch],
        loss_function: Callable[[PackedBatch], Callable],
        *,
        train: bool = False,
        replay: Sequence[Tensor] | None = None,
        record: bool = False,
    ) -> tuple[list[Any], list[Routes]]:
        """Through the schedule: what ``loss_function(batch)`` reported, on the last stage; routes.

        Both in the order of the micro-batches; routes where ``record`` and there are experts.
        """

        def forward_step(iterator: Iterator[PackedBatch], model: Any) -> tuple[Any, Callable]:
            batch = next(iterator)
            rows = len(batch.lengths) if batch.padded else 1
            output = model(
                input_ids=batch.tokens.view(rows, -1),
                position_ids=batch.position_ids.view(rows, -1),
                attention_mask=None,
                labels=batch.targets.view(rows, -1),
                packed_seq_params=None if batch.padded else _packed_seq_params(batch),
            )
            return output, loss_function(batch)

        def kept_rows(number: int) -> Tensor:
            return self.view.kept_rows(batches[number])

        models = self._models()
        keep = kept_rows if self.view.prob_every else None
        with self.routers.watching(replay=replay, record=record, keep=keep) as routes:
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in models],
                model=models,
                num_microbatches=len(batches),
                seq_length=len(batches[0].tokens) * self.groups.cp.size(),
                micro_batch_size=1,
                forward_only=not train,
                collect_non_loss_data=not train,
            )
        return outputs, routes

    def _models(self) -> list[Any]:
        return list(self.chunks)


class Policy(FrozenPolicy):
    """The trained model on this rank: DDP, distributed optimizer, learning-rate schedule."""

    def __init__(
        self,
        recipe: Recipe,
        arch: Architecture,
        groups: ParallelGroups,
        folder: Path,
        *,
        optimizer: OptimizerConfig,
        total_updates: int,
    ) -> None:
        offloaded = optimizer.optimizer_offload_fraction > 0
        if offloaded and groups.device.type == "cpu":
            raise UserError(
                f"optimizer.optimizer_offload_fraction: expected 0 without a GPU to offload from, "
                f"got {optimizer.optimizer_offload_fraction:g}; remove it"
            )
        super().__init__(recipe, arch, groups, folder)
        self.on_nonfinite = recipe.train.on_nonfinite
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=recipe.model.params_dtype == "bfloat16",
        )
        self.ddp = [
            DistributedDataParallel(
                self.config, ddp, chunk, disable_bucketing=i > 0, pg_collection=groups.megatron
            )
            for i, chunk in enumerate(self.chunks)
        ]
        self.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=optimizer.min_lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.adam_beta1,
                adam_beta2=optimizer.adam_beta2,
                adam_eps=optimizer.adam_eps,
                clip_grad=optimizer.clip_grad,
                params_dtype=self.config.params_dtype,
                bf16=self.config.bf16,
                use_distributed_optimizer=True,
                optimizer_cpu_offload=offloaded,
                optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
                # Upstream's optimizer in host memory takes gradients in no other way.
                use_precision_aware_optimizer=offloaded,
            ),
            self.ddp,
        )
        _allocate_state(self.optimizer)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=optimizer.lr_warmup_steps,
            lr_decay_steps=max(total_updates, optimizer.lr_warmup_steps + 1),
            lr_decay_style=optimizer.lr_decay_style,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    @property
    def updates(self) -> int:
        """Optimizer steps behind the weights, those before a resume included."""
        return self.scheduler.num_steps

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int], layout: dict[str, Any]) -> tuple[float, ...]:
        """Log-probs of ``tokens[1:]`` at temperature 1, on every rank. Collective over all ranks.

        ``layout`` as ``batch.micro_batches`` takes it.
        """
        sample = Sample(
            uid=0,
            prompt_tokens=tuple(tokens[:1]),
            response_tokens=list(tokens[1:]),
            rollout_logprobs=[0.0] * (len(tokens) - 1),
            truncated=True,
        )
        temperature = self.chunks[-1].temperature
        self.chunks[-1].temperature = 1.0
        batches = [
            batch.to(self.groups.device)
            for batch in micro_batches([sample] * self.groups.dp.size(), **layout)
        ]
        forwards = self.forward(batches)
        self.chunks[-1].temperature = temperature
        mine: dict[int, float] = {}
        if self.groups.is_leader:
            for batch, forward in zip(batches, forwards, strict=True):
                places = batch.position_ids[batch.mask].tolist()
                mine.update(zip(places, forward.logprob[batch.mask].tolist(), strict=True))
        found: list[Any] = [None] * dist.get_world_size()
        # Over the world: context-parallel ranks bring their pieces, data-parallel ones the same.
        dist.all_gather_object(found, mine, group=self.groups.world)
        whole = {place: value for part in found for place, value in part.items()}
        return tuple(whole[place] for place in range(len(tokens) - 1))

    def update(
        self,
        batches: Sequence[PackedBatch],
        loss: LossFunction,
        *,
        where: str,
        replay: Sequence[Tensor] | None = None,
        record: bool = False,
    ) -> tuple[Metrics, list[Forward]]:
        """One optimizer step on a mini-batch, ``where`` in messages. Collective over all ranks.

        Returns this rank's metrics: those of ``loss`` where the loss was computed and, on the
        leader of each model-parallel block, the gradient norm (before clipping) and learning rate;
        and what the weights before the step gave, with ``replay`` and ``record`` as in
        :meth:`forward`. A NaN or inf in loss or gradient leaves weights, optimizer and schedule as
        they are and is counted in ``actor/skipped_updates`` (there are no forward passes then),
        or raises RunFailed, as the recipe says.
        """
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports, forwards = self.backward(batches, loss, replay=replay, record=record)
        metrics = Metrics()
        if self.groups.is_leader:
            for report in reports:
                metrics.update(report)
            metrics.average_sums(1 / self.groups.dp_cp.size())
        skipped = self._nonfinite(metrics)
        if skipped and self.on_nonfinite == "abort":
            raise RunFailed(
                f"{where}: {skipped} is not finite; the weights are those before this update "
                f"(lower optimizer.lr, look at the ratio metrics, or set train.on_nonfinite=skip)"
            )
        if skipped:
            logger.warning("%s: %s is not finite; the update is skipped", where, skipped)
            metrics, forwards = Metrics(), []
        else:
            lr = self.optimizer.param_groups[0]["lr"]
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(increment=1)
        if self.groups.is_leader:
            metrics.add("actor/skipped_updates", Mean(float(bool(skipped)), 1.0))
            if not skipped:
                metrics.add("actor/grad_norm", Mean(float(grad_norm), 1.0))
                metrics.add("actor/lr", Mean(lr, 1.0))
        return metrics, forwards

    def backward(
        self,
        batches: Sequence[PackedBatch],
        loss: LossFunction,
        *,
        contract: Callable[..., Any] = megatron_loss,
        replay: Sequence[Tensor] | None = None,
        record: bool = False,
    ) -> tuple[list[Metrics], list[Forward]]:
        """Gradients of the mini-batch's global loss into DDP's buffers, reduced and final.

        ``contract`` puts a micro-batch's share of the loss into the form that Megatron's schedule
        takes; ``replay`` and ``record`` as in :meth:`forward`. Returns what ``loss`` reported, on
        the last stage, and the forward passes. Collective over all ranks.
        """
        logprobs: list[Tensor] = []

        def loss_function(batch: PackedBatch) -> Callable:
            def compute(output: Tensor) -> tuple[Tensor, Metrics]:
                logprob, entropy = output.flatten(1)
                logprobs.append(logprob.detach())
                loss_sum, metrics = loss(batch, logprob, entropy)
                return contract(
                    loss_sum,
                    metrics,
                    num_microbatches=len(batches),
                    dp_size=self.groups.dp.size(),
                    cp_size=self.groups.cp.size(),
                    calculate_per_token_loss=self.config.calculate_per_token_loss,
                )

            return compute

        reports, routes = self._run(
            batches, loss_function, train=True, replay=replay, record=record
        )
        return reports, _forwards(logprobs, routes, batches)

    def close(self) -> None:
        """Let go of the model; without this, weights and gradients outlive the policy.

        Expert layers keep tensors of the last forward, whose graph ends in DDP's gradient hooks,
        which refer back to the model: a cycle that Python's garbage collector does not see.
        """
        for chunk in self.ddp:
            vars(chunk).clear()
        self.ddp.clear()

    def _models(self) -> list[Any]:
        return list(self.ddp)

    def _nonfinite(self, metrics: Metrics) -> str | None:
        """The first of loss and gradient that is not finite on any rank, or None."""
        loss = metrics.finite("actor/pg_loss")
        gradients = all(
            bool(torch.isfinite(buffer.grad_data.sum()))
            for chunk in self.ddp
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        )
        bad = torch.tensor([not loss, not gradients], dtype=torch.uint8)
        # Over the world: either every rank takes the step or none does.
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self.groups.world)
        names = ("actor/pg_loss", "actor/grad_norm")
        return next((name for name, flag in zip(names, bad.tolist(), strict=True) if flag), None)


def _forwards(
    logprobs: Sequence[Tensor], routes: Sequence[Routes], batches: Sequence[PackedBatch]
) -> list[Forward]:
    """By micro-batch; a rank may have neither the log-probs nor the routes."""
    return [
        Forward(logprob=logprob, routes=route)
        for _, logprob, route in itertools.zip_longest(batches, logprobs, routes)
    ]


def _packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def _allocate_state(optimizer: MegatronOptimizer) -> None:
    """Adam's moments, which torch would make at the first step; a checkpoint needs them before."""
    for part in optimizer.chained_optimizers:
        if part.init_state_fn is None:  # partly in host memory: upstream makes them as it loads
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
