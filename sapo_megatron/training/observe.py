"""Old log-probs and updates, with the routers watched and told what to choose.

Compared are the rollout with the training engine (``rollout_train/*``), and the old with the
current policy (``routing/*``, ``variance/*``, ``sapo/bound_*``). Public methods are collective over
all ranks.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.metrics import Max, Metrics
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.correction import mismatch_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.policy.step import Forward, LossFunction, Policy
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.routing.divergence import compare, load_metrics, token_metrics
from sapo_megatron.routing.variance import split_metrics
from sapo_megatron.runs.dump import DumpInfo, DumpRows, write_dump
from sapo_megatron.sample import PackedBatch, Routes


class RouterWatch:
    """The passes of a step over its micro-batches."""

    def __init__(self, recipe: Recipe, policy: Policy, dumps: Path) -> None:
        self.recipe = recipe
        self.policy = policy
        self.groups = policy.groups
        self.routers = policy.routers
        self.view = policy.view
        self.dumps = dumps
        self.mode = recipe.routing.router_replay
        self.has_experts = bool(self.routers.moe_layers)

    def set_old_logprobs(self, batches: Sequence[PackedBatch]) -> Metrics:
        """``old_logprob`` and ``old_routes``, from the training engine before the first update.

        With the packing of the updates, so that ratios start at 1. Raises UserError for routes of
        the rollout engine that do not fit, or are missing where R3 needs them.
        """
        # Every rank of a model-parallel block has the same samples, so all of it goes one way.
        routed = any(batch.rollout_experts is not None for batch in batches)
        compared = self.has_experts and (routed or self.mode == "R3")
        rollout = [self.view.rollout_routes(batch) for batch in batches] if compared else []
        replay = [routes.experts for routes in rollout] if self.mode == "R3" else None
        forwards = self.policy.forward(batches, replay=replay, record=True)
        metrics = Metrics()
        for batch, forward in zip(batches, forwards, strict=True):
            batch.old_logprob, batch.old_routes = forward.logprob, forward.routes
            if self.groups.is_leader:
                metrics.update(
                    mismatch_metrics(batch.old_logprob, batch.rollout_logprob, batch.mask)
                )
        if compared:
            old = [batch.old_routes for batch in batches]
            found, _ = self._divergence(batches, rollout, old, "rollout_train")
            metrics.update(found)
        return metrics

    def update(
        self,
        batches: Sequence[PackedBatch],
        loss: LossFunction,
        *,
        step: int,
        mini_batch: int,
        where: str,
    ) -> Metrics:
        """One update on mini-batch number ``mini_batch`` (from 0) of ``step``."""
        number = (step - 1) * self.recipe.train.num_mini_batches + mini_batch + 1
        replay = None
        if self.has_experts and self.mode != "disabled":
            replay = self._old_experts(batches)
        metrics = Metrics()
        probe = None
        if _due(number, self.recipe.routing.decompose_every):
            began = time.monotonic()
            probe = self._probe(batches, replay)
            metrics.add("perf/decompose_s", Max(time.monotonic() - began))
        updated, forwards = self.policy.update(
            batches, loss, where=where, replay=replay, record=True
        )
        metrics.update(updated)
        if not forwards:
            return metrics

        old = [batch.old_routes for batch in batches]
        divergence, flipped = self._divergence(
            batches, old, [f.routes for f in forwards], "routing"
        )
        metrics.update(divergence)
        for batch, forward in zip(batches, forwards, strict=True):
            metrics.update(self._load(batch, forward))
            if self.groups.is_leader:
                metrics.update(self._bound(batch, forward))
        if probe:
            metrics.update(self._split(batches, forwards, probe, flipped))
        if _due(number, self.recipe.logging.dump_every) and self.groups.is_leader:
            self._dump(batches, forwards, flipped, step=step, mini_batch=mini_batch)
        return metrics

    def _old_experts(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """The experts that ``old_logprob`` was computed with."""
        if self.mode == "R3":
            return [self.view.rollout_routes(batch).experts for batch in batches]
        return [
            # A stage without experts has nothing to replay.
            batch.old_routes.experts if batch.old_routes else batch.tokens.new_empty(0)
            for batch in batches
        ]

    def _divergence(
        self,
        batches: Sequence[PackedBatch],
        old: Sequence[Routes | None],
        new: Sequence[Routes | None],
        prefix: str,
    ) -> tuple[Metrics, list[Tensor | None]]:
        """Metrics of this rank, and of each micro-batch the layers that changed: int [T]."""
        if not self.has_experts:
            return Metrics(), [None] * len(batches)
        metrics = Metrics()
        # Row 0: layers that changed; row 1: the shift, at tokens whose probabilities are kept.
        sums = [torch.zeros(2, len(b.tokens), device=b.tokens.device) for b in batches]
        for batch, was, now, total in zip(batches, old, new, sums, strict=True):
            if now is None:
                continue
            rows, kept = self.view.rows(batch), self.view.kept_rows(batch)
            found = compare(
                was,
                now,
                layers=self.routers.layers,
                mask=batch.mask[rows],
                kept=kept,
                prefix=prefix,
            )
            metrics.update(found.metrics)
            total[0, rows] = found.layers_flipped.float()
            if found.shift is not None:
                total[1, rows[kept]] = found.shift
        # The same answer on every rank of the block: all hold the same samples.
        with_shift = self.view.prob_every > 0 and (
            prefix == "routing" or any(b.rollout_probs is not None for b in batches)
        )
        whole = torch.cat(sums, dim=1)
        # Model-parallel block: its stages have the layers, its tensor-parallel ranks the tokens,
        # of the same micro-batches.
        dist.all_reduce(whole, group=self.groups.megatron.mp)
        parts = whole.split([len(b.tokens) for b in batches], dim=1)
        if self.groups.is_leader:
            for batch, (flipped, shift) in zip(batches, parts, strict=True):
                kept = self.view.kept_tokens(batch)
                metrics.update(
                    token_metrics(
                        flipped,
                        batch.mask,
                        shift[kept] if with_shift else None,
                        num_layers=len(self.routers.moe_layers),
                        prefix=prefix,
                    )
                )
        return metrics, [flipped.int() for flipped, _ in parts]

    def _load(self, batch: PackedBatch, forward: Forward) -> Metrics:
        if forward.routes is None:
            return Metrics()
        return load_metrics(
            forward.routes,
            layers=self.routers.layers,
            places=self.routers.places,
            num_layers=len(self.routers.moe_layers),
            num_experts=self.routers.num_experts,
            mask=batch.mask[self.view.rows(batch)],
            prefix="routing",
        )

    def _bound(self, batch: PackedBatch, forward: Forward) -> Metrics:
        return bound_metrics(
            Ratio.of(forward.logprob - batch.old_logprob, batch.advantages, batch.mask),
            self.recipe.algorithm.temperatures,
            batch.sequence_ids,
            batch.lengths,
            self.groups.cp,
        )

    def _probe(
        self, batches: Sequence[PackedBatch], replay: list[Tensor] | None
    ) -> tuple[list[Forward], list[Forward]]:
        """The update's own forward once more; and the one that it is not, free or replayed."""
        again = self.policy.forward(batches, replay=replay)
        if not self.has_experts:
            return again, again
        other = self._old_experts(batches) if replay is None else None
        return again, self.policy.forward(batches, replay=other, record=True)

    def _split(
        self,
        batches: Sequence[PackedBatch],
        forwards: Sequence[Forward],
        probe: tuple[list[Forward], list[Forward]],
        flipped: Sequence[Tensor | None],
    ) -> Metrics:
        again, other = probe
        free, replayed = forwards, forwards
        if self.has_experts and self.mode == "disabled":
            replayed = other
        elif self.has_experts:
            free = other
            old = [batch.old_routes for batch in batches]
            _, flipped = self._divergence(batches, old, [f.routes for f in other], "routing")
        metrics = Metrics()
        if not self.groups.is_leader:
            return metrics
        for batch, own, at_theirs, at_old, twice, layers in zip(
            batches, forwards, free, replayed, again, flipped, strict=True
        ):
            metrics.update(
                split_metrics(
                    at_theirs.logprob.double() - batch.old_logprob.double(),
                    at_old.logprob.double() - batch.old_logprob.double(),
                    batch.mask,
                    layers_flipped=layers,
                    num_layers=len(self.routers.moe_layers),
                    repeated=twice.logprob - own.logprob,
                )
            )
        return metrics

    def _dump(
        self,
        batches: Sequence[PackedBatch],
        forwards: Sequence[Forward],
        flipped: Sequence[Tensor | None],
        *,
        step: int,
        mini_batch: int,
    ) -> None:
        algorithm = self.recipe.algorithm
        rows = DumpRows.cat(
            DumpRows.of(batch, forward.logprob, layers)
            for batch, forward, layers in zip(batches, forwards, flipped, strict=True)
        )
        info = DumpInfo(
            step=step,
            update=mini_batch,
            loss_type=algorithm.loss_type,
            tau_pos=algorithm.tau_pos,
            tau_neg=algorithm.tau_neg,
            loss_agg_mode=algorithm.loss_agg_mode,
        )
        name = f"step-{step:06d}-update-{mini_batch}-rank-{dist.get_rank()}.parquet"
        write_dump(self.dumps / name, rows, info)


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
