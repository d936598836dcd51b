"""Processes that start at once: forked from one that has imported what they need.

Imports are most of the life of a rank or a program in a test. multiprocessing's fork server does
them once; what it forks has them, and nothing else that a test has done.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any


def start(function: Callable[..., Any], *args: Any, fresh: bool = False) -> BaseProcess:
    """``function(*args)`` in a process of its own with the environment that this one has now.

    ``fresh``: in a Python that has imported nothing yet, where what is imported is to differ.
    """
    context = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload(["tests.support.imported"])
    # No daemon: writing a checkpoint starts processes, which a daemon may not.
    process = context.Process(target=_here, args=(dict(os.environ), function, args), daemon=False)
    process.start()
    return process


def _here(env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # a collection need not walk through what was imported
    os.environ.clear()  # the fork server's, of the time when it was started
    os.environ.update(env)
    function(*args)


def run(
    words: Sequence[str],
    *,
    env: dict[str, str],
    stdout: IO,
    stderr: IO,
    timeout: float,
    check: bool,
) -> subprocess.CompletedProcess:
    """In the place of ``subprocess.run`` of a Python whose imports are not what is tested."""
    assert not check
    process = start(program, tuple(words[1:]), Path.cwd(), env, stdout.name, stderr.name)
    process.join(timeout)
    assert process.exitcode is not None, f"it took longer than {timeout} s: {words}"
    return subprocess.CompletedProcess(words, process.exitcode)


def program(words: tuple[str, ...], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    """Be ``python *words``, -m MODULE or -c TEXT, in a session of its own that writes to files.

    What it starts by ``posix_spawn``, as the launcher does its ranks, is forked from it.
    """
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.posix_spawn = _spawned
    _run(words)


def _run(words: Sequence[str]) -> None:
    kind, what, *rest = words
    sys.argv[:] = [what, *rest]
    try:
        if kind == "-c":
            exec(what, {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _spawned(path: str, words: Sequence[str], env: dict[str, str]) -> int:
    """In the place of ``os.posix_spawn`` of a Python: a child with the imports of this process."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        _run(words[1:])
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
