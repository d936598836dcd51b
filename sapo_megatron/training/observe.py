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

from sapo_megatron.metrics import Max, Metrics
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.policy.model import Forward, Model
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.routing.divergence import compare, load_metrics, token_metrics
from sapo_megatron.routing.variance import split_metrics
from sapo_megatron.runs.dump import DumpInfo, DumpRows, write_dump
from sapo_megatron.sample import PackedBatch, Routes


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

    def rollout(self, batches: Sequence[PackedBatch]) -> Metrics:
        """The rollout engine's routes against the training engine's; none where it gave none.

        ``batches`` with ``old_routes``. Raises UserError for routes that do not fit the model.
        """
        # Every rank of a model-parallel block has the same samples, so all of it goes one way.
        routed = any(batch.rollout_experts is not None for batch in batches)
        if not (self._has_experts and routed):
            return Metrics()
        rollout = [self._view.rollout_routes(batch) for batch in batches]
        old = [batch.old_routes for batch in batches]
        return self._divergence(batches, rollout, old, "rollout_train")[0]

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
            metrics.update(self._split(batches, forwards, probe, flipped))
        number = self._number(step, mini_batch)
        if due(number, self._recipe.logging.dump_every) and self._groups.is_leader:
            self._dump(batches, forwards, flipped, step=step, mini_batch=mini_batch)
        return metrics

    def _number(self, step: int, mini_batch: int) -> int:
        """Of an update in the run, from 1."""
        return (step - 1) * self._recipe.train.num_mini_batches + mini_batch + 1

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
    ) -> Metrics:
        free, replayed = forwards, forwards
        if self._has_experts and self._recipe.routing.router_replay == "disabled":
            replayed = probe.other
        elif self._has_experts:
            free = probe.other
            old = [batch.old_routes for batch in batches]
            _, flipped = self._divergence(batches, old, [f.routes for f in free], "routing")
        metrics = Metrics()
        if not self._groups.is_leader:
            return metrics
        for batch, own, at_own, at_old, twice, layers in zip(
            batches, forwards, free, replayed, probe.again, flipped, strict=True
        ):
            metrics.update(
                split_metrics(
                    _log_ratio(batch, at_own, exact=True),
                    _log_ratio(batch, at_old, exact=True),
                    batch.mask,
                    layers_flipped=layers,
                    num_layers=len(self._routers.moe_layers),
                    repeated=_logprob(twice) - _logprob(own),
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
    if batch.old_experts is None:
        return batch.tokens.new_empty(len(batch.tokens), 0, 0)
    return batch.old_experts


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
