"""One writer at a time in the folder of a run.

The first process of a run keeps a file ``lock`` there that names it, locks it as the operating
system does, and touches it every :data:`BEAT_S` seconds. On one machine the lock ends with its
process, and between machines where the file system carries locks, as NFS does. Of another machine's
process the touches tell: after :data:`STALE_S` seconds without one it counts as dead.
"""

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import threading
import uuid
from pathlib import Path

import psutil

from sapo_megatron.errors import RunFailed, UserError

BEAT_S = 10.0
STALE_S = 60.0


class Lock:
    """This process's right to write below a run's folder, until it is closed."""

    def __init__(self, run: Path) -> None:
        """Raises UserError, which names the process that has it, where another has."""
        self._path = run / "lock"
        self._mine = [str(os.getpid()), socket.gethostname(), uuid.uuid4().hex]
        # Open as long as it is held: a process that closes a file gives up its locks on it.
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if not self._free():
            owner = self._owner()
            os.close(self._file)
            raise UserError(
                f"{run}: expected a run that nobody writes, got one that {_named(owner)} does; end "
                f"that, or start a run of its own (a process of a machine that is gone counts as "
                f"ended after {STALE_S:.0f} s)"
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, " ".join(self._mine).encode(), 0)
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raises RunFailed where the folder is another's by now, or its lock is gone."""
        there = self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._file))
        if not there or self._owner() != self._mine:
            raise RunFailed(
                f"{self._path}: expected {_named(self._mine)}, which writes this run, got "
                f"{_named(self._owner())}; it ends before both write"
            )

    def close(self) -> None:
        """Let others have it."""
        self._ended.set()
        if self._owner() == self._mine:
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _free(self) -> bool:
        locks = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            locks = False  # of this file system there are none
        if not (owner := self._owner()):
            return True
        if owner[1] == self._mine[1]:
            return locks or not psutil.pid_exists(int(owner[0]))
        with tempfile.TemporaryFile(dir=self._path.parent) as new:  # now, by the files' own clock
            return os.fstat(new.fileno()).st_mtime - os.fstat(self._file).st_mtime > STALE_S

    def _owner(self) -> list[str]:
        words = os.pread(self._file, 1000, 0).decode(errors="replace").split()
        return words if len(words) == 3 and words[0].isdecimal() else []

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the next one may get through
                os.utime(self._file)


def _named(owner: list[str]) -> str:
    return "process {} on {}".format(*owner) if owner else "a process without a name"
