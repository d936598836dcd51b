"""Writers of a run's metrics and samples: files always, TensorBoard and W&B on request.

Only rank 0 builds these. ``metrics.jsonl`` holds one JSON object per step: ``step`` and the flat
metric names; what is not finite is null. A histogram stands under its name as
``{"hist": {"edges": [n + 1 numbers], "counts": [n integers]}}``, the points of a scatter plot as
``{"points": [[x, y], ...]}``; edges and points to six digits.

Without its line a step is lost, so a run that cannot write it ends; any other tracker that fails is
logged once and dropped.
"""

import json
import logging
import math
import os
import statistics
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np

from sapo_megatron.errors import RunFailed, with_type
from sapo_megatron.files import write_whole
from sapo_megatron.metrics import Metrics
from sapo_megatron.recipe.schema import LoggingConfig
from sapo_megatron.runs.history import add_lines, keep_lines
from sapo_megatron.runs.samples import NAME, ShownGroup, ShownResponse, excerpt
from sapo_megatron.runs.timeline import TimelineTracker

logger = logging.getLogger(__name__)

WANDB_REACH_S = 5.0
"""Seconds to find out whether the W&B server can be reached, before going offline."""
WANDB_INIT_S = 30.0
WANDB_FINISH_S = 60.0
"""Seconds that uploads may take after the last step; what is left stays on disk."""


class Tracker(Protocol):
    """One destination. Any method may raise; the owner then drops the tracker."""

    def show(self, step: int, groups: Sequence[ShownGroup]) -> None: ...

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self, failed: bool) -> None:
        """Flush and let go; ``failed`` says that the run ended with an error."""


class RunTrackers:
    """Every tracker of one run.

    ``resume_step`` is the first step that this process will log: what an earlier process wrote
    for it and later steps is dropped. None starts afresh. ``recipe`` is the resolved recipe as
    plain data; W&B shows it as the run's configuration.

    Raises OSError when ``metrics.jsonl`` cannot be opened, since nothing else in the run folder
    would then work either.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        recipe: dict[str, Any],
        *,
        resume_step: int | None = None,
    ) -> None:
        self._lines = JsonlTracker(run_dir / "metrics.jsonl", resume_step=resume_step)
        self._trackers: dict[str, Tracker] = {"timeline": TimelineTracker(run_dir)}
        self._start("samples", lambda: SamplesTracker(run_dir, resume_step=resume_step))
        if config.tensorboard:
            self._start("TensorBoard", lambda: TensorBoardTracker(run_dir, resume_step=resume_step))
        if config.wandb:
            self._start("W&B", lambda: WandbTracker(run_dir, config, recipe, resume_step))

    def show(self, step: int, groups: Sequence[ShownGroup]) -> None:
        """Write what a step is about to train on; before its metrics, or not at all."""
        self._each(step, lambda tracker: tracker.show(step, groups))

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one step's metrics, already gathered over the ranks; once for each step.

        Raises RunFailed where ``metrics.jsonl`` cannot be written.
        """
        self._lines.log(step, metrics)
        self._each(step, lambda tracker: tracker.log(step, metrics))

    def close(self, *, failed: bool = False) -> None:
        """Flush and close; ``failed`` marks the run as failed where a tracker can show it."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.close(failed)
            except Exception as error:
                logger.warning("%s failed while closing: %s", name, with_type(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _each(self, step: int, write: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                write(tracker)
            except Exception as error:
                del self._trackers[name]
                dropped = "%s failed at step %d and is dropped: %s"
                logger.warning(dropped, name, step, with_type(error))

    def _start(self, name: str, build: Callable[[], Tracker]) -> None:
        try:
            self._trackers[name] = build()
        except Exception as error:
            without = "%s did not start, the run goes on without it: %s"
            logger.warning(without, name, with_type(error))


class JsonlTracker:
    """One JSON object per step, on the disk at once, so that no step is lost that was logged."""

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        keep_lines(path, (resume_step or 1) - 1)
        self._path = path

    def log(self, step: int, metrics: Metrics) -> None:
        """Raises RunFailed where the line cannot be written; then there is none of it."""
        record: dict[str, Any] = {"step": step}
        record |= {n: v if math.isfinite(v) else None for n, v in metrics.values().items()}
        for name, h in metrics.histograms().items():
            record[name] = {"hist": {"edges": _rounded(h.edges), "counts": h.counts.tolist()}}
        for name, p in metrics.points().items():
            record[name] = {"points": [_rounded(pair) for pair in p.pairs()]}
        try:
            add_lines(self._path, json.dumps(record, allow_nan=False).encode("ascii") + b"\n")
        except OSError as error:
            raise RunFailed(
                f"{self._path}: the line of step {step} could not be written "
                f"({error.strerror}); make room and go on with --resume auto"
            ) from None


class SamplesTracker:
    """A JSON object per group of a step, as in :mod:`sapo_megatron.runs.samples`."""

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        self._path = run_dir / NAME
        if self._path.exists():
            keep_lines(self._path, (resume_step or 1) - 1)

    def show(self, step: int, groups: Sequence[ShownGroup]) -> None:
        lines = "".join(json.dumps(group.model_dump(), allow_nan=False) + "\n" for group in groups)
        add_lines(self._path, lines.encode("ascii"))

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics are elsewhere."""

    def close(self, failed: bool) -> None:
        """The file is whole after every step."""


class TensorBoardTracker:
    """Scalars and histograms as event files under ``<run>/tensorboard``; it has no scatter plot."""

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step)

    def show(self, step: int, groups: Sequence[ShownGroup]) -> None:
        """It is for numbers."""

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.values().items():
            self._writer.add_scalar(name, value, step)
        for name, h in metrics.histograms().items():
            counts = h.counts.tolist()
            if not sum(counts):
                continue
            # TensorBoard wants moments as well; those of the bins' centres stand in for them.
            centres = [(a + b) / 2 for a, b in zip(h.edges, h.edges[1:], strict=False)]
            self._writer.add_histogram_raw(
                name,
                min=h.edges[0],
                max=h.edges[-1],
                num=sum(counts),
                sum=sum(n * c for n, c in zip(counts, centres, strict=True)),
                sum_squares=sum(n * c * c for n, c in zip(counts, centres, strict=True)),
                bucket_limits=list(h.edges[1:]),
                bucket_counts=counts,
                global_step=step,
            )
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbTracker:
    """A W&B run; offline, under ``<run>/wandb``, when there is no key or no way to the server.

    The key comes from WANDB_API_KEY and nowhere else; WANDB_MODE=offline and disabled are
    respected. ``wandb sync`` uploads an offline run later. A resumed run keeps its W&B id.
    """

    def __init__(
        self, run_dir: Path, config: LoggingConfig, recipe: dict[str, Any], resume_step: int | None
    ) -> None:
        import wandb

        self._wandb = wandb
        arguments: dict[str, Any] = {
            "project": config.wandb_project,
            "name": config.wandb_name or run_dir.name,
            "id": _wandb_id(run_dir / "wandb" / "run_id", resuming=resume_step is not None),
            "dir": str(run_dir),
            "config": recipe,
            "reinit": "finish_previous",
            "settings": wandb.Settings(
                silent=True,
                console="off",
                init_timeout=WANDB_INIT_S,
                finish_timeout=WANDB_FINISH_S,
            ),
        }
        mode = _wandb_mode()
        try:
            resume: Literal["allow"] | None = "allow" if mode == "online" else None
            self._run = wandb.init(mode=mode, resume=resume, **arguments)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B goes offline: %s", with_type(error))
            wandb.teardown()  # else the service still holds the run's id
            mode = "offline"
            self._run = wandb.init(mode=mode, **arguments)
        where = self._run.url if mode == "online" else Path(self._run.dir).parent
        logger.info("W&B (%s): %s", mode, where)

    def show(self, step: int, groups: Sequence[ShownGroup]) -> None:
        """A table with a row for each response."""
        columns: list[str | int] = ["picked", "prompt", "answer", *ShownResponse.model_fields]
        rows = [
            [group.picked, excerpt(group.prompt), excerpt(group.answer), excerpt(response.text)]
            + [value for name, value in response if name != "text"]
            for group in groups
            for response in group.responses
        ]
        self._run.log({"samples": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def log(self, step: int, metrics: Metrics) -> None:
        record: dict[str, Any] = metrics.values()
        for name, h in metrics.histograms().items():
            record[name] = self._wandb.Histogram(
                np_histogram=(h.counts.cpu().numpy(), np.array(h.edges))
            )
        for name, p in metrics.points().items():
            table = self._wandb.Table(columns=["x", "y"], data=p.pairs())
            record[name] = self._wandb.plot.scatter(table, "x", "y", title=name)
        self._run.log(record, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Progress:
    """One log line per step: where the run stands and how long it will take.

    The time left is the median of the recent steps times the steps to come, so a slow first step,
    an evaluation or a checkpoint does not throw it off.
    """

    SHOWN = (
        ("reward/mean", "reward {:.3f}"),
        ("reward/groups_left", "groups {:.0f}"),
        ("response/length_mean", "length {:.1f}"),
        ("perf/tokens_per_s", "{:,.0f} tokens/s"),
        ("actor/pg_loss", "loss {:+.4f}"),
        ("ratio/log_var", "log_var {:.1e}"),
    )
    """Metric and how it is shown; one that a step lacks is left out."""

    def __init__(
        self, steps: int, *, window: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``steps`` is the number of the last step; build it right before the first one."""
        self._steps = steps
        self._clock = clock
        self._last = clock()
        self._durations: deque[float] = deque(maxlen=window)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log the line of a step that has just ended."""
        now = self._clock()
        self._durations.append(now - self._last)
        self._last = now
        values = metrics.values()
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        parts += [form.format(values[name]) for name, form in self.SHOWN if name in values]
        unscored = sum(values.get(name, 0.0) for name in ("reward/errors", "reward/timeouts"))
        parts += [f"reward errors {unscored:.0f}"] if unscored else []
        parts += [f"{n} {v:.3f}" for n, v in values.items() if n.startswith("eval/")]
        left = statistics.median(self._durations) * (self._steps - step)
        logger.info("%s", " | ".join([*parts, f"left {duration(left)}"]))


def duration(seconds: float) -> str:
    """``5s``, ``3m12s``, ``2h05m``, ``3d04h``."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def _wandb_id(path: Path, *, resuming: bool) -> str:
    """The W&B id kept in the run folder; a new one unless ``resuming``."""
    if resuming and path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    found = uuid.uuid4().hex[:8]
    write_whole(path, found)
    return found


def _wandb_mode() -> Literal["online", "offline", "disabled"]:
    """``online`` where that can work and WANDB_MODE does not ask for another."""
    asked = os.environ.get("WANDB_MODE")
    if asked == "disabled":
        return "disabled"
    if asked in ("offline", "dryrun"):
        return "offline"
    if not os.environ.get("WANDB_API_KEY"):
        logger.info("W&B goes offline: WANDB_API_KEY is not set")
        return "offline"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _reachable(server, WANDB_REACH_S):
        logger.warning("W&B goes offline: no answer from %s in %g s", server, WANDB_REACH_S)
        return "offline"
    return "online"


def _reachable(url: str, timeout_s: float) -> bool:
    """Whether a server answers at all. In a thread, since looking up a name knows no timeout."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=timeout_s).close()
        except urllib.error.HTTPError:  # an answer, if not a friendly one
            pass
        except (OSError, ValueError):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)


def _rounded(numbers: Iterable[float]) -> list[float]:
    """The numbers to six significant digits."""
    return [float(f"{x:.6g}") for x in numbers]
