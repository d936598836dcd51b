"""What counts as a collapse, and as steadier: settled before the runs were made.

- A run *collapses* if it fails (a loss or gradient that is not finite ends it), if its ratios,
  their variance, loss or gradient norm are not finite at any step, or if its *end*, the mean
  held-out avg@k of its last three evaluations, is below the avg@k of the cold start by more than
  the latter's standard error (between problems: sqrt(p (1 - p) / problems), as if the samples of a
  problem were all alike).
- Its *fall* is its best avg@k, that of the cold start included, less its end.
- Of two losses under the same conditions the *steadier* one collapses on fewer seeds; with as many
  collapses, it falls less on every seed, and by more than the standard error on average.
- The *better* one has the higher end on every seed, and by more than the standard error on average.
- In all other cases the study cannot tell. Two losses that are alike are ordered the same way on
  three seeds in one of four cases, so that one comparison alone is weak evidence.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.studies.stability.cases import PROBLEMS

LAST = 3
"""Evaluations whose mean is the end of a run."""


@dataclass(frozen=True)
class Verdict:
    """What a run came to."""

    before: float
    end: float
    fall: float
    collapsed: bool


def verdict(run: dict[str, Any]) -> Verdict:
    """Of a run of ``results.json``."""
    scores = [score for _, score in run["curve"]]
    before, end = scores[0], statistics.fmean(scores[-LAST:])
    low = end < before - standard_error(before)
    collapsed = run["failed"] is not None or not run["finite"] or low
    return Verdict(before, end, max(scores) - end, collapsed)


def standard_error(score: float) -> float:
    return math.sqrt(score * (1 - score) / PROBLEMS)


def steadier(ours: Sequence[Verdict], theirs: Sequence[Verdict]) -> int:
    """1: ours is, -1: theirs is, 0: cannot tell. Each by seed, in one order."""
    fewer = sum(v.collapsed for v in theirs) - sum(v.collapsed for v in ours)
    if fewer:
        return 1 if fewer > 0 else -1
    return _ordered([t.fall - o.fall for o, t in zip(ours, theirs, strict=True)], ours)


def better(ours: Sequence[Verdict], theirs: Sequence[Verdict]) -> int:
    """1: ours is, -1: theirs is, 0: cannot tell. Each by seed, in one order."""
    return _ordered([o.end - t.end for o, t in zip(ours, theirs, strict=True)], ours)


def _ordered(differences: Sequence[float], of: Sequence[Verdict]) -> int:
    least = statistics.fmean(standard_error(v.before) for v in of)
    mean = statistics.fmean(differences)
    alike = len({d > 0 for d in differences}) == 1 and all(differences)
    return int(math.copysign(1, mean)) if alike and abs(mean) > least else 0
