"""What a run remembers of itself between its steps, beside the weights."""

import dataclasses
import math
import time
from collections import defaultdict, deque

from sapo_megatron.metrics import Mean, Metric, Metrics, Variance
from sapo_megatron.routing.variance import LEAST_SWAPS, Estimate, Swaps
from sapo_megatron.runs.state import RunState

ROUTER: dict[str, type[Metric]] = {
    "variance/total": Variance,
    "variance/swaps": Swaps,
    "rollout_train/variance/total": Variance,
    "rollout_train/variance/swaps": Swaps,
    "routing/slot_flip": Mean,
}
"""What the summary says of the router, and the moments behind it."""
SPLITS = {
    "variance": "router share",
    "rollout_train/variance": "router share between engines",
}
WINDOW = 8
"""Steps with a measurement that are pooled: one alone is noisy, and moments merge exactly."""
LONGEST = 128
"""As many are pooled where fewer do not hold the swaps that a share takes."""


class Journal:
    """Scores before training, the router's latest moments, and the time that has passed."""

    def __init__(self, state: RunState | None, *, began: float) -> None:
        """``state``: of the checkpoint that the run goes on from; ``began``: this process's start,
        by the monotonic clock."""
        self.before: dict[str, float] = state.eval if state else {}
        self._began = began - (state.wall_s if state else 0.0)
        self._moments: dict[str, deque[Metric]] = defaultdict(deque)
        held = state.moments if state else {}
        for name, kind in ROUTER.items():
            restored = Swaps.of_numbers if kind is Swaps else lambda sums, kind=kind: kind(*sums)
            self._moments[name].extend(map(restored, held.get(name, ())))

    @property
    def wall_s(self) -> float:
        """Seconds of the whole run so far, with the cold start and what came before a resume."""
        return time.monotonic() - self._began

    def note(self, metrics: Metrics) -> None:
        """Take what a step's gathered metrics say of the router, and add what is pooled of it."""
        for name in ROUTER:
            if name in metrics and math.isfinite(metrics[name].value()):
                self._moments[name].append(metrics[name])
                self._forget(name)
        for split in SPLITS:
            shares = self._shares(split) if f"{split}/swaps" in metrics else {}
            for name, number in _numbers(split, shares, "_pooled").items():
                metrics.add(name, Mean(number, 1.0))

    def router(self) -> dict[str, float]:
        """What the summary says: each number pooled over the last measurements."""
        found = {name: self._pooled(name).value() for name in ROUTER if self._moments[name]}
        for split in SPLITS:
            found |= _numbers(split, self._shares(split))
        return found

    def told(self) -> str:
        """The same in words; empty for a model without experts."""
        words = []
        for split, label in SPLITS.items():
            if shares := self._shares(split):
                words.append(f"{label} {shares['router_share']}")
            elif self._moments[f"{split}/swaps"]:
                swaps = self._pooled(f"{split}/swaps").value()
                words.append(f"{label} unknown ({swaps:.0f} of {LEAST_SWAPS} swaps)")
        if self._moments["routing/slot_flip"]:
            words.append(f"experts changed {self._pooled('routing/slot_flip').value():.2%}")
        return ", ".join(words)

    def moments(self) -> dict[str, list[list[float]]]:
        """The router's moments as a checkpoint keeps them."""
        return {name: [_sums(m) for m in held] for name, held in self._moments.items()}

    def _forget(self, name: str) -> None:
        """What the window does without: beyond ``WINDOW``, and with enough swaps in the rest."""
        held = self._moments[name]
        while len(held) > WINDOW:
            rest = sum(m.value() for m in held) - held[0].value()
            if ROUTER[name] is Swaps and rest < LEAST_SWAPS and len(held) <= LONGEST:
                break
            held.popleft()

    def _shares(self, split: str) -> dict[str, Estimate]:
        if not self._moments[f"{split}/swaps"]:
            return {}
        pooled = self._pooled(f"{split}/swaps")
        assert isinstance(pooled, Swaps)
        return pooled.shares()

    def _pooled(self, name: str) -> Metric:
        first, *rest = self._moments[name]
        for metric in rest:
            first = first.merge(metric)
        return first


def _numbers(split: str, shares: dict[str, Estimate], kind: str = "") -> dict[str, float]:
    """``SPLIT/NAME_KIND`` of each, and the same with ``_low`` and ``_high``."""
    return {
        f"{split}/{name}{kind}{end}": number
        for name, share in shares.items()
        for end, number in (("", share.value), ("_low", share.low), ("_high", share.high))
    }


def _sums(metric: Metric) -> list[float]:
    if isinstance(metric, Swaps):
        return metric.products.flatten().tolist()
    return list(dataclasses.astuple(metric))
