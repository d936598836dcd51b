"""Ranks on one machine: how they end, who says so, and that nobody else can talk to them."""

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.policy import parallel
from tests.support.gloo import run_ranks
from tests.support.tiny import ROOT, bearing, end, still_there, write_recipe

LAUNCHER = ("sapo_megatron.launcher", "2")


@pytest.fixture
def start(tmp_path):
    """Starts ``python -m words``; none of it outlives the test. Returns the process, its mark."""
    marks = []

    def start(*words, **env):
        mark = uuid.uuid4().hex
        marks.append(f"SAPO_MEGATRON_TEST={mark}")
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # Whoever runs the tests in the background of a shell has SIGINT ignored.
        heeding = ("env", "--default-signal=INT")
        process = subprocess.Popen(
            [*heeding, sys.executable, "-m", *map(str, words)],
            cwd=tmp_path,
            env={**kept, "PYTHONPATH": paths, "SAPO_MEGATRON_TEST": mark, **env},
            stdin=subprocess.DEVNULL,
            stderr=(tmp_path / "stderr").open("w"),
            start_new_session=True,
        )
        return process, marks[-1]

    yield start
    for mark in marks:
        end(mark)


def until(true, timeout=600.0):
    last = time.monotonic() + timeout
    while not (found := true()):
        assert time.monotonic() < last
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("what", "status", "said", "noted"),
    [
        ("0", 0, "", ""),
        ("1", 1, "", ""),
        ("2:1", 2, "", ""),
        ("7:0", 1, "", ""),
        ("9:1", 1, "error: rank 1: ended by SIGKILL (out of memory?)\n", "rank 1 on "),
        ("raise:1", 1, "ValueError: of this\nrank\n", "ValueError: of this rank"),
    ],
)
def test_how_ranks_end(start, tmp_path, what, status, said, noted):
    process, mark = start(*LAUNCHER, "tests.support.rank", tmp_path, what)
    assert process.wait(60) == status
    assert still_there(mark) == []
    assert (tmp_path / "stderr").read_text().endswith(said)
    notes = tmp_path / "errors.txt"
    assert notes.exists() == bool(noted)
    if noted:
        (line,) = notes.read_text().splitlines()
        assert noted in line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_the_launcher(start, tmp_path, number):
    process, mark = start(*LAUNCHER, "tests.support.rank", tmp_path, "hang")
    until(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in range(2)))
    process.send_signal(number)
    assert process.wait(60) != 0
    assert still_there(mark) == []


@pytest.mark.parametrize("words", [(), ("2",), ("0", "x"), ("two", "x")])
def test_wrong_words(start, tmp_path, words):
    process, _ = start(LAUNCHER[0], *words)
    assert process.wait(60) == 2
    assert (tmp_path / "stderr").read_text().startswith("error: expected a number of processes")


def listening(pids):
    """Addresses on which these processes listen."""
    mine = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                mine.add(os.readlink(path))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in mine:
                words = bytes.fromhex(parts[1].partition(":")[0])
                # Each word of four bytes is in this machine's order.
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                yield ipaddress.ip_address(address)


def test_a_run_listens_to_this_machine_alone_and_ends_with_its_launcher(start, tmp_path):
    recipe = write_recipe(tmp_path, parallel={"expert_model_parallel_size": 2})
    run, words = tmp_path / "run", ["train.steps=100000", f"train.run_dir={tmp_path / 'run'}"]
    process, mark = start("sapo_megatron", "train", recipe, *words, GLOO_SOCKET_IFNAME="eth0")
    until(lambda: process.poll() is not None or (run / "metrics.jsonl").exists())
    assert process.poll() is None, (tmp_path / "stderr").read_text()
    found = list(listening(bearing(mark)))
    assert found
    assert [str(address) for address in found if not address.is_loopback] == []
    process.kill()
    process.wait()
    assert still_there(mark) == []


def raised(errors):
    """What each of ``errors``, by rank, comes to on this rank."""
    said = []
    for by_rank in errors:
        groups = SimpleNamespace(world=dist.group.WORLD)
        try:
            with parallel.failing_together(groups):
                if error := by_rank[dist.get_rank()]:
                    raise error
        except Exception as caught:
            said.append((type(caught).__name__, str(caught)))
    return said


def test_what_fails_on_one_rank_names_it():
    errors = [
        (None, UserError("model.path: this")),
        (RunFailed("both"), RunFailed("both")),
        (OSError(28, "No space left on device"), None),
    ]
    first, second = run_ranks(2, raised, errors)
    assert first == second
    assert first == [
        ("UserError", "rank 1: model.path: this"),
        ("RunFailed", "both"),
        ("RunFailed", "rank 0: [Errno 28] No space left on device"),
    ]
