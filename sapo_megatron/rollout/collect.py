"""Prompts -> scored groups, the same on every rank.

Each rank that generates takes its share of the requests, the leader of each model-parallel block
decodes and scores that share, and all ranks exchange the result.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sapo_megatron.config import RolloutConfig, RunFailed
from sapo_megatron.metrics import Max, Mean, Metrics, Std, Sum
from sapo_megatron.objective.advantage import zero_std
from sapo_megatron.rollout.generate import Decoder, Request, SamplingParams, generate, share
from sapo_megatron.rollout.prompts import PromptSource
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.rollout.tokenizer import Tokenizer
from sapo_megatron.sample import Group, Prompt, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Responses:
    groups: list[Group]
    """The same on every rank."""
    failures: Metrics
    """Of the rewards that this rank gave."""
    generating_s: float
    scoring_s: float


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Generates and scores; every call is collective over all ranks."""

    decoder: Decoder
    tokenizer: Tokenizer
    scorer: Scorer | None
    """On the leader of each model-parallel block; None elsewhere."""
    config: RolloutConfig
    share_rank: int
    """Which share of the requests this rank's block generates."""
    shares: int
    world: dist.ProcessGroup
    """Every rank; carries host objects."""

    def respond(
        self, prompts: Sequence[Prompt], num_generations: int, params: SamplingParams
    ) -> Responses:
        """``num_generations`` scored responses to each prompt.

        Response k of a prompt has uid ``prompt.uid * num_generations + k``.
        """
        requests = [
            Request(uid=p.uid * num_generations + k, prompt_tokens=p.tokens)
            for p in prompts
            for k in range(num_generations)
        ]
        began = time.monotonic()
        mine = generate(
            self.decoder,
            share(requests, self.share_rank, self.shares),
            params,
            batch_size=self.config.generation_batch_size,
        )
        generated = time.monotonic()
        failures = Metrics()
        scored: list[Sample] = []
        if self.scorer is not None:
            scored = [s for s in mine if s.uid >= 0]
            for s in scored:
                s.text = self.tokenizer.decode(s.response_tokens)
            failures = self.scorer.score(_grouped(prompts, scored, num_generations))
        scoring_s = time.monotonic() - generated
        gathered: list[list[Sample]] = [[]] * dist.get_world_size(self.world)
        # Over the world: leaders bring their shares, the others nothing, and all get everything.
        dist.all_gather_object(gathered, scored, group=self.world)
        samples = sorted((s for part in gathered for s in part), key=lambda s: s.uid)
        return Responses(
            groups=_grouped(prompts, samples, num_generations),
            failures=failures,
            generating_s=generated - began,
            scoring_s=scoring_s,
        )

    def collect(self, source: PromptSource, *, seed: int) -> tuple[list[Group], Metrics]:
        """One step's groups.

        With dynamic sampling, groups whose rewards are all equal are dropped and new prompts
        drawn in their place, for at most ``dynamic_sampling_max_rounds`` rounds; then the step
        goes on with the groups there are. Raises RunFailed where there is none.
        """
        config = self.config
        params = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_response_length,
            eos_id=self.tokenizer.eos_id,
            seed=seed,
        )
        kept: list[Group] = []
        metrics = Metrics()
        generating_s = scoring_s = 0.0
        for _ in range(config.dynamic_sampling_max_rounds if config.dynamic_sampling else 1):
            prompts = source.next(config.rollout_batch_size - len(kept))
            responses = self.respond(prompts, config.num_generations, params)
            metrics.update(responses.failures)
            generating_s += responses.generating_s
            scoring_s += responses.scoring_s
            if dist.get_rank(self.world) == 0:
                metrics.update(describe(responses.groups))
            kept += [g for g in responses.groups if not (config.dynamic_sampling and _all_equal(g))]
            if len(kept) == config.rollout_batch_size:
                break
        if not kept:
            raise RunFailed(
                f"no group with different rewards in {config.dynamic_sampling_max_rounds} rounds "
                f"of dynamic sampling; look at the reward function, or use easier or harder prompts"
            )
        metrics.add("time/rollout", Max(generating_s))
        metrics.add("time/reward", Max(scoring_s))
        return kept, metrics


def rewards(groups: Sequence[Group]) -> torch.Tensor:
    """fp64 ``[N, G]``."""
    return torch.tensor([[s.reward for s in g.samples] for g in groups], dtype=torch.float64)


def describe(groups: Sequence[Group]) -> Metrics:
    """Rewards and lengths of groups that are not yet filtered."""
    scores = rewards(groups)
    equal = zero_std(scores)
    if bool(equal.all()):
        logger.warning(
            "all %d groups have equal rewards (mean %.3g): there is nothing to learn from in them",
            len(groups),
            scores.mean(),
        )
    samples = [s for g in groups for s in g.samples]
    metrics = Metrics()
    metrics.add("reward/mean", Mean.of(scores))
    metrics.add("reward/std", Std.of(scores))
    metrics.add("reward/zero_std_groups", Sum(float(equal.sum())))
    metrics.add("reward/groups", Sum(float(len(groups))))
    lengths = torch.tensor([float(len(s.response_tokens)) for s in samples])
    metrics.add("response/length_mean", Mean.of(lengths))
    metrics.add("response/truncated", Mean.of(torch.tensor([float(s.truncated) for s in samples])))
    return metrics


def _grouped(
    prompts: Sequence[Prompt], samples: Sequence[Sample], num_generations: int
) -> list[Group]:
    """A group for every prompt that has samples, in the order of the prompts."""
    by_prompt: dict[int, list[Sample]] = {}
    for s in samples:
        by_prompt.setdefault(s.uid // num_generations, []).append(s)
    return [Group(prompt=p, samples=by_prompt[p.uid]) for p in prompts if p.uid in by_prompt]


def _all_equal(group: Group) -> bool:
    return bool(zero_std(rewards([group])).item())
