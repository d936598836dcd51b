"""Rewards: a verifier's score for each response, whatever the verifier does.

Verifiers run in worker processes of their own, because nothing less stops all that they do: a
signal cannot end a loop inside C code (a huge power, a regular expression) and is swallowed by a
bare ``except``, a thread cannot be killed, and neither survives a crash or an ``os._exit``. The
worker is started afresh rather than forked, since a training process has threads, sockets and maybe
a GPU that must not be copied; it is killed and replaced when a response takes too long. What it
costs is a message per response, tens of microseconds.
"""

import logging
import multiprocessing
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from sapo_megatron.errors import UserError
from sapo_megatron.metrics import Metrics, Sum
from sapo_megatron.recipe.schema import RewardConfig
from sapo_megatron.rollout.verifiers import exact_match, judge
from sapo_megatron.sample import Group, Prompt

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Seconds that a worker may take to import the reward function."""


class Scorer:
    """Scores responses with ``reward.function``; close it, or use it in a ``with`` statement.

    ``module:function`` is imported, from the working folder or the Python path, and called as
    ``function(prompt: Prompt, response: str) -> float`` in ``num_workers`` processes; the responses
    to one prompt go to one of them, one after the other. A response whose scoring raises, gives no
    finite number, crashes or takes longer than ``timeout_s`` scores 0 and is counted; the first
    failure of each kind is logged.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Raises UserError when the function cannot be imported."""
        self._config = config
        self._logged: set[str] = set()
        # exact_match can neither hang nor crash: it needs no process.
        self._workers = [] if config.function == "exact_match" else [_Worker(config)]
        # The worker that runs is on top; those below it start when they are needed.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for worker in [*[None] * (config.num_workers - 1), *self._workers]:
            self._idle.put(worker)

    def score(self, groups: Sequence[Group]) -> Metrics:
        """Set the ``reward`` of every sample from its ``text``.

        Returns ``reward/errors`` and ``reward/timeouts``: sums, present also where they are 0.
        """
        errors = timeouts = 0
        with ThreadPoolExecutor(self._config.num_workers) as threads:
            judged = list(threads.map(self._judge, groups))
        for group, verdicts in zip(groups, judged, strict=True):
            for sample, (reward, problem) in zip(group.samples, verdicts, strict=True):
                sample.reward = reward
                if problem:
                    timed_out = problem == _TIMED_OUT
                    timeouts += timed_out
                    errors += not timed_out
                    self._log(problem, group.prompt)
        metrics = Metrics()
        metrics.add("reward/errors", Sum(float(errors)))
        metrics.add("reward/timeouts", Sum(float(timeouts)))
        return metrics

    def close(self) -> None:
        """End the worker processes; the scorer cannot be used afterwards."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _judge(self, group: Group) -> list[tuple[float, str]]:
        """A (reward, problem) for each sample, by a worker that is idle."""
        responses = [sample.text for sample in group.samples]
        if not self._workers:
            return [judge(exact_match, group.prompt, response) for response in responses]
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self._config)
                self._workers.append(worker)
            return worker.judge(group.prompt, responses)
        finally:
            self._idle.put(worker)

    def _log(self, problem: str, prompt: Prompt) -> None:
        kind = problem.split(":")[0]
        if kind in self._logged:
            return
        self._logged.add(kind)
        logger.warning(
            "reward.function %s, problem %d (%s): %s; it scores 0 and is counted, and others like "
            "it are not logged",
            self._config.function,
            prompt.uid,
            prompt.task,
            problem,
        )


_TIMED_OUT = "took longer than reward.timeout_s"


class _Worker:
    """A process that calls the reward function, and its replacements."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._start()

    def judge(self, prompt: Prompt, responses: list[str]) -> list[tuple[float, str]]:
        """A (reward, problem) for each response; a stuck or dead process costs one of them."""
        assert not self._connection.closed, "the scorer is closed"
        verdicts: list[tuple[float, str]] = []
        while len(verdicts) < len(responses):
            try:
                self._connection.send((prompt, responses[len(verdicts) :]))
                while len(verdicts) < len(responses):
                    if not self._connection.poll(self._config.timeout_s):
                        raise TimeoutError
                    verdicts.append(self._connection.recv())
            except TimeoutError:
                verdicts.append((0.0, _TIMED_OUT))
                self._restart()
            except (EOFError, OSError):
                self._process.wait()
                status = self._process.returncode
                verdicts.append((0.0, f"the process ended: exit status {status}"))
                self._restart()
        return verdicts

    def stop(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _restart(self) -> None:
        self.stop()
        self._start()

    def _start(self) -> None:
        function, timeout_s = self._config.function, self._config.timeout_s
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            command = [sys.executable, "-m", "sapo_megatron.rollout.verifiers"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), function, str(timeout_s)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        problem = self._hello(self._connection)
        if problem:
            self.stop()
            raise UserError(f"reward.function: {function}: {problem}")

    def _hello(self, connection: Connection) -> str:
        """Wait until the process is ready; what kept it from it, or nothing."""
        try:
            if connection.poll(START_TIMEOUT_S):
                return connection.recv()
        except (EOFError, OSError):
            return f"the process that imports it ended: exit status {self._process.wait()}"
        return f"expected it to be imported within {START_TIMEOUT_S:g} s"
