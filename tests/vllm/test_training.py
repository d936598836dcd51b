"""Whole runs whose rollouts come from vLLM servers."""

import json
import os
import signal
import threading
import time

import psutil
import pytest

from tests.support.tiny import cli, read_metrics, write_recipe
from tests.vllm.conftest import ARCH

TP2 = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
VLLM = {"engine": "vllm", "max_response_length": 12, "server_timeout_s": 200.0}


def recipe_in(folder, **changes):
    """A recipe of two processes, and of updates that a ratio shows."""
    sections = {
        "parallel": TP2,
        "rollout": VLLM,
        "train": {"steps": 3},
        "correction": {"rollout_is": "tis"},
        "checkpoint": {"every": 0},
    }
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return write_recipe(folder, arch=ARCH, **sections)


def test_a_run_starts_its_server_and_hands_over_its_weights(tmp_path):
    recipe = recipe_in(tmp_path, rollout={"vllm_python": os.environ["SAPO_VLLM_PYTHON"]})
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.left == []
    run = tmp_path / "runs" / "recipe" / "run-001"
    steps = read_metrics(run)
    assert [line["rollout/staleness_max"] for line in steps] == [0, 0, 0]
    for line in steps:
        assert line["rollout_train/logprob_abs_diff"] < 1e-4
        assert line["rollout_train/is_weight_mean"] == pytest.approx(1, abs=1e-3)
        assert line["ratio/log_var"] > 0
    # The first step finds the servers with the weights that were evaluated.
    assert [line["rollout/probe_diff"] < 1e-4 for line in steps[1:]] == [True, True]
    assert all(line["time/sync"] > 0 for line in steps[1:])
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


def test_the_next_rollout_goes_on_while_a_step_trains(servers, tmp_path):
    """Its weights are a step old; the ratio is not, since the training engine computes it."""
    rollout = {"servers": list(servers.urls), "async_steps": 1}
    recipe = recipe_in(tmp_path, rollout=rollout, train={"steps": 4})
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = read_metrics(tmp_path / "runs" / "recipe" / "run-001")
    assert [line["rollout/staleness_max"] for line in steps] == [0, 1, 1, 1]
    assert steps[0]["rollout_train/logprob_abs_diff"] < 1e-4
    assert all(line["rollout_train/logprob_abs_diff"] > 1e-3 for line in steps[1:])
    assert all(abs(line["rollout_train/is_weight_mean"] - 1) > 1e-6 for line in steps[1:])


def test_ratios_to_servers_that_are_two_steps_ahead(servers, tmp_path):
    """The engine that sampled is the old policy: its age is in the ratio."""
    recipe = recipe_in(
        tmp_path,
        rollout={"servers": list(servers.urls), "async_steps": 2},
        algorithm={"old_policy": "rollout"},
        correction={"rollout_is": "disabled"},
        routing={"observe": False},
        train={"steps": 4, "num_mini_batches": 1},
    )
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = read_metrics(tmp_path / "runs" / "recipe" / "run-001")
    first, second, third, last = (line["rollout/staleness_max"] for line in steps)
    assert [first, second, third] == [0, 1, 2]
    assert last in (1, 2)  # the weights wait for all that is under way, and it trains meanwhile
    fresh, *stale = (line["ratio/log_var"] for line in steps)
    assert fresh < 1e-6 < min(stale)


def test_routes_that_a_server_does_not_return_are_missed(servers, tmp_path):
    rollout = {"servers": list(servers.urls)}
    recipe = recipe_in(tmp_path, rollout=rollout, routing={"router_replay": "R3"})
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert servers.urls[0] in done.stderr
    assert "--enable-return-routed-experts" in done.stderr


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(servers, tmp_path):
    """The last test with this server."""
    rollout = {"servers": list(servers.urls), "server_timeout_s": 5.0}
    recipe = recipe_in(tmp_path, rollout=rollout, train={"steps": 1000})
    run = tmp_path / "runs" / "recipe" / "run-001"

    def end_the_server():
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.1)
        for process in servers._processes:
            for child in psutil.Process(process.guard.pid).children(recursive=True):
                child.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=end_the_server, daemon=True)
    thread.start()
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert servers.urls[0] in done.stderr
    assert done.left == []
    finished = len(read_metrics(run))
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{finished:06d}"]
    state = json.loads((run / "checkpoints" / f"step-{finished:06d}" / "state.json").read_text())
    cursor = state["cursor"]  # the prompts of the lost step come again
    assert cursor["index"] - sum(cursor["skipped"].values()) == 4 * finished
