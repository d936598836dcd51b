"""What is seen of the routers and of the ratios' variance; nothing here changes the policy.

Compared are the rollout with the training engine (``rollout_train/*``), and the old with the
current policy (``routing/*``, ``variance/*``, ``sapo/bound_*``). Public methods are collective over
all ranks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.metrics import Max, Metrics, Variance
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.correction import mismatch_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.policy.model import Forward, Model
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.routing.divergence import compare, load_metrics, token_metrics
from sapo_megatron.routing.variance import (
    Swaps,
    context_flipped,
    other_order_metrics,
    split_metrics,
)
from sapo_megatron.runs.dump import DumpInfo, DumpRows, write_dump
from sapo_megatron.sample import PackedBatch, Routes

BOTH_ORDERS = 8
"""Splits of updates from one that is made in both orders to the next."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Forward passes with the weights of before an update."""

    again: list[Forward]
    """The update's own pass once more."""
    other: list[Forward]
    """The pass that the update is not: at the old policy's experts, or at the routers' own."""
    seconds: float


class Observer:
    """Looks at batches and forward passes, and says what it saw."""

    def __init__(self, recipe: Recipe, model: Model, dumps: Path) -> None:
        """``model``: the trained one; ``dumps``: where token dumps are written."""
        self._recipe = recipe
        self._model = model
        self._groups = model.groups
        self._routers = model.routers
        self._view = model.view
        self._dumps = dumps
        self._has_experts = bool(model.routers.moe_layers)
        self._old_weights: list[Tensor] = []
        """Of the policy before a step's updates, where one of them is split in both orders."""

    def rollout(self, batches: Sequence[PackedBatch], *, step: int) -> Metrics:
        """The rollout engine's routes against the training engine's; none where it gave none.

        ``batches`` of a whole step with ``old_routes``, before its updates. Every so many steps one
        more forward pass splits the difference of the engines' log-probs. Raises UserError for
        routes that do not fit the model.
        """
        updates = range(self._recipe.train.num_mini_batches)
        self._old_weights = []
        if self._has_experts and any(self._in_both_orders(step, i) for i in updates):
            self._old_weights = [p.detach().to("cpu", copy=True) for p in self._parameters()]
        # Every rank of a model-parallel block has the same samples, so all of it goes one way.
        routed = any(batch.rollout_experts is not None for batch in batches)
        if not (self._has_experts and routed):
            return Metrics()
        rollout = [self._view.rollout_routes(batch) for batch in batches]
        old = [batch.old_routes for batch in batches]
        metrics, flipped = self._divergence(batches, rollout, old, "rollout_train")
        if due(step, self._recipe.routing.decompose_every):
            metrics.update(self._split_engines(batches, rollout, flipped))
        return metrics

    def before(
        self,
        batches: Sequence[PackedBatch],
        replay: Sequence[Tensor] | None,
        *,
        step: int,
        mini_batch: int,
    ) -> Probe | None:
        """The passes that split the variance of the coming update, every so many updates.

        ``replay``: the experts that the update will use, None for its routers' own.
        """
        if not due(self._number(step, mini_batch), self._recipe.routing.decompose_every):
            return None
        began = time.monotonic()
        again = other = self._model.forward(batches, replay=replay)
        if self._has_experts:
            experts = [old_experts(batch) for batch in batches] if replay is None else None
            other = self._model.forward(batches, replay=experts, record=True)
        return Probe(again=again, other=other, seconds=time.monotonic() - began)

    def after(
        self,
        batches: Sequence[PackedBatch],
        forwards: Sequence[Forward],
        probe: Probe | None,
        *,
        step: int,
        mini_batch: int,
    ) -> Metrics:
        """What an update's passes show; ``forwards`` recorded, ``probe`` of :meth:`before`."""
        metrics, flipped = self._divergence(
            batches, [b.old_routes for b in batches], [f.routes for f in forwards], "routing"
        )
        for batch, forward in zip(batches, forwards, strict=True):
            metrics.update(self._load(batch, forward))
            if self._groups.is_leader:
                metrics.update(self._bound(batch, forward))
        if probe:
            metrics.add("perf/decompose_s", Max(probe.seconds))
            both = self._in_both_orders(step, mini_batch)
            metrics.update(self._split(batches, forwards, probe, flipped, both_orders=both))
        number = self._number(step, mini_batch)
        if due(number, self._recipe.logging.dump_every) and self._groups.is_leader:
            self._dump(batches, forwards, flipped, step=step, mini_batch=mini_batch)
        return metrics

    def _number(self, step: int, mini_batch: int) -> int:
        """Of an update in the run, from 1."""
        return (step - 1) * self._recipe.train.num_mini_batches + mini_batch + 1

    def _in_both_orders(self, step: int, mini_batch: int) -> bool:
        """The weights that sampled, which may be older than the step, are not there to be asked."""
        if self._recipe.algorithm.old_policy == "rollout":
            return False
        every = BOTH_ORDERS * self._recipe.routing.decompose_every
        return due(self._number(step, mini_batch), every)

    def _parameters(self) -> list[Tensor]:
        return [p for chunk in self._model.chunks for p in chunk.parameters()]

    def _divergence(
        self,
        batches: Sequence[PackedBatch],
        old: Sequence[Routes | None],
        new: Sequence[Routes | None],
        prefix: str,
    ) -> tuple[Metrics, list[Tensor | None]]:
        """Metrics of this rank, and of each micro-batch the layers that changed: int [T]."""
        if not self._has_experts:
            return Metrics(), [None] * len(batches)
        metrics = Metrics()
        # Row 0: layers that changed; row 1: the shift, at tokens whose probabilities are kept.
        sums = [torch.zeros(2, len(b.tokens), device=b.tokens.device) for b in batches]
        for batch, was, now, total in zip(batches, old, new, sums, strict=True):
            if was is None or now is None:
                continue
            rows, kept = self._view.rows(batch), self._view.kept_rows(batch)
            found = compare(
                was,
                now,
                layers=self._routers.layers,
                mask=batch.mask[rows],
                kept=kept,
                prefix=prefix,
            )
            metrics.update(found.metrics)
            total[0, rows] = found.layers_flipped.float()
            if found.shift is not None:
                total[1, rows[kept]] = found.shift
        # The same answer on every rank of the block: all hold the same samples.
        with_shift = self._view.prob_every > 0 and (
            prefix == "routing" or any(b.rollout_probs is not None for b in batches)
        )
        whole = torch.cat(sums, dim=1)
        # Model-parallel block: its stages have the layers, its tensor-parallel ranks the tokens,
        # of the same micro-batches.
        dist.all_reduce(whole, group=self._groups.megatron.mp)
        parts = whole.split([len(b.tokens) for b in batches], dim=1)
        if self._groups.is_leader:
            for batch, (flipped, shift) in zip(batches, parts, strict=True):
                kept = self._view.kept_tokens(batch)
                metrics.update(
                    token_metrics(
                        flipped,
                        batch.mask,
                        shift[kept] if with_shift else None,
                        num_layers=len(self._routers.moe_layers),
                        prefix=prefix,
                    )
                )
        return metrics, [flipped.int() for flipped, _ in parts]

    def _load(self, batch: PackedBatch, forward: Forward) -> Metrics:
        if forward.routes is None:
            return Metrics()
        return load_metrics(
            forward.routes,
            layers=self._routers.layers,
            places=self._routers.places,
            num_layers=len(self._routers.moe_layers),
            num_experts=self._routers.num_experts,
            mask=batch.mask[self._view.rows(batch)],
            prefix="routing",
        )

    def _bound(self, batch: PackedBatch, forward: Forward) -> Metrics:
        return bound_metrics(
            Ratio.of(_log_ratio(batch, forward), batch.advantages, batch.mask),
            self._recipe.algorithm.temperatures,
            batch.sequence_ids,
            batch.lengths,
            self._groups.cp,
        )

    def _split(
        self,
        batches: Sequence[PackedBatch],
        forwards: Sequence[Forward],
        probe: Probe,
        flipped: Sequence[Tensor | None],
        *,
        both_orders: bool,
    ) -> Metrics:
        """The current against the old policy."""
        free, replayed = forwards, forwards
        if self._has_experts and self._recipe.routing.router_replay == "disabled":
            replayed = probe.other
        elif self._has_experts:
            free = probe.other
            old = [batch.old_routes for batch in batches]
            _, flipped = self._divergence(batches, old, [f.routes for f in free], "routing")
        others = None
        if both_orders and self._has_experts:
            others = self._at_old_weights(batches, free)
        metrics = Metrics()
        if not self._groups.is_leader:
            return metrics
        for i, batch in enumerate(batches):
            z = _log_ratio(batch, free[i], exact=True)
            a = _log_ratio(batch, replayed[i], exact=True)
            metrics.update(self._parts(batch, z, a, flipped[i], prefix="variance", rest="weights"))
            repeated = _logprob(probe.again[i]) - _logprob(forwards[i])
            metrics.add("variance/noise", Variance.of(repeated, batch.mask))
            if others:
                b = _log_ratio(batch, others[i], exact=True)
                metrics.update(other_order_metrics(z, a, b, batch.mask, prefix="variance"))
        return metrics

    def _split_engines(
        self,
        batches: Sequence[PackedBatch],
        rollout: Sequence[Routes],
        flipped: Sequence[Tensor | None],
    ) -> Metrics:
        """The training engine, as it was before the step, against the rollout engine."""
        if replays := self._recipe.routing.router_replay == "R3":
            extra = self._model.forward(batches, record=True)
            own = [forward.routes for forward in extra]
            _, flipped = self._divergence(batches, rollout, own, "rollout_train")
        else:
            extra = self._model.forward(batches, replay=[routes.experts for routes in rollout])
        metrics = Metrics()
        if not self._groups.is_leader:
            return metrics
        prefix = "rollout_train"
        for batch, forward, layers in zip(batches, extra, flipped, strict=True):
            assert batch.old_logprob is not None, "old log-probs come before the rollout's look"
            free, replayed = batch.old_logprob, _logprob(forward)
            if replays:
                free, replayed = replayed, free
            z, a = (x.double() - batch.rollout_logprob for x in (free, replayed))
            parts = self._parts(batch, z, a, layers, prefix=f"{prefix}/variance", rest="numerics")
            metrics.update(parts)
            for name, logprob in (("free", free), ("replayed", replayed)):
                against = (logprob, batch.rollout_logprob, batch.mask)
                metrics.update(mismatch_metrics(*against, prefix=f"{prefix}/{name}"))
        return metrics

    def _parts(
        self,
        batch: PackedBatch,
        z: Tensor,
        a: Tensor,
        layers_flipped: Tensor | None,
        *,
        prefix: str,
        rest: str,
    ) -> Metrics:
        """Of z [T], of which a is left at the old experts. Collective over the context group."""
        metrics, context = Metrics(), None
        if layers_flipped is not None:
            context = context_flipped(
                layers_flipped,
                batch.position_ids,
                batch.sequence_ids,
                batch.cu_seqlens,
                self._groups.cp,
            )
            swaps = Swaps.of(
                z,
                a,
                batch.mask,
                layers_flipped=layers_flipped,
                sequence_ids=batch.sequence_ids,
                num_sequences=len(batch.lengths),
                cp_group=self._groups.cp,
            )
            metrics.add(f"{prefix}/swaps", swaps)
        found = split_metrics(
            z,
            a,
            batch.mask,
            layers_flipped=layers_flipped,
            context=context,
            num_layers=len(self._routers.moe_layers),
            prefix=prefix,
            rest=rest,
        )
        metrics.update(found)
        return metrics

    @torch.no_grad()
    def _at_old_weights(
        self, batches: Sequence[PackedBatch], free: Sequence[Forward]
    ) -> list[Forward]:
        """The old weights at the experts that the routers chose in ``free``."""
        assert self._old_weights, "kept at the rollout"
        experts = [
            _or_none_of(forward.routes.experts if forward.routes else None, batch)
            for batch, forward in zip(batches, free, strict=True)
        ]
        self._swap_weights()
        forwards = self._model.forward(batches, replay=experts)
        self._swap_weights()
        return forwards

    def _swap_weights(self) -> None:
        for parameter, kept in zip(self._parameters(), self._old_weights, strict=True):
            now = parameter.detach().to("cpu", copy=True)
            parameter.copy_(kept)
            kept.copy_(now)

    def _dump(
        self,
        batches: Sequence[PackedBatch],
        forwards: Sequence[Forward],
        flipped: Sequence[Tensor | None],
        *,
        step: int,
        mini_batch: int,
    ) -> None:
        algorithm = self._recipe.algorithm
        rows = DumpRows.cat(
            DumpRows.of(batch, _logprob(forward), layers)
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
        write_dump(self._dumps / name, rows, info)


def old_experts(batch: PackedBatch) -> Tensor:
    """``[N, M, k]`` that ``old_logprob`` was computed with; a stage without experts has M = 0."""
    return _or_none_of(batch.old_experts, batch)


def _or_none_of(experts: Tensor | None, batch: PackedBatch) -> Tensor:
    return batch.tokens.new_empty(len(batch.tokens), 0, 0) if experts is None else experts


def due(number: int, every: int) -> bool:
    """Whether it is the turn of ``number``; ``every`` 0 is never."""
    return every > 0 and number % every == 0


def _logprob(forward: Forward) -> Tensor:
    assert forward.logprob is not None, "only the last stage has log-probs"
    return forward.logprob


def _log_ratio(batch: PackedBatch, forward: Forward, *, exact: bool = False) -> Tensor:
    """To the old policy, [T] nats; ``exact``: in fp64."""
    assert batch.old_logprob is not None, "old log-probs come before the first update"
    new, old = _logprob(forward), batch.old_logprob
    return new.double() - old.double() if exact else new - old
