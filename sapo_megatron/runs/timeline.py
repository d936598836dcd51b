"""What each rank and server did when: ``timeline.json``, for Perfetto and for the report.

The file is in the Chrome trace format: one event for each time that a stage of ``time/*`` took, and
for each step, in the rows of ranks and of servers. Times are microseconds from the run's start, by
the clocks of the machines.
"""

import json
from collections import deque
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict

from sapo_megatron.errors import UserError, with_type
from sapo_megatron.files import write_whole
from sapo_megatron.metrics import Metrics, Span, now
from sapo_megatron.runs.samples import ShownGroup

STEPS = 50
"""The last steps, which the file holds: it is written anew with each."""
STAGE, STEP, RANK = "time/", "step", "rank "


class Event(BaseModel):
    """A stage of a step, where and when it was."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    step: int
    stage: str
    """Of ``time/*``, or ``STEP`` for a whole one."""
    where: str
    begin: float
    """Seconds from the run's start."""
    seconds: float

    @property
    def end(self) -> float:
        return self.begin + self.seconds


class TimelineTracker:
    """Writes the file."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "timeline.json"
        self._began = now()
        self._rows: dict[str, tuple[int, int]] = {}
        """Process and thread of a trace, by rank or server."""
        self._names: list[str] = []
        self._steps: deque[list[str]] = deque(maxlen=STEPS)

    def show(self, step: int, groups: Sequence[ShownGroup]) -> None:
        """It is for times."""

    def log(self, step: int, metrics: Metrics) -> None:
        lines = [
            self._line(step, STEP if name == "perf/step_s" else name.removeprefix(STAGE), span)
            for name, spans in metrics.spans().items()
            for span in spans
            if span[2] > 0
        ]
        self._steps.append(lines)
        events = ",\n".join([*self._names, *chain(*self._steps)])
        write_whole(self._path, f"[\n{events}\n]\n")

    def close(self, failed: bool) -> None:
        """The file is whole after every step."""

    def _line(self, step: int, stage: str, span: Span) -> str:
        where, begin, seconds = span
        if where not in self._rows:
            kind = int(not where.startswith(RANK))
            self._rows[where] = kind, len(self._rows)
            self._names += _named(where, *self._rows[where])
        pid, tid = self._rows[where]
        times = {"ts": round((begin - self._began) * 1e6), "dur": round(seconds * 1e6)}
        event = {"name": stage, "ph": "X", **times, "pid": pid, "tid": tid, "args": {"step": step}}
        return _json(event)


def idle_shares(metrics: Metrics) -> dict[str, float]:
    """``perf/rollout_idle`` and ``perf/train_idle`` of a step, from all ranks' metrics.

    The share of the step's time in which nothing is generated, in the mean over servers or, without
    any, over the ranks; and that in which no log-prob or update is computed.
    """
    held = metrics.spans()
    begin = min(at for _, at, _ in held["perf/step_s"])
    end = max(at + seconds for _, at, seconds in held["perf/step_s"])
    busy = {
        "rollout": held.get("time/rollout", ()),
        "train": (*held.get("time/logprob", ()), *held.get("time/update", ())),
    }
    return {
        f"perf/{name}_idle": 1 - _busy(spans, begin, end) / (end - begin)
        for name, spans in busy.items()
    }


def read_timeline(path: Path) -> list[Event]:
    """The events of a file; none where there is no file. Raises UserError for a damaged one."""
    if not path.exists():
        return []
    try:
        events = json.loads(path.read_text())
        if not isinstance(events, list):
            raise TypeError("no list")
        rows = {
            (event["pid"], event["tid"]): event["args"]["name"]
            for event in events
            if event["name"] == "thread_name"
        }
        return [
            Event(
                step=event["args"]["step"],
                stage=event["name"],
                where=rows[event["pid"], event["tid"]],
                begin=event["ts"] / 1e6,
                seconds=event["dur"] / 1e6,
            )
            for event in events
            if event["ph"] == "X"
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected the events of a run's steps, got {with_type(error, 200)}; "
            f"remove the file"
        ) from None


def _busy(spans: Sequence[Span], begin: float, end: float) -> float:
    """Seconds between ``begin`` and ``end``, in the mean over where the spans are."""
    seconds = dict.fromkeys((where for where, _, _ in spans), 0.0)
    for where, at, duration in spans:
        seconds[where] += max(0.0, min(at + duration, end) - max(at, begin))
    return fmean(seconds.values()) if seconds else 0.0


def _named(where: str, pid: int, tid: int) -> list[str]:
    """The names of a row and of the group that it belongs to, and its place in that."""
    names: dict[str, dict[str, Any]] = {
        "process_name": {"name": ("ranks", "servers")[pid]},
        "thread_name": {"name": where},
        "thread_sort_index": {"sort_index": tid},
    }
    return [
        _json({"name": n, "ph": "M", "pid": pid, "tid": tid, "args": a}) for n, a in names.items()
    ]


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))
