"""The requests that servers work on, and which server takes which next."""

from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sapo_megatron.errors import RunFailed
from sapo_megatron.metrics import Metrics, Sum
from sapo_megatron.rollout.engine import Arrived, Request, SamplingParams
from sapo_megatron.sample import Sample

ATTEMPTS = 3
"""How often a request is sent before the failure is taken to be its own."""
UNUSABLE_SHARE, UNUSABLE_LEAST = 0.01, 3
"""Responses without usable log-probs beyond this share of a batch, and this number, are no
accident."""


@dataclass(eq=False)
class Batch:
    """Requests that were made together."""

    requests: Sequence[Request]
    params: SamplingParams
    arrived: Arrived
    done: Future[Metrics] = field(default_factory=Future)
    """Once all are answered: what happened."""
    answered: int = 0
    redrawn: int = 0
    """Responses that could not be used, and were drawn again."""


@dataclass(eq=False)
class Job:
    """One request, until it is answered."""

    batch: Batch
    request: Request
    begun: Sample | None = None
    """What servers have drawn of the response before new weights came."""
    failures: int = 0
    failed_at: str = ""
    """The server of the last of them."""
    redrawn: int = 0


class Work:
    """Batches whose requests wait, are under way, or are answered.

    Older batches come first. All requests with one prompt wait for the server that has begun on it,
    which keeps what it has computed of the prompt; one that has nothing left to do takes some from
    the server with the most.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        """Those with requests that are not answered."""
        self._free: deque[deque[Job]] = deque()
        self._begun: defaultdict[str, deque[Job]] = defaultdict(deque)

    @property
    def waiting(self) -> int:
        """Requests that no server works on."""
        return sum(map(len, (*self._free, *self._begun.values())))

    def add(self, batch: Batch, *, first: bool) -> None:
        """Take requests on, behind all others or before those that no server has begun with."""
        if not batch.requests:
            batch.done.set_result(Metrics())
            return
        groups: deque[deque[Job]] = deque()
        for request in batch.requests:
            job = Job(batch, request)
            if groups and groups[-1][0].request.prompt_tokens == request.prompt_tokens:
                groups[-1].append(job)
            else:
                groups.append(deque([job]))
        self.batches.append(batch)
        self._free = groups + self._free if first else self._free + groups

    def take(self, url: str, *, alone: bool) -> Job | None:
        """The next request for a server; None where nothing waits for it.

        ``alone``: whether there is no other, which what has failed here is left to.
        """
        mine = self._begun[url]
        if not mine:
            groups = (g for g in self._free if alone or g[0].failed_at != url)
            if group := next(groups, None):
                self._free.remove(group)
                mine.extend(group)
        if mine:
            return mine.popleft()
        longest = max(self._begun.values(), key=len)
        return longest.pop() if longest else None

    def put_back(self, job: Job) -> None:
        """Have a request that was taken be the next for any server."""
        self._free.appendleft(deque([job]))

    def lose(self, url: str) -> None:
        """What waits for a server that is away waits for any."""
        if mine := self._begun.pop(url, None):
            self._free.appendleft(mine)

    def answer(self, job: Job, sample: Sample) -> None:
        batch = job.batch
        batch.arrived(sample)
        batch.answered += 1
        if batch.answered == len(batch.requests):
            self.batches.remove(batch)
            metrics = Metrics()
            metrics.add("rollout/redrawn", Sum(float(batch.redrawn)))
            batch.done.set_result(metrics)

    def fail(self, job: Job, url: str, reason: str) -> None:
        """Put a request back. Raises RunFailed when it has failed too often."""
        job.failures += 1
        job.failed_at = url
        if job.failures == ATTEMPTS:
            raise RunFailed(
                f"{url}: expected a response to request {job.request.uid}, got its failure number "
                f"{ATTEMPTS}: {reason}; look at the server's log"
            )
        self.put_back(job)

    def draw_again(self, job: Job, url: str, reason: str) -> None:
        """Put a request back that got a response which cannot be used.

        Raises RunFailed where there are many.
        """
        batch, requests = job.batch, len(job.batch.requests)
        job.redrawn += 1
        batch.redrawn += 1
        most = max(UNUSABLE_LEAST, int(UNUSABLE_SHARE * requests))
        if batch.redrawn > most:
            raise RunFailed(
                f"{url}: {reason}, and so in {batch.redrawn} of {requests} responses, expected at "
                f"most {most}; look at the server's log and at its weights"
            )
        self.put_back(job)

    def end(self, error: BaseException) -> None:
        """Give up on all that is not answered, for this reason."""
        batches, self.batches = self.batches, []
        self._free.clear()
        self._begun.clear()
        for batch in batches:
            batch.done.set_exception(error)
