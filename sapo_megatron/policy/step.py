"""The trained policy: one optimizer step at a time, on megatron-core's distributed optimizer."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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
from torch import Tensor

from sapo_megatron.data.batch import MicroBatching, micro_batches
from sapo_megatron.errors import RunFailed
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.objective.reduce import megatron_loss
from sapo_megatron.policy.machine import host_threads
from sapo_megatron.policy.model import Forward, Model, forwards_of
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.recipe.schema import OptimizerConfig, Recipe
from sapo_megatron.sample import PackedBatch, Sample

logger = logging.getLogger(__name__)

LossFunction = Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, Metrics]]
"""(micro-batch, logprob [T], entropy [T]) -> (its part of the global loss, metrics)."""

Offload = Literal["gradients", "optimizer", "weights"]
"""What leaves a GPU, each with those before it."""

SEQUENCE_ESS = "ratio/sequence_ess"
"""The metric of a loss function that ``optimizer.ess_scaling`` goes by."""

MOST_SKIPPED = 16
"""Updates in a row that ``train.on_nonfinite: skip`` passes over before it gives up."""


class Policy:
    """A model with what trains it: DDP, distributed optimizer, learning-rate schedule.

    ``close`` it when it is done with, or use ``contextlib.closing``.
    """

    def __init__(
        self,
        recipe: Recipe,
        arch: Architecture,
        groups: ParallelGroups,
        folder: Path,
        *,
        optimizer: OptimizerConfig,
        total_updates: int,
        load: bool = True,
    ) -> None:
        """``folder``: the weights to start from; ``total_updates``: the length of the schedule;
        ``load`` as in :class:`Model`.

        Collective over all ranks. Raises UserError for weights that do not fit.
        """
        self.groups = groups
        self.model = Model(recipe, arch, groups, folder, load=load)
        self._most_skipped = MOST_SKIPPED if recipe.train.on_nonfinite == "skip" else 0
        self._skipped = 0
        self._ess_scaling = optimizer.ess_scaling
        config = self.model.config
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=recipe.model.params_dtype == "bfloat16",
        )
        self.ddp = [
            DistributedDataParallel(
                config, ddp, chunk, disable_bucketing=i > 0, pg_collection=groups.megatron
            )
            for i, chunk in enumerate(self.model.chunks)
        ]
        config.finalize_model_grads_func = finalize_model_grads
        settings = _optimizer_config(optimizer, config.params_dtype, bf16=config.bf16)
        if settings.optimizer_cpu_offload:
            torch.set_num_threads(host_threads())  # torchrun leaves one, which Adam waits for
        self.optimizer = get_megatron_optimizer(settings, self.ddp, use_gloo_process_groups=False)
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

    @contextmanager
    def aside(self, what: Offload) -> Iterator[Callable[[], None]]:
        """Leave this rank's GPU to others for a while: yields the call that does.

        Gradients are freed, the optimizer's state and weights wait in host memory; all are back
        behind the block, zero gradients among them. Collective over all ranks: the call ends when
        all have left, and the block when all are through it, or at once where all raise.
        """
        on_gpu = self.groups.device.type == "cuda"
        buffers = [b for ddp in self.ddp for b in [*ddp.buffers, *ddp.expert_parallel_buffers]]

        def leave() -> None:
            for ddp in self.ddp:
                ddp.offload_grad_buffers(synchronize=on_gpu, empty_cache=on_gpu)
            if what != "gradients":
                self.optimizer.offload_to_cpu()
            if what == "weights":
                for buffer in buffers:
                    buffer.offload_to_cpu(move_params=True, move_grads=False)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            # Over the world: the servers of no rank wake before all GPUs are free.
            dist.barrier(self.groups.world)

        try:
            yield leave
            # Over the world: no rank trains before the servers of all sleep.
            dist.barrier(self.groups.world)
        finally:
            if what == "weights":
                for buffer in buffers:
                    buffer.reload_from_cpu(move_params=True, move_grads=False)
            if what != "gradients":
                self.optimizer.restore_from_cpu()
            for ddp in self.ddp:
                ddp.restore_grad_buffers(synchronize=on_gpu)

    @torch.no_grad()
    def logprobs(self, samples: Sequence[Sample], cut: MicroBatching) -> tuple[float, ...]:
        """Log-probs at temperature 1 of all response tokens, by uid, on every rank. Collective."""
        batches = [batch.to(self.groups.device) for batch in micro_batches(samples, cut)]
        with self.model.at_temperature(1.0):
            forwards = self.model.forward(batches)
        mine: dict[tuple[int, int], float] = {}
        if self.groups.is_leader:
            for batch, forward in zip(batches, forwards, strict=True):
                assert forward.logprob is not None, "the leader is on the last stage"
                rows = batch.sequence_ids[batch.mask].tolist()
                places = zip(
                    (batch.sample_uids[row] for row in rows),
                    batch.position_ids[batch.mask].tolist(),
                    strict=True,
                )
                mine.update(zip(places, forward.logprob[batch.mask].tolist(), strict=True))
        found: list[Any] = [None] * dist.get_world_size()
        # Over the world: each leader brings the sequences, or pieces of them, that it worked on.
        dist.all_gather_object(found, mine, group=self.groups.world)
        whole = {place: value for part in found for place, value in part.items()}
        assert len(whole) == sum(len(s.response_tokens) for s in samples), "uids differ"
        return tuple(value for _, value in sorted(whole.items()))

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

        With ``optimizer.ess_scaling``, ``loss`` reports ``SEQUENCE_ESS``, which makes the step
        smaller. Returns this rank's metrics: those of ``loss`` where the loss was computed and, on
        the leader of each model-parallel block, the gradient norm (before clipping) and learning
        rate; and what the weights before the step gave, with ``replay`` and ``record`` as in
        :meth:`Model.forward`. A NaN or inf in loss or gradient leaves weights, optimizer and
        schedule as they are and is counted in ``actor/skipped_updates`` (there are no forward
        passes then), or raises RunFailed, as the recipe says; so do more than ``MOST_SKIPPED`` in a
        row.
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
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped > self._most_skipped:
            times = f", as in the {MOST_SKIPPED} updates before" if self._most_skipped else ""
            or_skip = "" if self._most_skipped else ", or set train.on_nonfinite=skip"
            raise RunFailed(
                f"{where}: {skipped} is not finite{times}; the weights are those before this "
                f"update (lower optimizer.lr, or look at the ratio metrics{or_skip})"
            )
        if skipped:
            logger.warning("%s: %s is not finite; the update is skipped", where, skipped)
            metrics, forwards = Metrics(), []
        else:
            if self._ess_scaling:
                self._scale_lr(metrics)
            lr = self.optimizer.param_groups[0]["lr"]
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(increment=1)  # which sets learning rates anew, scaled or not
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

        ``contract`` puts a micro-batch's part of the loss into the form that Megatron's schedule
        takes; ``replay`` and ``record`` as in :meth:`Model.forward`. Returns what ``loss``
        reported, on the last stage, and the forward passes. Collective over all ranks.
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
                    calculate_per_token_loss=self.model.config.calculate_per_token_loss,
                )

            return compute

        reports, routes = self.model.run(
            batches, loss_function, models=self.ddp, train=True, replay=replay, record=record
        )
        return reports, forwards_of(logprobs, routes, batches)

    def close(self) -> None:
        """Let go of the model; without this, weights and gradients outlive the policy.

        Expert layers keep tensors of the last forward, whose graph ends in DDP's gradient hooks,
        which refer back to the model: a cycle that Python's garbage collector does not see.
        """
        for chunk in self.ddp:
            vars(chunk).clear()
        self.ddp.clear()

    def _scale_lr(self, metrics: Metrics) -> None:
        """Multiply this step's learning rates by sqrt(ESS / B); by 1 without any sequence."""
        mine = Metrics()
        if self.groups.is_leader:
            mine.add(SEQUENCE_ESS, metrics[SEQUENCE_ESS])
        # Over the world: leaders bring their sequences, and every rank has parameters to update.
        share = mine.gather(self.groups.world)[SEQUENCE_ESS].value()
        for group in self.optimizer.param_groups:
            group["lr"] *= math.sqrt(share) if share > 0 else 1.0

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


def _optimizer_config(
    optimizer: OptimizerConfig, params_dtype: torch.dtype, *, bf16: bool
) -> MegatronOptimizerConfig:
    offloaded = optimizer.optimizer_offload_fraction > 0
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        params_dtype=params_dtype,
        bf16=bf16,
        use_distributed_optimizer=True,
        optimizer_cpu_offload=offloaded,
        optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=offloaded,
        # Upstream's optimizer in host memory takes gradients in no other way.
        use_precision_aware_optimizer=offloaded,
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
