"""Prompts -> scored groups, the same on every rank.

Each rank that generates takes its part of the requests, the leader of each model-parallel block
scores that part, and all ranks exchange the result. An engine that works by itself may do so in
the background, while the ranks train on what it gave before.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sapo_megatron.data.tokenizer import Tokenizer
from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.metrics import Mean, Metrics, Std, Sum
from sapo_megatron.objective.advantage import zero_std
from sapo_megatron.rollout.engine import Engine, Request, SamplingParams, part_of
from sapo_megatron.rollout.exchange import HeldRoutes, exchange_samples
from sapo_megatron.rollout.reward import Scorer, Scoring
from sapo_megatron.sample import Group, Prompt, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Requests that are under way."""

    prompts: list[Prompt]
    num_generations: int
    generated: Future[Metrics]
    scored: list[Scoring]
    """This rank's responses so far."""
    metrics: Metrics
    """What making the engine ready took."""


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Scored responses to some prompts, and what they took."""

    groups: list[Group]
    """The same on every rank, routes aside, which are where they were made."""
    held: dict[int, HeldRoutes]
    """Where routes are, by uid of the sample."""
    metrics: Metrics
    """Failures of rewards and times, of this rank."""
    problem: str = ""
    """Why the first of those samples was not scored that have no reward, on every rank."""


class Collector:
    """Generates and scores; every call is collective over all ranks."""

    def __init__(
        self,
        *,
        engine: Engine,
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
        scorer: Scorer | None,
        part: int,
        parts: int,
        world: dist.ProcessGroup,
    ) -> None:
        """``stop_ids``: the tokens that end a response; ``scorer``: on the leader of each
        model-parallel block, None elsewhere; ``part``: which of ``parts`` equal parts of the
        requests this rank's block generates; ``world``: every rank, carries host objects.
        """
        self.stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._engine = engine
        self._scorer = scorer
        self._place = part, parts
        self.world = world

    def respond(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        params: SamplingParams,
        *,
        version: int,
    ) -> Responses:
        """``num_generations`` scored responses to each prompt, of the policy's present weights.

        Response k of a prompt has uid ``prompt.uid * num_generations + k``. They come before what
        was begun earlier and waits; ``version`` as in :class:`Engine`.
        """
        pending = self.begin(
            prompts, num_generations, params, version=version, record=False, first=True
        )
        return self.finish(pending)

    @property
    def background(self) -> bool:
        """Whether what was begun goes on while other things are done."""
        return self._engine.background

    def spent(self, name: str) -> Metrics:
        """As :meth:`Engine.spent`."""
        return self._engine.spent(name)

    def begin(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        params: SamplingParams,
        *,
        version: int,
        record: bool,
        first: bool = False,
    ) -> Pending:
        """Start on what :meth:`respond` gives, behind whatever was begun before or ``first``.

        ``record``: with routes.
        """
        requests = [
            Request(uid=p.uid * num_generations + k, prompt_tokens=p.tokens)
            for p in prompts
            for k in range(num_generations)
        ]
        # Servers keep what they have computed of a prompt for its other responses.
        together = num_generations if self._engine.by_prompt else 1
        mine = part_of(requests, *self._place, together=together)
        of_uid = {p.uid: p for p in prompts}
        scored: list[Scoring] = []

        def arrived(sample: Sample) -> None:
            """It is scored while others are still being generated."""
            if self._scorer is not None and sample.uid >= 0:
                said = sample.response_tokens if sample.truncated else sample.response_tokens[:-1]
                sample.text = self._tokenizer.decode(said)
                scored.append(self._scorer.begin(of_uid[sample.uid // num_generations], sample))

        with self._engine.serving(version=version, record=record) as metrics:
            try:
                generated = self._engine.generate(mine, params, arrived, first=first)
            except (RunFailed, UserError) as error:  # for finish, where all ranks hear of it
                generated = Future()
                generated.set_exception(error)
        return Pending(
            prompts=list(prompts),
            num_generations=num_generations,
            generated=generated,
            scored=scored,
            metrics=metrics,
        )

    def finish(self, pending: Pending) -> Responses:
        """What was begun, when it is there. Raises what the engine raised."""
        metrics = Metrics()
        mine: list[Sample] | UserError | RunFailed
        problem = ""
        try:
            with metrics.timed("time/rollout_wait"):
                happened = pending.generated.result()
            metrics.update(happened)
            if self._scorer is not None:
                with metrics.timed("time/reward"):
                    failures = self._scorer.finish(pending.scored)
                metrics.update(failures)
            mine = [scoring.sample for scoring in pending.scored]
            problem = next((s.problem for s in mine if s.problem), "")
        except (RunFailed, UserError) as error:
            mine = error
        with metrics.timed("time/rollout_wait"):
            # Over the world, none of which can go on before: else it would count as exchange.
            dist.barrier(self.world)
        with metrics.timed("time/exchange"):
            samples, held = exchange_samples(mine, self.world)
        if not all(s.scored for s in samples):
            problems: list[str] = [problem] * dist.get_world_size(self.world)
            # Over the world: all ranks have the same samples, so all come here or none does.
            dist.all_gather_object(problems, problem, group=self.world)
            problem = next(filter(None, problems), "")
        groups = grouped(pending.prompts, samples, pending.num_generations)
        return Responses(groups=groups, held=held, metrics=metrics, problem=problem)


def rewards(samples: Sequence[Sample]) -> torch.Tensor:
    """fp64 ``[N]``."""
    return torch.tensor([s.reward for s in samples], dtype=torch.float64)


def describe(groups: Sequence[Group]) -> Metrics:
    """Rewards and lengths of groups of scored samples that are not yet filtered."""
    samples = [s for g in groups for s in g.samples]
    scores = rewards(samples)
    equal = sum(map(all_equal, groups))
    if equal == len(groups):
        logger.warning(
            "all %d groups have equal rewards (mean %.3g): there is nothing to learn from in them",
            len(groups),
            scores.mean(),
        )
    metrics = Metrics()
    metrics.add("reward/mean", Mean.of(scores))
    metrics.add("reward/std", Std.of(scores))
    metrics.add("reward/zero_std_groups", Sum(float(equal)))
    metrics.add("reward/groups", Sum(float(len(groups))))
    lengths = torch.tensor([float(len(s.response_tokens)) for s in samples])
    metrics.add("response/length_mean", Mean.of(lengths))
    metrics.add("response/truncated", Mean.of(torch.tensor([float(s.truncated) for s in samples])))
    return metrics


def grouped(
    prompts: Sequence[Prompt], samples: Sequence[Sample], num_generations: int
) -> list[Group]:
    """A group for every prompt, in their order; without samples where it has none."""
    by_prompt: dict[int, list[Sample]] = {}
    for s in samples:
        by_prompt.setdefault(s.uid // num_generations, []).append(s)
    return [Group(prompt=p, samples=by_prompt.get(p.uid, [])) for p in prompts]


def all_equal(group: Group) -> bool:
    """Whether it has nothing to learn from: no two samples whose rewards differ."""
    return len(group.samples) < 2 or bool(zero_std(rewards(group.samples).unsqueeze(0)).item())
