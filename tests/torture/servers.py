"""Servers that die, stall and come back while a run is steps ahead of them, and the run as well.

Two vLLM servers, started by others; events at random moments. What must hold whatever happens: the
run goes on, no group of responses is lost or trained on twice, and nothing is older than it may be.
Needs ``SAPO_VLLM_PYTHON``, the Python of an environment with vLLM.
"""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.lost import Run, groups_drawn, groups_trained, two_servers
from tests.support.tiny import read_metrics
from tests.torture import Outcome

EVENTS = 8
"""Of each kind of run."""
KINDS = ((0, "wait"), (1, "wait"), (1, "continue"), (4, "continue"))
"""``rollout.async_steps`` and ``rollout.on_new_weights``."""


def trials(seed: int, folder: Path) -> Iterator[Outcome]:
    """A trial an event; the last of a run says what is wrong with what was trained on."""
    draw = random.Random(seed)
    changes: dict[str, dict[str, Any]] = {
        "train": {"steps": 10_000, "num_mini_batches": 1},
        "checkpoint": {"every": 1},
        "logging": {"dump_every": 1},
    }
    with ThreadPoolExecutor(1) as threads, two_servers(folder, **changes) as servers:
        for ahead, on_new_weights in KINDS:
            words = [f"rollout.async_steps={ahead}", f"rollout.on_new_weights={on_new_weights}"]
            run, told = Run(threads, folder, *words), []
            for number in range(EVENTS):
                event = draw.choice((_kill_server, _stall_server, _kill_run, _stop_run))
                told.append(f"{' '.join(words)}, event {number + 1}: {event.__name__.strip('_')}")
                try:
                    run.goes_on(draw.randint(1, 2))
                    time.sleep(draw.random())
                    run = event(run, draw.choice(servers))
                except AssertionError as error:
                    yield Outcome(trial=told[-1], problem=f"the run ended: {error}")
                    return
                if number < EVENTS - 1:
                    yield Outcome(trial=told[-1])
            run.goes_on(2)
            run.stop()
            yield Outcome(trial=told[-1], problem=_problem(run.path, ahead))
            shutil.rmtree(run.path.parent)


def _kill_server(run: Run, server: Any) -> Run:
    server.signal(signal.SIGKILL)
    run.goes_on(1)
    server.start()
    run.until(server.answers)
    return run


def _stall_server(run: Run, server: Any) -> Run:
    server.signal(signal.SIGSTOP)
    run.goes_on(1)
    server.signal(signal.SIGCONT)
    return run


def _kill_run(run: Run, server: Any) -> Run:
    run.kill()
    return run.resumed()


def _stop_run(run: Run, server: Any) -> Run:
    done = run.stop()
    assert done.returncode == 0, done.stderr
    assert not done.left, done.left
    return run.resumed()


def _problem(run: Path, ahead: int) -> str:
    lines = read_metrics(run)
    numbers = [line["step"] for line in lines]
    if numbers != list(range(1, len(lines) + 1)):
        return f"steps {numbers}"
    trained, expected = groups_trained(run, numbers), groups_drawn(run, numbers)
    wrong = {g: (trained.get(g), expected.get(g)) for g in {*trained, *expected}}
    if wrong := {g: pair for g, pair in wrong.items() if pair[0] != pair[1]}:
        return f"responses by group, trained on and expected: {wrong}"
    oldest = max(line["rollout/staleness_max"] for line in lines)
    return f"tokens {oldest:.0f} steps old" if oldest > ahead else ""
