"""Several vLLM servers that work on the same requests.

    requests --> work --> servers (up to server_concurrency each) --> samples, as they come
                  ^          |
                  +----------+   the server is away: back, for whoever is free
                                 new weights: back with what was drawn, to be continued

A server takes work once it is known to serve the right model with the current weights, which were
verified there: the log-probs it gives a probe agree with those of the training engine. A server
that was away is asked again when it comes back, and gets the weights first.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx

from sapo_megatron.errors import RunFailed
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.metrics import Metrics, Spans, this_rank
from sapo_megatron.recipe.schema import RolloutConfig
from sapo_megatron.rollout.vllm.answers import Description, Unusable, check_description
from sapo_megatron.rollout.vllm.client import Away, Server
from sapo_megatron.rollout.vllm.clock import Clock
from sapo_megatron.rollout.vllm.work import Batch, Job, Work
from sapo_megatron.sample import Sample

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
IDLE_S = 1.0
"""Seconds after which an idle connection is closed: before the server does so, after 5."""
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


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What servers are to compute with."""

    folder: Path | None
    """None: they were sent to the servers that were there, and cannot be sent to one again."""
    probe: Probe
    version: int
    """Told by the samples that come from them."""
    label: str
    """Another one for every load, known to the servers that have these weights."""


@dataclass(eq=False)
class _State:
    """What is known of a server."""

    server: Server
    ready: bool = False
    lost: str = ""
    """Why it was given up; empty: it was not."""
    label: str = ""
    """Of the weights that were verified there,"""
    version: int = 0
    """theirs,"""
    difference: float = 0.0
    """and the probe's mean absolute difference with them."""
    at_work: set[asyncio.Task[None]] = field(default_factory=set)
    """One for each request that it works on."""
    interrupted: bool = False
    """Whether these are to end where they are, since they go on with other weights."""
    watch: asyncio.Task[None] | None = None
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    answering: Clock = field(default_factory=Clock)
    loading: Clock = field(default_factory=Clock)

    def stop_watching(self) -> None:
        """A watch that is ending is none: whoever needs one begins another."""
        if self.watch:
            self.watch.cancel()
        self.watch = None


class Fleet:
    """The servers; methods run in one loop. All raise RunFailed where too few servers are left."""

    def __init__(
        self,
        urls: Sequence[str],
        config: RolloutConfig,
        arch: Architecture,
        exited: Callable[[str], str | None],
    ) -> None:
        """``exited`` says of a URL whether its server will not come back, and why."""
        self._config = config
        self._arch = arch
        self._exited = exited
        self.with_routes = False
        """Whether samples carry the experts."""
        self.without_routes: set[str] = set()
        """URLs of servers that do not return them."""
        self._weights: Weights | None = None
        self._resting = False
        """Whether no server is to get work, though it may be ready."""
        self._work = Work()
        self._progress: asyncio.Task[None] | None = None
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(config.server_timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S),
            trust_env=False,  # no proxy between the trainer and its servers
        )
        self._states = [_State(Server(url, self._http)) for url in urls]

    async def check(self) -> None:
        await asyncio.gather(*map(self._wait_for, self._states))
        for state in self._states:
            if state.lost:
                raise RunFailed(_lost([state]))
            if self._config.on_new_weights == "continue":
                await state.server.check_abort()

    async def load(self, weights: Weights) -> dict[str, float]:
        """Have all servers that are there take weights; the probe's differences by their URLs."""
        self._weights, self._resting = weights, False
        for state in self._states:
            state.stop_watching()
            state.ready, state.lost = False, ""
        problems = await asyncio.gather(*map(self._renew, self._states))
        if problems.count(None) < self._config.min_servers:
            await asyncio.gather(*map(self._wait_for, self._states))
        for state, problem in zip(self._states, problems, strict=True):
            if not state.ready:
                logger.warning("%s is left out for now: %s", state.server.url, problem)
        self._check_left()
        self._give_work()
        return {s.server.url: s.difference for s in self._states if s.label == weights.label}

    async def rest(self) -> None:
        """Have no server work on anything until the next ``load``."""
        self._resting = True
        await asyncio.gather(*map(self._empty, self._states))

    async def label(self, label: str) -> None:
        """Name the weights that servers have."""
        await asyncio.gather(*(_label(state.server, label) for state in self._states))

    async def sleep(self) -> None:
        """Have all servers free their memory until the next ``load``."""
        self._weights = None
        for state in self._states:
            state.ready = False
        await asyncio.gather(*(state.server.sleep() for state in self._states))

    async def spent(self, name: str) -> Metrics:
        """As :meth:`sapo_megatron.rollout.engine.Engine.spent`."""
        metrics = Metrics()
        for state in self._states:
            where = f"{state.server.url} ({this_rank()})"
            for what, clock in ((name, state.answering), ("time/sync", state.loading)):
                spans = [(where, began, seconds) for began, seconds in clock.take()]
                metrics.add(what, Spans(tuple(spans)))
        return metrics

    async def begin(self, batch: Batch, *, first: bool) -> None:
        """Take requests on; servers are looked at first, as they may have been restarted."""
        assert self._weights is not None, "load comes before begin"
        self._work.add(batch, first=first)
        if batch.done.done():
            return
        if self._progress is None:
            self._progress = self._spawn(self._tell_progress())
        for state in self._states:
            self._watch(state)

    async def close(self) -> None:
        """Give up on everything."""
        self._end(RunFailed("the run has ended"))
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def _spawn(
        self, what: Coroutine[Any, Any, None], among: set[asyncio.Task[None]] | None = None
    ) -> asyncio.Task[None]:
        """Begin what may end all work, or make room for more; in ``among`` while it lasts."""
        task = asyncio.create_task(what)

        def ended(task: asyncio.Task[None]) -> None:
            if among is not None:
                among.discard(task)
            if task.cancelled():
                return
            if error := task.exception():
                self._end(error)
            self._give_work()

        if among is not None:
            among.add(task)
        task.add_done_callback(ended)
        return task

    def _end(self, error: BaseException) -> None:
        """Give up on all requests, for this reason."""
        self._work.end(error)
        for state in self._states:
            for task in state.at_work:
                task.cancel()
        self._stop_watching()

    def _stop_watching(self) -> None:
        """Look no longer at servers that nothing waits for."""
        if self._progress:
            self._progress.cancel()
        self._progress = None
        for state in self._states:
            state.stop_watching()

    def _give_work(self) -> None:
        """Have each server that is ready work on as many requests as it should.

        None gets more than its part at once, or the first one to answer would get it all.
        """
        if not self._work.batches:
            self._stop_watching()
            return
        if self._resting:
            return
        at_work = sum(len(state.at_work) for state in self._states)
        left = sum(not state.lost for state in self._states)
        part = -(-(self._work.waiting + at_work) // max(1, left))
        most = min(part, self._config.server_concurrency)
        free = {s for s in self._states if s.ready}
        while free := {s for s in free if len(s.at_work) < most}:
            state = min(free, key=lambda each: len(each.at_work))
            if job := self._work.take(state.server.url, alone=left == 1):
                self._spawn(self._answer(state, job), state.at_work)
            else:
                free.discard(state)

    async def _answer(self, state: _State, job: Job) -> None:
        """Have a server answer a request, or put it back."""
        url, params = state.server.url, job.batch.params
        try:
            with state.answering.running():
                sample, whole = await state.server.complete(
                    job.request,
                    params,
                    _seed(params.seed, job),
                    self._arch,
                    begun=job.begun,
                    version=state.version,
                    with_routes=self.with_routes,
                )
        except Away as error:
            self._is_away(state, job, str(error))
        except Unusable as error:
            self._work.draw_again(job, url, str(error))
        else:
            if whole:
                self._work.answer(job, sample)
            elif state.interrupted:
                job.begun = sample if sample.response_tokens else None
                self._work.put_back(job)
            else:
                self._is_away(state, job, "it gave up on a request, as one that is stopped does")

    def _is_away(self, state: _State, job: Job, reason: str) -> None:
        url = state.server.url
        if state.ready:
            logger.warning("%s is away: %s", url, reason)
        self._work.lose(url)
        self._watch(state)
        self._work.fail(job, url, reason)

    def _watch(self, state: _State) -> None:
        """Have a server work once it is seen to be ready."""
        state.ready, state.lost = False, ""
        if state.watch is None or state.watch.done():
            state.watch = self._spawn(self._ready_or_lost(state))

    async def _ready_or_lost(self, state: _State) -> None:
        await self._wait_for(state)
        self._check_left()

    def _check_left(self) -> None:
        if sum(not state.lost for state in self._states) < self._config.min_servers:
            raise RunFailed(_lost(self._states, self._config.min_servers))

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            answered = sum(batch.answered for batch in self._work.batches)
            asked = sum(len(batch.requests) for batch in self._work.batches)
            where = ", ".join(f"{len(s.at_work)} in flight at {s.server.url}" for s in self._states)
            logger.info("%d of %d responses; %s", answered, asked, where)

    async def _renew(self, state: _State) -> str | None:
        """Bring the weights to a server at once; what is in the way, where that may pass."""
        async with state.checking:
            return await self._try(state)

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
                with_routes=self.with_routes,
                sleeps=self._config.colocate,
                over_nccl=self._config.weight_transfer == "nccl",
            )
            if not description.routed_experts:
                self.without_routes.add(state.server.url)
            if self._weights:
                await self._bring(state, description, self._weights)
        except Away as error:
            return str(error)
        state.ready = True
        return None

    async def _bring(self, state: _State, description: Description, weights: Weights) -> None:
        """Load and verify ``weights`` on a server that has not got them."""
        server = state.server
        if description.weights == state.label == weights.label:
            return
        await self._empty(state)
        with state.loading.running():
            await self._load(server, description, weights)
            diff = await probe_difference(server, weights.probe)
        tolerance = weights.probe.tolerance
        if not diff <= tolerance:  # nan, too
            raise RunFailed(
                f"{server.url}: expected the training engine's log-probs of a probe to "
                f"{tolerance:.2g} nats per token after new weights, got a difference of "
                f"{diff:.3g}; the server did not take the weights as they are, or computes with "
                f"them otherwise: look at its log, --dtype and --quantization, and restart it"
            )
        state.label, state.version, state.difference = weights.label, weights.version, diff

    async def _load(self, server: Server, description: Description, weights: Weights) -> None:
        if self._config.colocate:
            await server.wake_up("weights")
        if weights.folder:
            await server.load(weights.folder, weights.label)
        elif description.weights != weights.label:
            raise Away("it has not got the weights that the others were sent")
        if self._config.colocate:
            await server.wake_up("kv_cache")  # now that what loading took for itself is free again
        await _forget_prefixes(server)

    async def _empty(self, state: _State) -> None:
        """Wait until a server that gets no work is in the middle of no response."""
        state.interrupted = self._config.on_new_weights == "continue"
        try:
            while state.at_work:
                if state.interrupted:
                    await state.server.abort()
                if tasks := set(state.at_work):
                    # Again after a while: a request may have been on its way.
                    await asyncio.wait(tasks, timeout=RETRY_S if state.interrupted else None)
        finally:
            state.interrupted = False


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


def _lost(states: Sequence[_State], least: int = 1) -> str:
    reasons = "; ".join(f"{s.server.url}: {s.lost}" for s in states if s.lost)
    left = sum(not s.lost for s in states)
    return (
        f"rollout.min_servers: expected at least {least} vLLM servers that answer, got {left} of "
        f"{len(states)} ({reasons}); look at their logs, or raise rollout.server_timeout_s"
    )


def _seed(seed: int, job: Job) -> int:
    """63 bits that differ for every request, and every time it is drawn again or goes on."""
    words = [seed, job.request.uid]
    drawn = len(job.begun.response_tokens) if job.begun else 0
    if job.redrawn or drawn:
        words += [job.redrawn, drawn]
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
