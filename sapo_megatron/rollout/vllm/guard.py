"""Run a command for as long as the process that started this one lives.

``python -m sapo_megatron.rollout.vllm.guard COMMAND...`` with a pipe as standard input, which is
never written to: it closes when its owner lets go of it or dies, however that comes about. The
command and all it has started are then terminated, and killed where they do not end in time.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0
"""Seconds between asking to end and killing."""


def main() -> int:
    """Returns the command's exit status."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_owner, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # whatever the command has left behind
    return status


def _end_with_owner(process: subprocess.Popen) -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock would be held when this process ends
        pass
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
