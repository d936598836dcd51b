"""The engine of a run's rollouts: the training model itself, or vLLM servers that follow it.

Servers get the policy's weights before they serve (:mod:`.handover`), and must then give a probe
the log-probs that the training engine gives it; a run whose servers do not stops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sapo_megatron.data.batch import MicroBatching
from sapo_megatron.errors import RunFailed
from sapo_megatron.metrics import Max, Metrics, Spans, now
from sapo_megatron.policy import parallel
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.parallel import Nodes, ParallelGroups
from sapo_megatron.policy.step import Offload, Policy
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.engine import Arrived, Engine, Request, SamplingParams
from sapo_megatron.rollout.generate import InProcess, generate
from sapo_megatron.sample import Sample
from sapo_megatron.training.handover import Handover, OverFolder, OverNccl, folder_in_memory
from sapo_megatron.training.inputs import Inputs

if TYPE_CHECKING:
    from sapo_megatron.rollout.vllm.engine import VllmEngine

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
def open_engine(
    recipe: Recipe, inputs: Inputs, policy: Policy, run: Path, nodes: Nodes | None
) -> Iterator[Engine]:
    """The engine that the recipe asks for, while the block lasts. Collective over all ranks.

    ``nodes``: where the run starts servers of its own, of which one process of each node has some;
    to others the first rank speaks.

    Raises UserError for servers that do not serve the model, RunFailed where there are none.
    """
    if recipe.rollout.engine == "in_process":
        batch_size = recipe.rollout.generation_batch_size
        yield InProcess(MegatronDecoder(policy.model), batch_size=batch_size)
        return
    probe = _probe_samples(recipe, inputs, policy)
    groups, rollout = policy.groups, recipe.rollout
    speaks = nodes.is_first if nodes else dist.get_rank() == 0
    memory = folder_in_memory(policy, nodes) if nodes else None
    weights = memory or run / "servers" / "weights"
    with ExitStack() as stack:
        servers, offload = None, rollout.colocate_offload if rollout.colocate else None
        # vLLM starts where the memory is free that it is to have.
        with policy.aside(offload) if offload else nullcontext(lambda: None) as leave:
            leave()
            with parallel.failing_together(groups):
                if speaks:
                    servers = _connect(stack, recipe, inputs, run / "servers", nodes, weights)
                    if offload:
                        servers.sleep()
        _agree_on_routes(recipe, inputs, groups, servers)
        handover: Handover
        if rollout.weight_transfer == "nccl":
            handover = _over_nccl(recipe, policy, servers)
        else:
            handover = OverFolder(policy, servers, weights, nodes if memory else None)
        yield Following(
            policy,
            servers,
            handover,
            probe=probe,
            tolerance=PROBE_TOLERANCE[recipe.model.params_dtype],
            cut=groups.micro_batching(recipe),
            offload=offload,
        )


def _connect(
    stack: ExitStack,
    recipe: Recipe,
    inputs: Inputs,
    folder: Path,
    nodes: Nodes | None,
    weights: Path,
) -> VllmEngine:
    """The servers of the recipe, or some of this node's own."""
    # Here, not above: they import httpx, which a run without servers has no use for.
    from sapo_megatron.rollout.vllm.engine import VllmEngine
    from sapo_megatron.rollout.vllm.servers import LocalServers

    with_routes = recipe.routing.router_replay == "R3"
    if nodes is None:
        engine = VllmEngine(
            recipe.rollout.servers, recipe.rollout, inputs.arch, with_routes=with_routes
        )
    else:
        logs = folder / f"node-{nodes.number}" if len(nodes.firsts) > 1 else folder
        local = stack.enter_context(LocalServers(recipe, inputs.model, logs, weights))
        engine = VllmEngine(
            local.urls,
            recipe.rollout,
            inputs.arch,
            with_routes=with_routes,
            exited=local.exited,
        )
    stack.callback(engine.close)
    engine.check()
    return engine


def _agree_on_routes(
    recipe: Recipe, inputs: Inputs, groups: ParallelGroups, servers: VllmEngine | None
) -> None:
    """Have samples carry the experts where someone looks at them and all servers return them.

    Collective over all ranks.
    """
    # A response that is interrupted comes without its experts.
    whole = recipe.rollout.on_new_weights == "wait"
    if not (recipe.routing.observe and inputs.arch.experts and whole):
        return
    missing = parallel.greatest(groups, float(servers is not None and not servers.returns_routes))
    if servers is not None and recipe.routing.router_replay != "R3":
        servers.take_routes(everywhere=not missing)


def _over_nccl(recipe: Recipe, policy: Policy, servers: VllmEngine | None) -> OverNccl:
    from sapo_megatron.rollout.vllm.transfer import Transfer

    listing, transfer, rollout = policy.model.weights.listing(), None, recipe.rollout
    with parallel.failing_together(policy.groups):
        if servers is not None:
            transfer = Transfer(rollout.servers, listing, timeout_s=rollout.server_timeout_s)
    return OverNccl(policy, servers, transfer)


class Following:
    """vLLM servers whose weights are made the policy's whenever they are to serve.

    The ranks that speak to some do so for all.
    """

    by_prompt = True

    def __init__(
        self,
        policy: Policy,
        servers: VllmEngine | None,
        handover: Handover,
        *,
        probe: Sequence[Sample],
        tolerance: float,
        cut: MicroBatching,
        offload: Offload | None = None,
    ) -> None:
        """``servers``: on the ranks that speak to some; ``cut``: how the probe is, whose
        ``tolerance`` is that of the first load; ``offload``: what leaves the GPUs for servers on
        the same, which sleep between rollouts, at the cost of their weights.
        """
        self.background = offload is None
        self._policy = policy
        self._servers = servers
        self._handover = handover
        self._probe = probe
        self._tolerance = tolerance
        self._cut = cut
        self._offload = offload
        self._version: int | None = None
        """Of the servers' weights; None: they have none of ours."""

    @contextmanager
    def serving(self, *, version: int, record: bool) -> Iterator[Metrics]:
        if self._offload is None:
            metrics = Metrics()
            if self._version != version:
                metrics = self._hand_over(version)
            yield metrics
            return
        with self._policy.aside(self._offload) as leave:
            metrics = self._hand_over(version, leave)
            began = now()
            yield metrics
        metrics.add("time/rollout_wait", Spans.since(began))

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        arrived: Arrived,
        *,
        first: bool = False,
    ) -> Future[Metrics]:
        if self._servers is None:
            nothing: Future[Metrics] = Future()
            nothing.set_result(Metrics())
            return nothing
        asked = [request for request in requests if request.uid >= 0]
        done = self._servers.begin(asked, params, arrived, first=first)
        if self._offload is not None:
            if done.exception():  # a checkpoint is written next, if there is memory for it
                with suppress(RunFailed):
                    self._servers.sleep()
            else:
                self._servers.sleep()
        return done

    def spent(self, name: str) -> Metrics:
        return Metrics() if self._servers is None else self._servers.spent(name)

    def _hand_over(self, version: int, leave: Callable[[], None] = lambda: None) -> Metrics:
        """``leave``: leaves the GPUs to the servers, on all ranks, once the weights are written."""
        from sapo_megatron.rollout.vllm.fleet import Probe

        began = now()
        logprobs = self._policy.logprobs(self._probe, self._cut)
        metrics = self._handover.write()
        leave()
        probe = Probe(samples=self._probe, logprobs=logprobs, tolerance=self._tolerance)
        difference = self._handover.load(probe, version)
        if self._version is None:
            self._tolerance = _later_tolerance(self._tolerance, difference)
            logger.info(
                "probe: servers and training engine differ by %.2g nats per token, and may by %.2g",
                difference,
                self._tolerance,
            )
        self._version = version
        metrics.add("time/sync", Spans.since(began))
        metrics.add("rollout/probe_diff", Max(difference))
        if dist.get_rank() == 0:
            logger.debug("servers have the weights of step %d", version)
        return metrics


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
