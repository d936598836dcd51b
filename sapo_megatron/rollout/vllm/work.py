"""The requests of one rollout, and which server works on which."""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from sapo_megatron.errors import RunFailed
from sapo_megatron.rollout.engine import Arrived, Request
from sapo_megatron.sample import Sample

ATTEMPTS = 3
"""How often a request is sent before the failure is taken to be its own."""
UNUSABLE_SHARE, UNUSABLE_LEAST = 0.01, 3
"""Responses without usable log-probs beyond this share of the requests, and this number, are no
accident."""


class Work:
    """Requests that wait, are in flight, or are answered.

    All with one prompt wait for the server that has begun on it, which keeps what it has computed
    of the prompt; one that has nothing left to do takes some from the server with the most.
    """

    def __init__(self, requests: Sequence[Request], arrived: Arrived) -> None:
        self.requests = requests
        self.answered = 0
        self._arrived = arrived
        self.done = asyncio.Event()
        self.redrawn: Counter[int] = Counter()
        """How often a request has got a response that cannot be used."""
        self._failures: Counter[int] = Counter()
        self._free: deque[list[int]] = deque()
        self._begun: defaultdict[str, deque[int]] = defaultdict(deque)
        self._changed = asyncio.Condition()
        for index, request in enumerate(requests):
            if index and request.prompt_tokens == requests[index - 1].prompt_tokens:
                self._free[-1].append(index)
            else:
                self._free.append([index])

    async def take(self, url: str) -> int:
        """The next request for a server, once there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free or any(self._begun.values()))
        if not self._begun[url]:
            if self._free:
                self._begun[url].extend(self._free.popleft())
            else:
                longest = max(self._begun.values(), key=len)
                return longest.pop()
        return self._begun[url].popleft()

    async def put_back(self, index: int) -> None:
        """A request that was taken and not sent."""
        async with self._changed:
            self._free.appendleft([index])
            self._changed.notify_all()

    async def lose(self, url: str) -> None:
        """What waits for a server that is away waits for any."""
        async with self._changed:
            self._free.extendleft([index] for index in reversed(self._begun.pop(url, deque())))
            self._changed.notify_all()

    def answer(self, sample: Sample) -> None:
        self._arrived(sample)
        self.answered += 1
        if self.answered == len(self.requests):
            self.done.set()

    async def fail(self, index: int, url: str, reason: str) -> None:
        """Put a request back. Raises RunFailed when it has failed too often."""
        self._failures[index] += 1
        if self._failures[index] == ATTEMPTS:
            raise RunFailed(
                f"{url}: expected a response to request {self.requests[index].uid}, got its "
                f"failure number {ATTEMPTS}: {reason}; look at the server's log"
            )
        await self.put_back(index)

    async def draw_again(self, index: int, url: str, reason: str) -> None:
        """Put a request back that got a response which cannot be used.

        Raises RunFailed where there are many.
        """
        self.redrawn[index] += 1
        most = max(UNUSABLE_LEAST, int(UNUSABLE_SHARE * len(self.requests)))
        if self.redrawn.total() > most:
            raise RunFailed(
                f"{url}: {reason}, and so in {self.redrawn.total()} of {len(self.requests)} "
                f"responses, expected at most {most}; look at the server's log and at its weights"
            )
        await self.put_back(index)
