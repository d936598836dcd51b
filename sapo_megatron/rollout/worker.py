"""The process that calls a reward function, for :mod:`.reward`.

``python -m sapo_megatron.rollout.worker FD FUNCTION`` talks over the inherited socket FD. It is two
processes: one calls the function; the other waits until that one has ended, or the other end of the
socket is let go of, and kills whatever the function has started. Both do without torch and
Megatron, so that they start fast.
"""

import contextlib
import ctypes
import functools
import importlib
import inspect
import json
import logging
import math
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sapo_megatron.errors import hint, not_installed, one_line, with_type
from sapo_megatron.rollout.verifiers import BUILT_IN, RewardFunction
from sapo_megatron.sample import Prompt

LONGEST = 300
"""Characters of a problem."""
MEMORY = max(4 * 2**30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16)
"""Bytes of data that a worker, and each process that it starts, may hold: more than a verifier
takes, and less than what would make the kernel end a rank for want of memory."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def find_function(name: str) -> RewardFunction:
    """The built-in function, or ``module:function``. Raises ValueError when there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except BaseException as error:  # also sys.exit()
        raise ValueError(f"cannot import {module_name!r}: {_told(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name!r} has no {path!r}{hint(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"expected a function, got {type(found).__name__}")
    return _as_ours(found)


def judge(function: RewardFunction, prompt: Prompt, response: str) -> tuple[float, str]:
    """(reward, ""), or (NaN, the problem) where the function raises or gives no finite number.

    A coroutine is awaited. A number is whatever ``float`` takes, alone in a list or the ``score``
    of a dictionary.
    """
    try:
        found: Any = function(prompt, response)
        if inspect.isawaitable(found):
            found = _event_loop().run_until_complete(found)
    except BaseException as error:  # also sys.exit() and math-verify's own TimeoutException
        return math.nan, _told(error)
    score: Any = found[0] if isinstance(found, list) and len(found) == 1 else found
    score = score.get("score") if isinstance(score, Mapping) else score
    try:
        reward = float(score)
    except OverflowError:
        reward = math.inf
    except Exception:
        kind = type(found).__name__
        return math.nan, f"expected a number or a dictionary with a number as score, got {kind}"
    if not math.isfinite(reward):
        return math.nan, f"expected a finite number, got {reward}"
    return reward, ""


def _as_ours(function: Any) -> RewardFunction:
    """To be called as ``function(prompt, response)``, whichever of three signatures it has.

    Raises ValueError for a fourth.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function in C
        return function
    known = signature.parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())

    def verl(prompt: Prompt, response: str) -> float:
        values = {
            "data_source": prompt.entry.get("data_source", prompt.task),
            "solution_str": response,
            "ground_truth": prompt.answer,
            "extra_info": prompt.entry.get("extra_info"),
        }
        return function(**{k: v for k, v in values.items() if takes_all or k in known})

    def trl(prompt: Prompt, response: str) -> float:
        answers = dict.fromkeys(("answer", "solution", "ground_truth"), prompt.answer)
        values = answers | prompt.entry | {"prompts": prompt.text, "completions": response}
        return function(**{k: [v] for k, v in values.items() if takes_all or k in known})

    if {"solution_str", "ground_truth"} <= set(known):
        return verl
    if "completions" in known:
        return trl
    try:
        signature.bind(None, None)
    except TypeError:
        raise ValueError(
            "expected function(prompt, response), or as in verl (data_source, solution_str, "
            "ground_truth, extra_info), or as in TRL (prompts, completions, **columns), got "
            f"{one_line(signature, 80)}"
        ) from None
    return function


@functools.cache
def _event_loop() -> Any:
    """One for all calls: what a function keeps open, such as a connection, belongs to its loop."""
    import asyncio

    return asyncio.new_event_loop()


def _told(error: BaseException) -> str:
    """What an error says, in one line that any terminal can show."""
    try:
        line = with_type(error, LONGEST)
    except Exception:
        line = type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in line)


def _serve(connection: Connection, function: RewardFunction) -> None:
    """Answer each (prompt, response) with what ``judge`` says, as JSON, until the end."""
    own = os.getpid()
    while True:
        prompt, response = connection.recv()
        verdict = judge(function, prompt, response)
        _leave_unless(own)
        connection.send_bytes(json.dumps(verdict).encode())


def _work(connection: Connection, name: str) -> None:
    """Say that the function is there, or what is wrong, and call it when asked to."""
    own, forks = os.getpid(), list[bool]()
    os.register_at_fork(after_in_parent=lambda: forks.append(True))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we keep the time
    problem = ""
    try:
        function = find_function(name)
        if name in ("reasoning_gym", "math_verify"):
            importlib.import_module(name)
        if forks:
            raise ValueError("it forks when it is imported; let it do so when it is called")
    except ModuleNotFoundError as error:
        problem = str(not_installed(error) or error)
    except ValueError as error:
        problem = str(error)
    _leave_unless(own)
    connection.send_bytes(problem.encode(errors="replace"))
    if not problem:
        with contextlib.suppress(EOFError, OSError):
            _serve(connection, function)


def _leave_unless(own: int) -> None:
    """End here in a copy of this process that the user's code has made and let go on."""
    if os.getpid() != own:
        os._exit(0)


def _outlive(worker: int, connection: Connection) -> int:
    """Wait for the end of ``worker`` or of who asks it, and kill all that it has started.

    Orphans become this process's children. Returns the worker's exit status as a shell would.
    """
    import psutil

    def end_with_owner() -> None:
        poll = select.poll()
        poll.register(connection, 0)  # which still tells that the other end is closed
        poll.poll()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(worker, signal.SIGKILL)

    threading.Thread(target=end_with_owner, daemon=True).start()
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    status = 0
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                child.kill()
        try:
            ended, code = os.waitpid(-1, 0)
        except ChildProcessError:
            return status if status >= 0 else 128 - status
        if ended == worker:
            status = os.waitstatus_to_exitcode(code)


def _main(fd: str, name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    prctl, connection = ctypes.CDLL(None).prctl, Connection(int(fd))
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker:
        os._exit(_outlive(worker, connection))
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(ValueError):  # there is a lower one already
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with contextlib.suppress(OSError):  # what the kernel ends first, where a container lets us say
        Path("/proc/self/oom_score_adj").write_text("1000")
    _work(connection, name)
    os._exit(0)  # whatever the function has done to this process


if __name__ == "__main__":
    _main(*sys.argv[1:])
