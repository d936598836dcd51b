"""Servers that each node's first process starts, with two agents of torchrun as two nodes."""

import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.tiny import cli, read_metrics
from tests.vllm.test_training import recipe_in

STEPS = 10
SHM = Path("/dev/shm")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run's folder, after ten steps of one update each."""
    folder = tmp_path_factory.mktemp("nodes")
    rollout = {"vllm_python": os.environ["SAPO_VLLM_PYTHON"], "server_timeout_s": 600.0}
    train = {"steps": STEPS, "num_mini_batches": 1}
    recipe = recipe_in(folder, rollout=rollout, train=train)
    endpoint = f"localhost:{free_port()}"
    agent = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    agent += ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "nodes")
    agent += ("-m", "sapo_megatron")

    def start(_):
        return cli("train", recipe, cwd=folder, program=agent, fresh=True, timeout=600.0)

    before = set(SHM.iterdir())
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(start, range(2)))
    for agent_done in done:
        assert agent_done.returncode == 0, agent_done.stderr
        assert agent_done.left == []
    left = {path.name for path in set(SHM.iterdir()) - before}
    assert not [name for name in left if name.startswith("sapo-megatron-")]
    return folder / "runs" / "recipe" / "run-001"


def test_each_hand_over_is_probed_and_says_what_it_took(run):
    """Weights that are cut over both nodes come whole to each."""
    lines = read_metrics(run)
    assert len(lines) == STEPS
    sizes = {line["rollout/handover_bytes"] for line in lines[1:]}
    assert len(sizes) == 1
    for line in lines[1:]:
        assert line["rollout/probe_diff"] < 1e-4
        assert 0 < line["rollout/handover_changed_share"] <= 1
    for line in lines:
        assert line["rollout_train/logprob_abs_diff"] < 1e-4


def test_each_node_answers_its_part(run):
    logs = [run / "servers" / f"node-{number}" / "0.log" for number in range(2)]
    answered = [len(re.findall(r"POST /v1/completions", log.read_text())) for log in logs]
    assert min(answered) >= STEPS * 8  # half of 4 x 4 responses a step, and probes
    for log in logs:
        assert re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
