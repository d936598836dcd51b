"""Runs that are killed again and again, each time gone on with: nothing is lost, nothing differs.

A chain is a run that is ended by SIGKILL at random moments and gone on with by ``--resume auto``
until it is through. What is left is compared with what a run leaves that nobody killed: weights
and optimizer state bit for bit, the line of every step exactly once and the same, and no other
files. Most moments are those before a file is made, renamed, removed or brought to the disk, the
others any time; a kill counts where it hit a process at its work.
"""

import hashlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sapo_megatron.training import loop
from tests.support import whole_runs
from tests.support.gloo import run_ranks
from tests.support.tiny import read_metrics, write_recipe
from tests.torture import Outcome

KILLS = 60
MOST = 7
"""Kills in a chain, behind which the run may end."""
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "every step": (1, {"checkpoint__every": 1, "checkpoint__keep": 1}),
    "every third step": (1, {"checkpoint__every": 3, "logging__dump_every": 2}),
    "generating ahead": (
        1,
        {
            "checkpoint__every": 2,
            "rollout__async_steps": 2,
            "rollout__dynamic_sampling": True,
            "reward__function": "tests.support.tiny:starts_even",
        },
    ),
    "two ranks": (
        2,
        {
            "checkpoint__every": 2,
            "parallel__expert_model_parallel_size": 2,
            "cold_start__steps": 2,
            "cold_start__batch_size": 8,
        },
    ),
}
"""Ranks and settings of each kind of chain."""
STEPS = 6
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


@dataclass(frozen=True)
class Kill:
    """When a rank ends: before a change of a file, by their count, or after a time."""

    rank: int
    change: int | None
    seconds: float


@dataclass(frozen=True)
class Left:
    """What a run left that went through."""

    digests: list[str]
    """Of weights and optimizer state, by rank."""
    lines: list[dict[str, Any]]
    """Of metrics, and of samples."""
    files: list[str]


def trials(seed: int, folder: Path) -> Iterator[Outcome]:
    """A trial a kill; the last of a chain says what is wrong with what the chain left."""
    draw = random.Random(seed)
    whole: dict[str, tuple[Left, int, float]] = {}
    kills = chain = 0
    while kills < KILLS:
        kind = list(KINDS)[chain % len(KINDS)]
        if kind not in whole:
            began = time.monotonic()
            left, changes = _attempt(kind, folder / kind, None)
            whole[kind] = left, changes, time.monotonic() - began
        for outcome in _chain(kind, folder / f"chain {chain}", draw, *whole[kind]):
            yield outcome
            kills += 1
        chain += 1


def _chain(
    kind: str, place: Path, draw: random.Random, whole: Left, changes: int, seconds: float
) -> Iterator[Outcome]:
    hits: list[str] = []
    left, problem = None, ""
    while not left and not problem:
        change = draw.randrange(1, changes) if draw.random() < 0.75 else None
        kill = Kill(draw.randrange(KINDS[kind][0]), change, draw.random() * seconds)
        try:
            left, _ = _attempt(kind, place, kill if len(hits) < MOST else None)
        except RuntimeError as error:
            if not (place / "killed").exists():
                problem = str(error)
            (place / "killed").unlink(missing_ok=True)
            hits.append(f"{kind}, {place.name}, kill {len(hits) + 1}: {asdict(kill)}")
    for name, expected in asdict(whole).items() if left else ():
        got = getattr(left, name)
        if name == "files":  # killed behind its last checkpoint, a run keeps the one before
            oldest = next(path for path in expected if path.startswith("checkpoints/step-"))
            got = [path for path in got if not "checkpoints/step-" <= path < oldest]
        if got != expected:
            problem += f"other {name}: {got} instead of {expected}; "
    for number, hit in enumerate(hits, 1):
        yield Outcome(trial=hit, problem=problem if number == len(hits) else "")


def _attempt(kind: str, place: Path, kill: Kill | None) -> tuple[Left, int]:
    """What a run leaves that is begun or gone on with, and its changes of files on the first rank.

    Raises RuntimeError where a rank ends before that.
    """
    ranks, settings = KINDS[kind]
    if not place.exists():
        write_recipe(place)
    results = run_ranks(ranks, _go_on, place, settings, kill)
    run = place / "run"
    lines = [
        {name: value for name, value in line.items() if not name.startswith(("time/", "perf/"))}
        for line in read_metrics(run)
    ]
    lines += [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    # What runs share is named after the model's folder, too; a name left in use goes with the next,
    # and what ranks say of one that was killed stays.
    paths = (path for path in run.rglob("*") if path.name not in ("in-use", "errors.txt"))
    found = (str(path.relative_to(run)) for path in paths)
    files = sorted(re.sub("-[0-9a-f]{10}", "", name) for name in found)
    return Left([digest for digest, _ in results], lines, files), results[0][1]


def _go_on(place: Path, settings: dict[str, Any], kill: Kill | None) -> tuple[str, int]:
    """On a rank: (digest, changes of files) of a run that goes through.

    What it says, of the ranks that are killed beside it too, is in ``said``.
    """
    os.dup2(os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    digests, steps = [], loop.run_steps

    def kept(session: Any) -> Any:
        summary = steps(session)
        digests.append(_digest(session.policy))
        return summary

    loop.run_steps = kept
    count = _count(place, kill if kill and kill.rank == int(os.environ["RANK"]) else None)
    own = {"train__run_dir": place / "run", "train__steps": STEPS}
    whole_runs.run(place, "auto", **own, **settings)
    return digests[0], count[0]


def _digest(policy: Any) -> str:
    found = hashlib.sha256()
    held = [p.data for chunk in policy.model.chunks for p in chunk.parameters()]
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            states = [part.optimizer.state[weight] for weight in group["params"]]
            held += [state[name] for state in states for name in sorted(state)]
    for tensor in held:
        found.update(tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def _count(place: Path, kill: Kill | None) -> list[int]:
    """Count this process's changes of files below ``place``, and end it when ``kill`` says."""
    count, sync = [0], os.fsync

    def die() -> None:
        (place / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def changes() -> None:
        count[0] += 1
        if kill and count[0] == kill.change:
            die()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        ours = event in EVENTS and str(args[0]).startswith(f"{place}/run")
        if ours and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)):
            changes()

    def synced(descriptor: int) -> None:
        changes()
        sync(descriptor)

    sys.addaudithook(hook)
    os.fsync = synced
    if kill and kill.change is None:
        timer = threading.Timer(kill.seconds, die)
        timer.daemon = True
        timer.start()
    return count
