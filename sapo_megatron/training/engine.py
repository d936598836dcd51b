"""The engine of a run's rollouts: the training model itself, or vLLM servers that follow it.

Servers get the policy's weights as a Hugging Face folder on a file system that they share, or over
NCCL, and must then give a probe the log-probs that the training engine gives it; a run whose
servers do not stops.
"""

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from sapo_megatron.data.batch import MicroBatching
from sapo_megatron.metrics import Max, Metrics
from sapo_megatron.policy import parallel
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.engine import Engine, Request, SamplingParams
from sapo_megatron.rollout.generate import InProcess, generate
from sapo_megatron.rollout.vllm.engine import Probe, VllmEngine
from sapo_megatron.rollout.vllm.servers import LocalServers
from sapo_megatron.rollout.vllm.transfer import Transfer
from sapo_megatron.sample import Sample
from sapo_megatron.training.inputs import Inputs

logger = logging.getLogger(__name__)

PROBE_RESPONSES, PROBE_TOKENS = 8, 32
"""Responses of the probe, and most tokens of each."""
PROBE_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.1}
"""By ``model.params_dtype``: mean absolute difference of log-probs, nats a token. The rounding of
two engines, with now and then another expert, stays below it; weights that are wrong do not
(docs/rollout.md has what was measured)."""
PROBE_GROWTH = 3.0
"""How many times as much as the first load a later one may differ, within the tolerance; where the
first hardly differed, by the tolerance over this."""


@contextmanager
def open_engine(recipe: Recipe, inputs: Inputs, policy: Policy, run: Path) -> Iterator[Engine]:
    """The engine that the recipe asks for, while the block lasts. Collective over all ranks.

    Raises UserError for servers that do not serve the model, RunFailed where there are none.
    """
    if recipe.rollout.engine == "in_process":
        batch_size = recipe.rollout.generation_batch_size
        yield InProcess(MegatronDecoder(policy.model), batch_size=batch_size)
        return
    probe = _probe_samples(recipe, inputs, policy)
    with ExitStack() as stack:
        rollout, is_first = recipe.rollout, dist.get_rank() == 0
        servers = transfer = listing = None
        with parallel.failing_together(policy.groups):
            if is_first:
                servers = _connect(stack, recipe, inputs, run / "servers")
        if over_nccl := rollout.weight_transfer == "nccl":
            listing = policy.model.weights.listing()
        with parallel.failing_together(policy.groups):
            if is_first and listing is not None:
                transfer = Transfer(rollout.servers, listing, timeout_s=rollout.server_timeout_s)
        yield Following(
            policy,
            servers,
            run / "servers" / "weights",
            probe=probe,
            tolerance=PROBE_TOLERANCE[recipe.model.params_dtype],
            cut=policy.groups.micro_batching(recipe),
            colocate=rollout.colocate,
            over_nccl=over_nccl,
            transfer=transfer,
        )


def _connect(stack: ExitStack, recipe: Recipe, inputs: Inputs, folder: Path) -> VllmEngine:
    """On the first rank: the servers of the recipe, or some of the trainer's own."""
    with_routes = recipe.routing.router_replay == "R3"
    if recipe.rollout.servers:
        engine = VllmEngine(
            recipe.rollout.servers, recipe.rollout, inputs.arch, with_routes=with_routes
        )
    else:
        local = stack.enter_context(LocalServers(recipe, inputs.model, folder))
        engine = VllmEngine(
            local.urls,
            recipe.rollout,
            inputs.arch,
            with_routes=with_routes,
            exited=local.exited,
        )
    engine.check()
    if recipe.routing.observe and inputs.arch.experts and not with_routes:
        engine.take_routes()
    return engine


class Following:
    """vLLM servers whose weights are made the policy's whenever they are to serve.

    The first rank speaks to them, for all.
    """

    background = True

    def __init__(
        self,
        policy: Policy,
        servers: VllmEngine | None,
        folder: Path,
        *,
        probe: Sequence[Sample],
        tolerance: float,
        cut: MicroBatching,
        colocate: bool = False,
        over_nccl: bool = False,
        transfer: Transfer | None = None,
    ) -> None:
        """``servers``: on the first rank; ``folder``: where weights are handed over; ``cut``: how
        the probe is, whose ``tolerance`` is that of the first load; ``colocate``: the servers sleep
        between rollouts, which costs them their weights; ``over_nccl``: they get weights by the
        first rank's ``transfer``.
        """
        self._policy = policy
        self._servers = servers
        self._folder = folder.absolute()
        self._probe = probe
        self._tolerance = tolerance
        self._cut = cut
        self._colocate = colocate
        self._over_nccl = over_nccl
        self._transfer = transfer
        self._updates: int | None = None
        """Optimizer steps behind the servers' weights; None: they have none of ours."""

    @contextmanager
    def serving(self, *, record: bool) -> Iterator[Metrics]:
        metrics = Metrics()
        if self._colocate or self._updates != self._policy.updates:
            metrics = self._hand_over()
            self._updates = self._policy.updates
        yield metrics

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        if self._servers is None:
            return []
        samples = self._servers.sample(requests, params)
        if self._colocate:
            self._servers.sleep()  # before any rank has the samples and trains on them
        return samples

    def _hand_over(self) -> Metrics:
        began = time.monotonic()
        logprobs = self._policy.logprobs(self._probe, self._cut)
        if self._colocate:
            torch.cuda.empty_cache()  # what training has kept; the servers are about to need it
        probe = Probe(samples=self._probe, logprobs=logprobs, tolerance=self._tolerance)
        difference = self._send(probe) if self._over_nccl else self._share(probe)
        if self._updates is None:
            self._tolerance = _later_tolerance(self._tolerance, difference)
            logger.info(
                "probe: servers and training engine differ by %.2g nats per token, and may by %.2g",
                difference,
                self._tolerance,
            )
        metrics = Metrics()
        metrics.add("time/sync", Max(time.monotonic() - began))
        metrics.add("rollout/probe_diff", Max(difference))
        if dist.get_rank() == 0:
            logger.debug("servers have the weights of update %d", self._policy.updates)
        return metrics

    def _share(self, probe: Probe) -> float:
        """By a folder; the probe's largest difference."""
        # No rank is through before all have come, so that their memory is free as well.
        self._policy.model.weights.save(self._folder)

        def load() -> float:
            assert self._servers is not None
            return max(self._servers.load(self._folder, probe).values())

        return parallel.on_first_rank(self._policy.groups, load)

    def _send(self, probe: Probe) -> float:
        """Over NCCL; the probe's largest difference."""
        found: dict[str, float] = {}
        tensors = self._policy.model.weights.stream()
        with parallel.failing_together(self._policy.groups):
            try:
                if self._servers is not None:
                    assert self._transfer is not None
                    send = functools.partial(self._transfer.send, tensors)
                    found = self._servers.receive(send, probe)
            finally:
                for _ in tensors:  # others wait for the first rank to take their tensors
                    pass
        return parallel.on_first_rank(self._policy.groups, lambda: max(found.values()))


def _later_tolerance(tolerance: float, first: float) -> float:
    """Of the loads that follow one with the difference ``first``."""
    return min(tolerance, max(tolerance / PROBE_GROWTH, PROBE_GROWTH * first))


def _probe_samples(recipe: Recipe, inputs: Inputs, policy: Policy) -> list[Sample]:
    """Answers of the policy to the shortest held-out prompts. Collective over all ranks.

    Tokens that it samples are probable ones, whose log-probs rounding changes little; greedy ones
    are so certain that wrong weights change them little, too. The shortest prompts, since what one
    has more than another is fed token by token.
    """
    rollout = recipe.rollout
    # A server that gives a text's log-probs makes one token more.
    room = rollout.max_prompt_length + rollout.max_response_length - 1
    longest = max(1, min(PROBE_TOKENS, rollout.max_response_length - 1))
    prompts = sorted((problem.tokens for problem in inputs.problems), key=len)[:PROBE_RESPONSES]
    requests = [
        Request(uid=uid, prompt_tokens=tokens[: room - longest])
        for uid, tokens in enumerate(prompts)
    ]
    params = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=longest,
        stop_ids=inputs.endings.stop_ids,
        seed=recipe.train.seed,
    )
    decoder = MegatronDecoder(policy.model)
    with decoder.generating():
        samples = generate(decoder, requests, params, batch_size=len(requests))
    torch.cuda.empty_cache()  # servers beside the trainer are about to need it
    # Ranks with the same weights may round otherwise, and so draw another token.
    return parallel.on_first_rank(policy.groups, lambda: samples)
