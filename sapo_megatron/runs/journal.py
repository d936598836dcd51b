"""What a run remembers of itself between its steps, beside the weights."""

import dataclasses
import math
import time
from collections import defaultdict, deque

from sapo_megatron.metrics import Mean, Metric, Metrics, Share, Variance
from sapo_megatron.runs.state import RunState

ROUTER: dict[str, type[Metric]] = {
    "variance/total": Variance,
    "variance/router_share": Share,
    "routing/slot_flip": Mean,
}
"""What the summary says of the router, and the moments behind it."""
WINDOW = 8
"""Steps with a measurement that are pooled: one alone is noisy, and moments merge exactly."""


class Journal:
    """Scores before training, the router's latest moments, and the time that has passed."""

    def __init__(self, state: RunState | None, *, began: float) -> None:
        """``state``: of the checkpoint that the run goes on from; ``began``: this process's start,
        by the monotonic clock."""
        self.before: dict[str, float] = state.eval if state else {}
        self._began = began - (state.wall_s if state else 0.0)
        self._moments: dict[str, deque[Metric]] = defaultdict(lambda: deque(maxlen=WINDOW))
        held = state.moments if state else {}
        for name, kind in ROUTER.items():
            self._moments[name].extend(kind(*sums) for sums in held.get(name, ()))

    @property
    def wall_s(self) -> float:
        """Seconds of the whole run so far, with the cold start and what came before a resume."""
        return time.monotonic() - self._began

    def note(self, metrics: Metrics) -> None:
        """Take what a step's gathered metrics say of the router, and add what is pooled of it."""
        for name in ROUTER:
            if name in metrics and math.isfinite(metrics[name].value()):
                self._moments[name].append(metrics[name])
        if "variance/router_share" in metrics and self._moments["variance/router_share"]:
            metrics.add("variance/router_share_pooled", self._pooled("variance/router_share"))

    def router(self) -> dict[str, float]:
        """What the summary says: each number pooled over the last ``WINDOW`` measurements."""
        return {name: self._pooled(name).value() for name in ROUTER if self._moments[name]}

    def moments(self) -> dict[str, list[list[float]]]:
        """The router's moments as a checkpoint keeps them."""
        return {
            name: [list(dataclasses.astuple(metric)) for metric in held]
            for name, held in self._moments.items()
        }

    def _pooled(self, name: str) -> Metric:
        first, *rest = self._moments[name]
        for metric in rest:
            first = first.merge(metric)
        return first
