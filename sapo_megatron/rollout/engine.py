"""What turns requests into responses, and how it is asked."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sapo_megatron.metrics import Metrics
from sapo_megatron.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to generate."""

    uid: int
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample each response."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """Tokens of which each ends a response, and is its last; at least one."""
    seed: int


Arrived = Callable[[Sample], None]
"""Takes a response."""


class Engine(Protocol):
    """What turns requests into responses: the training model in process, or servers."""

    background: bool
    """Whether :meth:`generate` waits for nothing, neither responses nor other ranks."""
    by_prompt: bool
    """Whether all responses to a prompt are to come from one part of the ranks."""

    def serving(self, *, version: int, record: bool) -> AbstractContextManager[Metrics]:
        """The engine with the policy's present weights; what it took. Collective over all ranks.

        ``version``: the steps behind these weights, which samples tell; ``record``: with routes,
        where it can. An engine in the background goes on with these weights behind the block, also
        with what it has begun under older ones.
        """

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        arrived: Arrived,
        *,
        first: bool = False,
    ) -> Future[Metrics]:
        """Hand the responses to ``arrived``, each when it is there; in the end what happened.

        In any order, fillers among them or not, on the block's leader at least. ``first``: before
        what was asked for earlier and has not begun. Collective over the ranks that share a model
        unless ``background``.
        """

    def spent(self, name: str) -> Metrics:
        """What this rank's servers have spent their time on since the last call.

        On responses as ``name``, on weights as ``time/sync``: each has spans of both, of 0 s where
        it did nothing. Empty where the ranks themselves generate, whose time is part of what
        :meth:`generate` says.
        """


def part_of(
    requests: Sequence[Request], rank: int, size: int, *, together: int = 1
) -> list[Request]:
    """This rank's part of ``requests``, as many on every rank; fillers have uid -1.

    Every ``together`` of them that follow one another are in one part.
    """
    starts = range(0, len(requests), together)
    mine = [
        request for start in starts[rank::size] for request in requests[start : start + together]
    ]
    filler = dataclasses.replace(requests[0], uid=-1)
    return mine + [filler] * (-(-len(starts) // size) * together - len(mine))
