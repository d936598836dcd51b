"""Steps' groups, generated up to ``rollout.async_steps`` steps before they train.

What the schedule says is done here: prompts are drawn, responses asked for and put in a queue.
A checkpoint holds the queue; what is still under way is asked for again after a resume.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sapo_megatron.data.prompts import PromptSource
from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.metrics import Max, Mean, Metrics, Spans, Sum
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.collect import (
    Collector,
    Pending,
    Responses,
    all_equal,
    describe,
    grouped,
)
from sapo_megatron.rollout.engine import SamplingParams
from sapo_megatron.rollout.exchange import (
    HeldRoutes,
    exchange_samples,
    read_samples,
    write_samples,
)
from sapo_megatron.rollout.schedule import Request, Schedule, Slot, Wait
from sapo_megatron.runs.state import QueuedGroup, RunState
from sapo_megatron.sample import Group, Sample


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Groups that are under way."""

    request: Request
    pending: Pending
    cursor: dict[str, Any]
    """Where the source stood before."""


@dataclass(frozen=True, kw_only=True)
class _Here:
    """A group that has arrived."""

    group: Group
    kept: bool
    unscored: int
    """Responses that are left out of it."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """What was generated and not yet trained on, as it is at one time."""

    cursor: dict[str, Any]
    """Of the source, before whatever is still under way."""
    groups: tuple[_Here, ...]
    """Oldest first, dropped ones among them."""
    held: dict[int, HeldRoutes]

    def described(self) -> list[QueuedGroup]:
        """All but the samples."""
        return [
            QueuedGroup(
                prompt=replace(here.group.prompt, entry={}),  # only scorers read it
                kept=here.kept,
                unscored=here.unscored,
            )
            for here in self.groups
        ]

    def write(self, folder: Path) -> None:
        """This rank's samples: those that it holds the routes of; the first rank's, without any."""
        rank = dist.get_rank()
        samples = [s for here in self.groups for s in here.group.samples]
        mine = [s for s in samples if (self.held[s.uid].rank if s.uid in self.held else 0) == rank]
        if mine:
            write_samples(folder / f"ahead-{rank:05d}.safetensors", mine)


class Ahead:
    """Gives a run's steps their groups; methods are collective over all ranks."""

    def __init__(self, collector: Collector, source: PromptSource, recipe: Recipe) -> None:
        """Begins with the first step."""
        rollout, routing = recipe.rollout, recipe.routing
        self._collector = collector
        self._source = source
        self._rollout = rollout
        self._with_routes = routing.observe or routing.router_replay == "R3"
        self._params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_response_length,
            stop_ids=collector.stop_ids,
            seed=recipe.train.seed,
        )
        self._schedule = Schedule(
            batch=rollout.rollout_batch_size,
            ahead=rollout.async_steps,
            steps=recipe.train.steps,
            rounds=rollout.dynamic_sampling_max_rounds if rollout.dynamic_sampling else 1,
            waits=rollout.on_new_weights == "wait",
        )
        self._asked: deque[_Asked] = deque()
        self._here: dict[int, _Here] = {}
        self._held: dict[int, HeldRoutes] = {}
        self._scored = False
        """Whether any response of this run has been scored."""
        self._problem = ""

    def load(self, checkpoint: Path, state: RunState) -> None:
        """Go on with the queue of a checkpoint, whatever number of ranks has written it.

        Raises UserError, on every rank, where it is damaged.
        """
        world, size = self._collector.world, self._rollout.num_generations
        rank, ranks = dist.get_rank(world), dist.get_world_size(world)
        files = sorted(checkpoint.glob("ahead-*.safetensors"))
        mine: list[Sample] | UserError
        try:
            mine = [sample for path in files[rank::ranks] for sample in read_samples(path)]
        except UserError as error:
            mine = error
        samples, self._held = exchange_samples(mine, world)
        prompts = [queued.prompt for queued in state.ahead]
        groups = grouped(prompts, samples, size)
        expected = [size - queued.unscored for queued in state.ahead]
        if [len(group.samples) for group in groups] != expected:
            raise UserError(
                f"{checkpoint}: expected the {sum(expected)} responses that were "
                f"generated ahead, got {len(samples)}; resume from another checkpoint"
            )
        for number, (group, queued) in enumerate(zip(groups, state.ahead, strict=True)):
            self._here[number] = _Here(group=group, kept=queued.kept, unscored=queued.unscored)
        self._scored = True
        slots = [Slot(number=n, weights=0, here=True) for n, h in self._here.items() if h.kept]
        self._schedule = replace(
            self._schedule, done=state.step, asked=len(groups), slots=tuple(slots)
        )

    def queue(self) -> Queue:
        """What a checkpoint is to hold."""
        return Queue(
            cursor=self._asked[0].cursor if self._asked else self._source.state_dict(),
            groups=tuple(self._here.values()),
            held=dict(self._held),
        )

    def collect(self) -> Responses:
        """The next step's groups.

        Responses that could not be scored are left out of their groups. With dynamic sampling,
        groups without two different rewards are dropped and new prompts drawn in their place, for
        at most ``dynamic_sampling_max_rounds`` rounds; then the step goes on with the groups there
        are. Rewards and lengths are those of the step's groups and of those dropped before them,
        times and failures those of what arrives meanwhile. Raises RunFailed where there is no
        group, where none of the first responses could be scored, or where the engine fails.
        """
        if self._schedule.training:
            self._schedule = self._schedule.trained()
        metrics = Metrics()
        for name in ("reward/errors", "reward/timeouts"):
            metrics.add(name, Sum(0.0))
        for name in ("time/rollout", "time/reward"):
            metrics.add(name, Spans())
        while True:
            self._schedule, action = self._schedule.next()
            if isinstance(action, Request):
                metrics.update(self._ask(action))
                if not self._collector.background:
                    self._receive(metrics)
            elif isinstance(action, Wait):
                self._receive(metrics)
            else:
                return self._take(action.numbers, metrics)

    def _ask(self, request: Request) -> Metrics:
        """Have the engine begin; what making it ready took."""
        cursor = self._source.state_dict()
        prompts = self._source.next(len(request.numbers))
        pending = self._collector.begin(
            prompts,
            self._rollout.num_generations,
            self._params,
            version=request.weights,
            record=self._with_routes,
        )
        self._asked.append(_Asked(request=request, pending=pending, cursor=cursor))
        return pending.metrics

    def _receive(self, metrics: Metrics) -> None:
        """The oldest groups under way."""
        asked = self._asked[0]
        responses = self._collector.finish(asked.pending)
        self._asked.popleft()
        metrics.update(responses.metrics)
        self._held |= responses.held
        self._problem = responses.problem or self._problem
        self._scored |= any(s.scored for group in responses.groups for s in group.samples)
        if not self._scored:
            raise RunFailed(f"none of the first responses could be scored: {self._problem}")
        kept: set[int] = set()
        dropped: set[int] = set()
        for number, group in zip(asked.request.numbers, responses.groups, strict=True):
            unscored = [sample for sample in group.samples if not sample.scored]
            group.samples = [sample for sample in group.samples if sample.scored]
            drop = self._rollout.dynamic_sampling and all_equal(group)
            self._here[number] = _Here(group=group, kept=not drop, unscored=len(unscored))
            (dropped if drop else kept).add(number)
            for sample in [*unscored, *group.samples] if drop else unscored:
                sample.routes = None
                self._held.pop(sample.uid, None)
        self._schedule = self._schedule.arrived(kept, dropped)

    def _take(self, numbers: Sequence[int], metrics: Metrics) -> Responses:
        passed: list[_Here] = []
        for number, here in list(self._here.items()):
            if here.kept and number not in numbers:
                break
            passed.append(self._here.pop(number))
        taken = [here for here in passed if here.kept and here.group.samples]
        if not taken:
            lost = f" (not scored: {self._problem})" if self._problem else ""
            raise RunFailed(
                f"no group with different rewards in {self._schedule.rounds} rounds of dynamic "
                f"sampling{lost}; look at the reward function, or use easier or harder prompts"
                if self._rollout.dynamic_sampling
                else f"none of the step's responses could be scored: {self._problem}"
            )
        self._problem = ""
        if dist.get_rank() == 0:
            metrics.update(describe([here.group for here in passed]))
            metrics.add("reward/groups_left", Sum(float(len(taken))))
            metrics.update(self._ages([s for here in taken for s in here.group.samples]))
        groups = [here.group for here in taken]
        uids = [sample.uid for group in groups for sample in group.samples]
        held = {uid: self._held.pop(uid) for uid in uids if uid in self._held}
        return Responses(groups=groups, held=held, metrics=metrics)

    def _ages(self, samples: Sequence[Sample]) -> Metrics:
        """How many steps the policy is ahead of the weights that sampled each token."""
        done = self._schedule.done
        ages = torch.tensor([float(done - v) for s in samples for v in s.versions])
        metrics = Metrics()
        metrics.add("rollout/staleness_mean", Mean.of(ages))
        metrics.add("rollout/staleness_max", Max(float(ages.max())))
        for age in range(self._rollout.async_steps + 1):
            metrics.add(f"rollout/staleness/{age}", Mean.of((ages == age).float()))
        continued = sum(len(set(s.versions)) > 1 for s in samples)
        metrics.add("rollout/continued", Sum(float(continued)))
        return metrics
