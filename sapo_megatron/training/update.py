"""What trains: log-probs of the old policy, and one update at a time.

Public methods are collective over all ranks.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from torch import Tensor

from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.advantage import group_advantages
from sapo_megatron.objective.correction import mismatch_metrics
from sapo_megatron.objective.loss import policy_loss, sequence_ess
from sapo_megatron.policy.model import Model
from sapo_megatron.policy.step import SEQUENCE_ESS, Policy
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.collect import rewards
from sapo_megatron.sample import Denominators, Group, PackedBatch
from sapo_megatron.training.observe import Observer, old_experts


def set_advantages(groups: Sequence[Group], estimator: str) -> None:
    """The advantage of every sample, from the rewards of its group; 0 where it is alone there."""
    for group in groups:
        row = [0.0] * len(group.samples)
        if len(group.samples) > 1:
            row = group_advantages(rewards(group.samples).unsqueeze(0), estimator)[0].tolist()
        for sample, advantage in zip(group.samples, row, strict=True):
            sample.advantage = advantage


class Updater:
    """Makes the updates of a step, with the experts that the recipe wants replayed."""

    def __init__(
        self, recipe: Recipe, policy: Policy, reference: Model | None, observer: Observer | None
    ) -> None:
        """``reference``: the frozen model of a KL penalty; ``observer``: who is shown each pass."""
        self._recipe = recipe
        self._policy = policy
        self._reference = reference
        self._observer = observer
        self._mode = recipe.routing.router_replay
        self._has_experts = bool(policy.model.routers.moe_layers)

    def old_logprobs(
        self, mini_batches: Sequence[Sequence[PackedBatch]], *, step: int
    ) -> tuple[list[list[PackedBatch]], Metrics]:
        """The micro-batches with what the policies before the first update say of them.

        Those are the old policy, in the training engine with the packing of the updates, so that
        ratios start at 1, or in the engine that sampled; and the reference. Raises UserError for
        routes of the rollout engine that do not fit, or are missing where R3 needs them.
        """
        batches = [batch for part in mini_batches for batch in part]
        if self._recipe.algorithm.old_policy == "recompute":
            filled, metrics = self._recomputed(batches, step)
        else:
            filled, metrics = [self._as_sampled(batch) for batch in batches], Metrics()
        if self._reference:
            frozen = self._reference.forward(batches)
            filled = [
                dataclasses.replace(batch, ref_logprob=forward.logprob)
                for batch, forward in zip(filled, frozen, strict=True)
            ]
        rest = iter(filled)
        return [list(itertools.islice(rest, len(part))) for part in mini_batches], metrics

    def _recomputed(
        self, batches: Sequence[PackedBatch], step: int
    ) -> tuple[list[PackedBatch], Metrics]:
        """With the policy that the step starts from, and how far the one that sampled is off."""
        model, observed = self._policy.model, self._observer is not None
        replay = None
        if self._has_experts and self._mode == "R3":
            replay = [model.view.rollout_routes(batch).experts for batch in batches]
        record = observed or self._mode == "R2"
        forwards = model.forward(batches, replay=replay, record=record)
        metrics = Metrics()
        filled = []
        for i, (batch, forward) in enumerate(zip(batches, forwards, strict=True)):
            own = forward.routes.experts if forward.routes else None
            filled.append(
                dataclasses.replace(
                    batch,
                    old_logprob=forward.logprob,
                    old_routes=forward.routes,
                    old_experts=replay[i] if replay else own,
                )
            )
            if forward.logprob is not None and self._policy.groups.is_leader:
                metrics.update(mismatch_metrics(forward.logprob, batch.rollout_logprob, batch.mask))
        if self._observer:
            metrics.update(self._observer.rollout(filled, step=step))
        return filled, metrics

    def _as_sampled(self, batch: PackedBatch) -> PackedBatch:
        """With the rollout engine's policy, and its experts where somebody needs them."""
        routes = None
        if self._has_experts and (self._observer or self._mode == "R3"):
            routes = self._policy.model.view.rollout_routes(batch)
        return dataclasses.replace(
            batch,
            old_logprob=batch.rollout_logprob,
            old_routes=routes,
            old_experts=routes.experts if routes else None,
        )

    def update(
        self,
        batches: Sequence[PackedBatch],
        denominators: Denominators,
        *,
        step: int,
        mini_batch: int,
    ) -> Metrics:
        """One update on mini-batch number ``mini_batch`` (from 0) of ``step``."""
        recipe = self._recipe
        cp_group = self._policy.groups.cp

        def loss(batch: PackedBatch, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Metrics]:
            share, metrics = policy_loss(
                batch,
                logprob,
                entropy,
                algorithm=recipe.algorithm,
                denominators=denominators,
                max_response_length=recipe.rollout.max_response_length,
                correction=recipe.correction,
                cp_group=cp_group,
            )
            if recipe.optimizer.ess_scaling:
                metrics.add(SEQUENCE_ESS, sequence_ess(batch, logprob, cp_group))
            return share, metrics

        replay = self._replayed(batches)
        where = f"step {step}, mini-batch {mini_batch + 1} of {recipe.train.num_mini_batches}"
        if self._observer is None:
            return self._policy.update(batches, loss, where=where, replay=replay)[0]
        metrics = Metrics()
        probe = self._observer.before(batches, replay, step=step, mini_batch=mini_batch)
        updated, forwards = self._policy.update(
            batches, loss, where=where, replay=replay, record=True
        )
        metrics.update(updated)
        if forwards:
            found = self._observer.after(batches, forwards, probe, step=step, mini_batch=mini_batch)
            metrics.update(found)
        return metrics

    def _replayed(self, batches: Sequence[PackedBatch]) -> list[Tensor] | None:
        if not self._has_experts or self._mode == "disabled":
            return None
        return [old_experts(batch) for batch in batches]
