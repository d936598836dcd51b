"""When a server was at work."""

from collections.abc import Iterator
from contextlib import contextmanager

from sapo_megatron.metrics import now


class Clock:
    """When something was going on."""

    def __init__(self) -> None:
        self._running = 0
        self._since = now()
        self._spans: list[tuple[float, float]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """It is going on during the block, of which there may be several at a time."""
        if not self._running:
            self._since = now()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._spans.append((self._since, now() - self._since))

    def take(self) -> list[tuple[float, float]]:
        """Begin and seconds of each time since the last call, up to now where it is going on.

        One of 0 s where there was none.
        """
        if self._running:
            moment = now()
            self._spans.append((self._since, moment - self._since))
            self._since = moment
        spans, self._spans = self._spans or [(now(), 0.0)], []
        return spans
