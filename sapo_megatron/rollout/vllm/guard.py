"""Run a command for as long as the process that started this one lives.

``python -m sapo_megatron.rollout.vllm.guard FOLDER COMMAND...`` with a pipe as standard input that
is never written to: it closes when its owner lets go of it or dies, however that comes about. The
command and all it has started are then terminated, and killed where they do not end in time, and
the folder, of what the owner had for the command, is removed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0
"""Seconds between asking to end and killing."""


def main() -> int:
    """Returns the command's exit status."""
    folder, *command = sys.argv[1:]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    let_go = threading.Event()
    threading.Thread(target=_end_with_owner, args=(process, let_go), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # whatever the command has left behind
    if let_go.is_set():
        shutil.rmtree(folder, ignore_errors=True)  # another guard may be at it
    return status


def _end_with_owner(process: subprocess.Popen, let_go: threading.Event) -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock would be held when this process ends
        pass
    let_go.set()
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to the command's own process group, which holds nothing else."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
