"""One writer in a run's folder: a second is refused by name, and the dead do not block."""

import fcntl
import multiprocessing
import os
import signal
import socket
import time

import pytest

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.runs import lock
from sapo_megatron.runs.lock import STALE_S, Lock
from tests.support import forked


def hold(run, sender) -> None:
    """Hold the folder, say so, and wait to be killed."""
    Lock(run)
    sender.send(os.getpid())
    signal.pause()


def attempt(run, start, sender) -> None:
    """Try to have the folder when ``start`` is there, and keep it until the other end closes."""
    while not start.exists():
        time.sleep(0.001)
    try:
        held = Lock(run)
    except UserError:
        sender.send(False)
        return
    sender.send(True)
    held.check()
    signal.pause()


@pytest.fixture
def start():
    """Starts ``function(run, ..., sender)`` elsewhere; gives the process and its pipe."""
    started = []

    def begin(function, *args):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = forked.start(function, *args, sender)
        sender.close()
        started.append(process)
        return process, receiver

    yield begin
    for process in started:
        process.kill()
        process.join()


def message(run) -> str:
    with pytest.raises(UserError) as caught:
        Lock(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_is_refused_by_name_and_the_dead_do_not_block(tmp_path, start):
    process, receiver = start(hold, tmp_path)
    assert receiver.recv() == process.pid
    began = time.monotonic()
    said = message(tmp_path)
    assert time.monotonic() - began < 5
    assert f"{tmp_path}: expected a run that nobody writes" in said
    assert f"process {process.pid} on {socket.gethostname()}" in said
    assert message(tmp_path) == said, "a refusal does not let the next one in"
    process.kill()
    process.join()
    mine = Lock(tmp_path)
    mine.check()
    mine.close()
    assert os.listdir(tmp_path) == ["lock"]
    assert (tmp_path / "lock").read_bytes() == b""


def test_of_many_at_once_one_gets_it(tmp_path, start):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").write_text("1 gone x")
    os.utime(run / "lock", (0, 0))
    receivers = [start(attempt, run, tmp_path / "start")[1] for _ in range(6)]
    (tmp_path / "start").touch()
    assert sorted(receiver.recv() for receiver in receivers) == [False] * 5 + [True]


def written(run, *, host: str, age: float, pid: int = 1) -> None:
    (run / "lock").write_text(f"{pid} {host} x")
    now = time.time()
    os.utime(run / "lock", (now - age, now - age))


@pytest.mark.parametrize(
    ("host", "age", "free"),
    [
        ("elsewhere", 0, False),
        ("elsewhere", STALE_S - 15, False),
        ("elsewhere", STALE_S + 15, True),
        (socket.gethostname(), 0, True),  # its process would have the lock still
    ],
)
def test_an_owner_elsewhere_is_known_by_its_beat(tmp_path, host, age, free):
    written(tmp_path, host=host, age=age)
    if free:
        Lock(tmp_path).close()
    else:
        said = message(tmp_path)
        assert "process 1 on elsewhere" in said
        assert "after 60 s" in said


@pytest.mark.parametrize("content", ["", "1", "x y z", "1 2 3 4", "\x00" * 50, "\xff" * 5])
def test_a_lock_that_names_nobody_is_free(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    held = Lock(tmp_path)
    held.check()
    held.close()


def test_where_files_cannot_be_locked_the_process_tells(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(fcntl.F_WRLCK + 36, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    written(tmp_path, host=socket.gethostname(), age=0, pid=os.getppid())
    assert f"process {os.getppid()} on " in message(tmp_path)
    written(tmp_path, host=socket.gethostname(), age=0, pid=2**22 - 3)
    Lock(tmp_path).close()


def test_it_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.001)
    held = Lock(tmp_path)
    os.utime(tmp_path / "lock", (0, 0))
    last = time.monotonic() + 30
    while (tmp_path / "lock").stat().st_mtime == 0:
        assert time.monotonic() < last
        time.sleep(0.001)
    held.close()


def test_who_has_lost_it_ends(tmp_path):
    held = Lock(tmp_path)
    mine = (tmp_path / "lock").read_text()
    for other in (f"{mine}0", "", None):
        (tmp_path / "lock").unlink() if other is None else (tmp_path / "lock").write_text(other)
        with pytest.raises(RunFailed, match=f"lock: expected process {os.getpid()} on "):
            held.check()
    held.close()
