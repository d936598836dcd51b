"""Ranks on one machine: ``python -m sapo_megatron.launcher PROCESSES MODULE WORDS...``.

As ``torchrun --standalone`` would start them, but nothing listens beyond this machine: the ranks
meet in a file of a folder that is only their owner's, and gloo listens on loopback. They end when
the launcher does, however that comes about.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sapo_megatron.errors import RunFailed, UserError, with_type

STORE = "SAPO_MEGATRON_STORE"
"""Names the file in which the ranks of one machine meet, in their environment."""
PARENT = "SAPO_MEGATRON_PARENT"
"""Names the launcher's process there."""
GRACE_S = 5.0
"""Seconds that the other ranks have to say what they know when one has failed, or is asked to."""
_PR_SET_PDEATHSIG = 1


class _Asked(Exception):
    """Somebody wants the launcher to end."""


def launch(processes: int, words: Sequence[str]) -> int:
    """Run ``python -m`` with ``words`` as each rank; the exit status of the first that failed.

    Raises RunFailed for a rank that was ended by a signal, and notes it in the run's folder.
    """
    before = signal.signal(signal.SIGTERM, _asked)
    running: dict[int, int] = {}
    failed: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="sapo-megatron-") as folder:
        try:
            for rank in range(processes):
                command = [sys.executable, "-m", *words]
                environment = _environment(rank, processes, Path(folder) / "store")
                running[os.posix_spawn(sys.executable, command, environment)] = rank
            while running and not failed:
                _wait(running, failed, GRACE_S)
            _wait(running, failed, GRACE_S)
        except _Asked:
            return 128 + signal.SIGTERM
        finally:
            _end(running)
            signal.signal(signal.SIGTERM, before)
        for rank, status in failed.items():
            if status < 0:
                what = f"ended by {signal.Signals(-status).name} (out of memory?)"
                with contextlib.suppress(FileNotFoundError):  # there was no run yet
                    note(Path((Path(folder) / "run").read_text()), rank, what)
                raise RunFailed(f"rank {rank}: {what}")
    status = next(iter(failed.values()), 0)
    return status if status in (0, 1, 2) else 1


def join() -> None:
    """End this process with its launcher, where it has one."""
    parent = os.environ.pop(PARENT, None)  # not of what this process starts
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            os._exit(1)  # it was too late for the signal


@contextlib.contextmanager
def noting(run: Path, rank: int) -> Iterator[None]:
    """What goes wrong in the block is noted, by rank, in the run's folder.

    So is what ends the rank's process, where this machine's launcher is there to see it.
    """
    if rank == 0 and STORE in os.environ:
        Path(os.environ[STORE]).with_name("run").write_text(os.path.realpath(run))
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be full, which is told on the terminal
            note(run, rank, with_type(error))
        raise


def note(run: Path, rank: int, what: str) -> None:
    """Add to ``errors.txt`` of a run's folder what a rank has come upon."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with (run / "errors.txt").open("a") as file:
        file.write(f"{now} rank {rank} on {socket.gethostname()}: {what}\n")


def _environment(rank: int, processes: int, store: Path) -> dict[str, str]:
    threads = str(max((os.cpu_count() or 1) // processes, 1))
    place: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    place |= {"LOCAL_WORLD_SIZE": processes, STORE: store, PARENT: os.getpid()}
    ours = {name: str(value) for name, value in place.items()}
    return {"OMP_NUM_THREADS": threads, **os.environ, **ours, "GLOO_SOCKET_IFNAME": "lo"}


def _wait(running: dict[int, int], failed: dict[int, int], limit_s: float) -> None:
    """Move ranks from ``running`` (by process) to ``failed`` (with status), for so long at most.

    Comes back at once where all have ended, or where the first has failed.
    """
    last, already = time.monotonic() + limit_s, bool(failed)
    while running and time.monotonic() < last and (already or not failed):
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.05)
        elif (rank := running.pop(pid, None)) is not None and code:
            failed[rank] = os.waitstatus_to_exitcode(code)


def _end(running: dict[int, int]) -> None:
    """Ask what is still ``running`` to end, and kill what does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in running:
            os.kill(pid, number)
        _wait(running, {0: 0}, GRACE_S)


def _asked(*_: Any) -> None:
    raise _Asked


def _main(words: list[str]) -> int:
    if len(words) < 2 or not words[0].isdecimal() or words[0] == "0":
        raise UserError(f"expected a number of processes and a module, got {' '.join(words)!r}")
    return launch(int(words[0]), words[1:])


if __name__ == "__main__":
    try:
        sys.exit(_main(sys.argv[1:]))
    except (UserError, RunFailed) as failure:
        sys.stderr.write(f"error: {failure}\n")
        sys.exit(2 if isinstance(failure, UserError) else 1)
