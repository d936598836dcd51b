"""Rewards: a verifier's score for each response, whatever the verifier does.

Verifiers run in worker processes of their own, because nothing less stops all that they do: a
signal cannot end a loop inside C code (a huge power, a regular expression) and is swallowed by a
bare ``except``, a thread cannot be killed, and neither survives a crash or an ``os._exit``. The
worker is started afresh rather than forked, since a training process has threads, sockets and maybe
a GPU that must not be copied; it is killed, with all that it has started, and replaced when a
response takes too long. What it costs is two messages per response, a fifth of a millisecond.
"""

import json
import logging
import math
import multiprocessing
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

from sapo_megatron.errors import UserError, one_line
from sapo_megatron.metrics import Metrics, Sum
from sapo_megatron.recipe.schema import RewardConfig
from sapo_megatron.rollout.verifiers import exact_match
from sapo_megatron.rollout.worker import judge
from sapo_megatron.sample import Prompt, Sample

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Seconds that a worker may take to import the reward function."""
END_TIMEOUT_S = 10.0
"""Seconds that its guard may take to end all that a worker has started."""
LARGEST = 2**16
"""Bytes of what a worker may say of a response."""


class Scoring(NamedTuple):
    """A sample that is being scored."""

    prompt: Prompt
    sample: Sample
    verdict: Future[tuple[float, str]]


class Scorer:
    """Scores responses with ``reward.function``; close it, or use it in a ``with`` statement.

    ``module:function`` is imported, from the working folder or the Python path, and called as
    ``function(prompt: Prompt, response: str) -> float``, or in the manner of verl or TRL, in
    ``num_workers`` processes, each of which takes the next response when it is done with one. A
    response whose scoring raises, gives no finite number, crashes or takes longer than
    ``timeout_s`` has no reward and is counted; the first failure of each kind is logged.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Raises UserError when the function cannot be imported."""
        self._config = config
        self._logged: set[str] = set()
        self._threads = ThreadPoolExecutor(config.num_workers)
        # exact_match can neither hang nor crash: it needs no process.
        self._workers = [] if config.function == "exact_match" else [_Worker(config)]
        # The worker that runs is on top; those below it start when they are needed.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for worker in [*[None] * (config.num_workers - 1), *self._workers]:
            self._idle.put(worker)

    def begin(self, prompt: Prompt, sample: Sample) -> Scoring:
        """Start to score a sample's ``text``, which :meth:`finish` waits for."""
        return Scoring(prompt, sample, self._threads.submit(self._judge, prompt, sample.text))

    def finish(self, begun: Sequence[Scoring]) -> Metrics:
        """Set the ``reward`` of every sample of these, or ``problem`` where it has none.

        Returns ``reward/errors`` and ``reward/timeouts``: sums, present also where they are 0.
        """
        problems = []
        for prompt, sample, verdict in begun:
            sample.reward, problem = verdict.result()
            sample.problem = problem and self._told(problem, prompt)
            problems += [problem] if problem else []
            kind = problem.split(":")[0]
            if problem and kind not in self._logged:
                self._logged.add(kind)
                logger.warning("%s; it is left out and counted, others silently", sample.problem)
        timeouts = problems.count(_TIMED_OUT)
        metrics = Metrics()
        metrics.add("reward/errors", Sum(float(len(problems) - timeouts)))
        metrics.add("reward/timeouts", Sum(float(timeouts)))
        return metrics

    def try_on(self, prompt: Prompt) -> None:
        """Score a problem's answer. Raises UserError where that gives no reward."""
        _, problem = self._judge(prompt, prompt.answer)
        if problem:
            raise UserError(
                f"{self._told(problem, prompt)}; expected a number for whatever a model may "
                f"respond, here {one_line(prompt.answer, 80)!r}"
            )

    def close(self) -> None:
        """End the worker processes; the scorer cannot be used afterwards."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _judge(self, prompt: Prompt, response: str) -> tuple[float, str]:
        """(reward, problem), by a worker that is idle."""
        if not self._workers:
            return judge(exact_match, prompt, response)
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self._config)
                self._workers.append(worker)
            return worker.judge(prompt, response)
        finally:
            self._idle.put(worker)

    def _told(self, problem: str, prompt: Prompt) -> str:
        task = f" ({prompt.task})" if prompt.task else ""
        return f"reward.function {self._config.function}, problem {prompt.uid}{task}: {problem}"


_TIMED_OUT = "took longer than reward.timeout_s"


class _Worker:
    """A process that calls the reward function, and its replacements."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._start()

    def judge(self, prompt: Prompt, response: str) -> tuple[float, str]:
        """(reward, problem) of a response; a stuck or dead process is replaced."""
        assert not self._connection.closed, "the scorer is closed"
        try:
            self._connection.send((prompt, response))
            if not self._connection.poll(self._config.timeout_s):
                raise TimeoutError
            reward, problem = json.loads(self._connection.recv_bytes(LARGEST))
            return float(reward), str(problem)
        except TimeoutError:
            problem = _TIMED_OUT
            self.stop()
        except (EOFError, OSError, ValueError, TypeError):
            problem = f"the process ended: exit status {self.stop()}"
        self._start()
        return math.nan, problem

    def stop(self) -> int:
        """End the process and all that it has started; its exit status."""
        self._connection.close()
        try:
            return self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _start(self) -> None:
        function = self._config.function
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            command = [sys.executable, "-m", "sapo_megatron.rollout.worker"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), function],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        problem = self._hello()
        if problem:
            self.stop()
            raise UserError(f"reward.function: {function}: {problem}")

    def _hello(self) -> str:
        """Wait until the process is ready; what kept it from it, or nothing."""
        try:
            if self._connection.poll(START_TIMEOUT_S):
                return self._connection.recv_bytes(LARGEST).decode()
        except (EOFError, OSError):
            return f"the process that imports it ended: exit status {self.stop()}"
        return f"expected it to be imported within {START_TIMEOUT_S:g} s"
