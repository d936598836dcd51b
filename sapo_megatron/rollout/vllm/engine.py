"""Several vLLM servers as one engine.

    requests --> queue --> slots (server_concurrency per server) --> samples, in the requests' order
                   ^          |
                   +----------+   the server is away: back into the queue, for whoever is free

A server takes work once it is known to serve the right model with the current weights, which were
verified there: the log-probs it gives a probe agree with those of the training engine. A server
that was away is asked again when it comes back, and gets the weights first.

All calls block, and one runs at a time. Every instant of asyncio is in this file.
"""

import asyncio
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import httpx

from sapo_megatron.errors import RunFailed
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.recipe.schema import RolloutConfig
from sapo_megatron.rollout.engine import Arrived, Request, SamplingParams
from sapo_megatron.rollout.vllm.answers import (
    ROUTES_FLAG,
    Description,
    Unusable,
    check_description,
)
from sapo_megatron.rollout.vllm.client import Away, Server
from sapo_megatron.rollout.vllm.work import Work
from sapo_megatron.sample import Sample

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
RETRY_S = 0.5
"""Seconds between looks at a server that is away."""
PROGRESS_S = 30.0
"""Seconds between lines that say how far a rollout is."""
RESET_S = 30.0
"""Seconds for the last requests on a server to end before its prefix cache can be dropped."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Responses that show whether a server computes what the training engine computes."""

    samples: Sequence[Sample]
    logprobs: tuple[float, ...]
    """The training engine's, of the tokens of one response after the other, at temperature 1."""
    tolerance: float
    """Largest mean absolute difference, nats per token."""


@dataclass(frozen=True)
class _Weights:
    folder: Path | None
    """None: they were sent to the servers that were there, and cannot be sent to one again."""
    probe: Probe
    label: str
    """Another one for every load, known to the servers that have these weights."""


@dataclass
class _State:
    """A server during one call."""

    server: Server
    ready: bool = False
    lost: str = ""
    """Why it was given up; empty: it was not."""
    in_flight: int = 0
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)


class VllmEngine:
    """Samples from vLLM servers; ``check`` them and ``load`` weights before the first ``sample``.

    All methods raise RunFailed where no server is left to do the work, or one answers nonsense.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: RolloutConfig,
        arch: Architecture,
        *,
        with_routes: bool = False,
        exited: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        """``with_routes``: samples must carry the experts that were chosen (router_replay R3).

        ``exited`` says of a URL whether its server will not come back, and why.
        """
        self._urls = tuple(urls)
        self._config = config
        assert config.min_servers <= len(self._urls), "refused before servers start"
        self._arch = arch
        self._with_routes = with_routes
        self._exited = exited
        self._ssl = httpx.create_ssl_context(trust_env=False)  # takes long enough to keep
        self._weights: _Weights | None = None
        self._verified: dict[str, tuple[str, float]] = {}
        """URL -> the weights that were verified there, and their difference."""
        self._without_routes: set[str] = set()

    def check(self) -> None:
        """Wait for every server, and see that all serve this model as we need it.

        Raises UserError that names the server and what is wrong with it.
        """
        asyncio.run(self._check())

    @property
    def returns_routes(self) -> bool:
        """Whether all of these servers return the experts; after ``check``."""
        return not self._without_routes

    def take_routes(self, *, everywhere: bool) -> None:
        """From here on samples carry the experts, if all servers of the run return them."""
        self._with_routes = everywhere
        for url in sorted(self._without_routes):
            logger.info(
                "%s returns no routes, so rollout_train/variance is left out; %s would have it",
                url,
                ROUTES_FLAG,
            )

    def load(self, folder: Path, probe: Probe) -> dict[str, float]:
        """Put the weights of a Hugging Face folder into all servers, and verify them.

        The folder must be there until the next load: a server that is away gets the weights when
        it comes back. Returns the mean absolute difference of the probe's log-probs, by URL of the
        servers that have the weights. Raises RunFailed where it is above the probe's tolerance.
        """
        self._weights = _Weights(folder, probe, uuid.uuid4().hex)
        asyncio.run(self._load())
        return self._differences(self._weights.label)

    def receive(self, send: Callable[[], None], probe: Probe) -> dict[str, float]:
        """Verify the weights that ``send`` puts into all servers; as ``load`` otherwise.

        Raises RunFailed also where a server is away. One that is restarted later is without the
        weights, and gets no work.
        """
        label = uuid.uuid4().hex
        asyncio.run(self._label(f"part of {label}"))
        send()
        asyncio.run(self._label(label))
        self._weights = _Weights(None, probe, label)
        asyncio.run(self._load())
        return self._differences(label)

    def _differences(self, label: str) -> dict[str, float]:
        verified = ((url, self._verified.get(url)) for url in self._urls)
        return {url: seen[1] for url, seen in verified if seen and seen[0] == label}

    def sample(self, requests: Sequence[Request], params: SamplingParams, arrived: Arrived) -> int:
        """Hand a response to every request to ``arrived``, in the order in which they come.

        Returns how many others could not be used, and were drawn again.

        Each request has a seed of its own, made of ``params.seed`` and its uid. A server's numbers
        depend in their last digits on what else it works on, so that now and then the same seed
        gives another response.
        """
        assert self._weights is not None, "load comes before sample"
        return asyncio.run(self._sample(requests, params, arrived)) if requests else 0

    def sleep(self) -> None:
        """Have all servers drop their weights and free their memory, until the next ``load``.

        Raises RunFailed where one may not have done so. It has not been run on a GPU.
        """
        self._weights = None
        asyncio.run(self._sleep())

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[list[_State]]:
        async with httpx.AsyncClient(
            timeout=httpx.Timeout(self._config.server_timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            verify=self._ssl,
            trust_env=False,  # no proxy between the trainer and its servers
        ) as http:
            yield [_State(Server(url, http)) for url in self._urls]

    async def _check(self) -> None:
        async with self._connected() as states:
            await asyncio.gather(*map(self._wait_for, states))
            for state in states:
                if state.lost:
                    raise RunFailed(_lost([state]))

    async def _load(self) -> None:
        async with self._connected() as states:
            problems = await asyncio.gather(*map(self._try, states))
            if problems.count(None) < self._config.min_servers:
                await asyncio.gather(*map(self._wait_for, states))
            for state, problem in zip(states, problems, strict=True):
                if not state.ready:
                    logger.warning("%s is left out for now: %s", state.server.url, problem)
            if sum(not state.lost for state in states) < self._config.min_servers:
                raise RunFailed(_lost(states, self._config.min_servers))

    async def _label(self, label: str) -> None:
        async with self._connected() as states:
            await asyncio.gather(*(_label(state.server, label) for state in states))

    async def _sleep(self) -> None:
        async with self._connected() as states:
            await asyncio.gather(*(state.server.sleep() for state in states))

    async def _sample(
        self, requests: Sequence[Request], params: SamplingParams, arrived: Arrived
    ) -> int:
        work = Work(requests, arrived)
        # No server gets more than its part at once, or the first one to answer would get it all.
        part = -(-len(requests) // len(self._urls))
        async with self._connected() as states:
            slots = [
                asyncio.create_task(self._slot(state, work, params))
                for state in states
                for _ in range(min(part, self._config.server_concurrency))
            ]
            try:
                await _finished(work, slots, states, self._config.min_servers)
            finally:
                for task in slots:
                    task.cancel()
                await asyncio.gather(*slots, return_exceptions=True)
        return work.redrawn.total()

    async def _slot(self, state: _State, work: Work, params: SamplingParams) -> None:
        """Work on one request after the other, until cancelled or the server is given up."""
        while await self._wait_for(state):
            index = await work.take(state.server.url)
            if not state.ready:
                await work.put_back(index)
                continue
            request = work.requests[index]
            state.in_flight += 1
            try:
                sample = await state.server.complete(
                    request,
                    params,
                    _seed(params.seed, request.uid, work.redrawn[index]),
                    self._arch,
                    with_routes=self._with_routes,
                )
            except Away as error:
                if state.ready:
                    logger.warning("%s is away: %s", state.server.url, error)
                state.ready = False
                await work.lose(state.server.url)
                await work.fail(index, state.server.url, str(error))
            except Unusable as error:
                await work.draw_again(index, state.server.url, str(error))
            else:
                work.answer(sample)
            finally:
                state.in_flight -= 1

    async def _wait_for(self, state: _State) -> bool:
        """Wait until a server is ready to work; False when it is given up."""
        url, limit = state.server.url, self._config.server_timeout_s
        async with state.checking:
            problem: str | None = None
            try:
                async with asyncio.timeout(limit):
                    while not (state.ready or state.lost):
                        if gone := self._exited(url):
                            state.lost = gone
                        elif problem := await self._try(state):
                            await asyncio.sleep(RETRY_S)
            except TimeoutError:
                state.lost = f"away for {limit:g} s: {problem or 'it does not answer'}"
                logger.warning("%s is given up: %s", url, state.lost)
        return state.ready

    async def _try(self, state: _State) -> str | None:
        """Make a server ready to work; what is in the way, where that may pass."""
        try:
            description = await state.server.describe()
            check_description(
                description,
                state.server.url,
                self._arch,
                longest=self._config.max_prompt_length + self._config.max_response_length,
                with_routes=self._with_routes,
                sleeps=self._config.colocate,
                over_nccl=self._config.weight_transfer == "nccl",
            )
            if not description.routed_experts:
                self._without_routes.add(state.server.url)
            if self._weights:
                await self._bring(state.server, description, self._weights)
        except Away as error:
            return str(error)
        state.ready = True
        return None

    async def _bring(self, server: Server, description: Description, weights: _Weights) -> None:
        """Load and verify ``weights`` on a server that has not got them."""
        seen, _ = self._verified.get(server.url, ("", 0.0))
        if description.weights == seen == weights.label:
            return
        if self._config.colocate:
            await server.wake_up("weights")
        if weights.folder:
            await server.load(weights.folder, weights.label)
        elif description.weights != weights.label:
            raise Away("it has not got the weights that the others were sent")
        if self._config.colocate:
            await server.wake_up("kv_cache")  # now that what loading took for itself is free again
        await _forget_prefixes(server)
        tolerance = weights.probe.tolerance
        diff = await probe_difference(server, weights.probe)
        if not diff <= tolerance:  # nan, too
            raise RunFailed(
                f"{server.url}: expected the training engine's log-probs of a probe to "
                f"{tolerance:.2g} nats per token after new weights, got a difference of "
                f"{diff:.3g}; the server did not take the weights as they are, or computes with "
                f"them otherwise: look at its log, --dtype and --quantization, and restart it"
            )
        self._verified[server.url] = (weights.label, diff)


async def probe_difference(server: Server, probe: Probe) -> float:
    """Mean absolute difference of the probe's log-probs, nats per token."""
    found: list[float] = []
    for sample in probe.samples:
        response = sample.response_tokens
        found += (await server.logprobs([*sample.prompt_tokens, *response]))[-len(response) :]
    return fmean(abs(a - b) for a, b in zip(found, probe.logprobs, strict=True))


async def _label(server: Server, label: str) -> None:
    try:
        await server.label(label)
    except Away as error:
        raise RunFailed(
            f"{server.url}: expected every server to be there for weights over NCCL, got {error}; "
            f"restart all of them, and resume the run"
        ) from None


async def _forget_prefixes(server: Server) -> None:
    """Drop what the server has cached under the weights of before. Raises RunFailed."""
    try:
        async with asyncio.timeout(RESET_S):
            while not await server.forget_prefixes():
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise RunFailed(
            f"{server.url}: expected its prefix cache to be free after new weights, got one in use "
            f"for {RESET_S:g} s; is another program using the server?"
        ) from None


async def _finished(
    work: Work,
    slots: Sequence[asyncio.Task[None]],
    states: Sequence[_State],
    least: int,
) -> None:
    """Wait for all samples.

    Raises what a slot raises, and RunFailed where fewer servers than ``least`` are left.
    """
    done = asyncio.create_task(work.done.wait())
    pending: set[asyncio.Task] = {done, *slots}
    try:
        while not work.done.is_set():
            ended, pending = await asyncio.wait(
                pending, timeout=PROGRESS_S, return_when=asyncio.FIRST_COMPLETED
            )
            for task in ended:
                task.result()
            if sum(not state.lost for state in states) < least:
                raise RunFailed(_lost(states, least))
            if not ended:
                flights = ", ".join(f"{s.in_flight} in flight at {s.server.url}" for s in states)
                logger.info("%d of %d responses; %s", work.answered, len(work.requests), flights)
    finally:
        done.cancel()


def _lost(states: Sequence[_State], least: int = 1) -> str:
    reasons = "; ".join(f"{s.server.url}: {s.lost}" for s in states if s.lost)
    left = sum(not s.lost for s in states)
    return (
        f"rollout.min_servers: expected at least {least} vLLM servers that answer, got {left} of "
        f"{len(states)} ({reasons}); look at their logs, or raise rollout.server_timeout_s"
    )


def _seed(seed: int, uid: int, redrawn: int) -> int:
    """63 bits that differ for every request of every step, and every time it is drawn again."""
    words = [seed, uid, redrawn] if redrawn else [seed, uid]
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
