"""A run whose servers, which others have started, are killed, start again, stall, and are gone."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import psutil
import pytest

from sapo_megatron.rollout.vllm import guard
from sapo_megatron.rollout.vllm.servers import _free_port
from tests.support.tiny import ROOT, cli, read_metrics
from tests.vllm.test_training import recipe_in

pytestmark = pytest.mark.timeout(1800)  # that of a machine that is busy with other things
PROBES = 2
"""Of a server, for every load: as many as there are held-out problems."""
PROMPTS = 8
"""Of a step: four responses each, of which two servers have sixteen each."""
GONE_S = 20.0
"""``rollout.server_timeout_s``."""


class Script:
    """A server of ``launch/rollout_server.sh``, on one port however often it is started."""

    def __init__(self, folder, model):
        folder.mkdir()
        self._folder, self._model = folder, model
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port.getsockname()[1]}"
        self._guards = []

    def start(self):
        words = [sys.executable, "-m", guard.__name__, str(self._folder / "none")]
        words += [str(ROOT / "launch" / "rollout_server.sh"), str(self._model)]
        words += ["--enforce-eager", "--skip-tokenizer-init", "--load-format", "dummy"]
        words += ["--dtype", "float32", "--max-model-len", "22"]
        env = {**os.environ, "PYTHON": os.environ["SAPO_VLLM_PYTHON"], "HF_HUB_OFFLINE": "1"}
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        env["ROLLOUT_PORT"] = self.url.rpartition(":")[2]
        self._log = self._folder / f"{len(self._guards)}.log"
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                words,
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what ends the tests at once does not end it first
            )
        self._guards.append(process)

    def answers(self):
        assert self._guards[-1].poll() is None, self._log.read_text()
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def signal(self, number):
        """To all of its processes."""
        for process in psutil.Process(self._guards[-1].pid).children(recursive=True):
            process.send_signal(number)

    def close(self):
        for process in self._guards:
            process.stdin.close()
        for process in self._guards:
            process.wait(2 * guard.GRACE_S)
        self._port.close()

    def asked(self):
        """Endpoints in the order in which it has answered since it was started last."""
        return re.findall(r"POST /(?:v1/)?(\w+) HTTP", self._log.read_text())

    def loads(self):
        return self.asked().count("reset_prefix_cache")

    def is_sampling(self):
        """Whether it is in the middle of its part of a rollout, behind load and probe."""
        asked = self.asked()
        if "reset_prefix_cache" not in asked:
            return False
        latest = asked[::-1].index("reset_prefix_cache")
        return PROBES + 2 <= latest < PROBES + 5


class Run:
    """``sapo-megatron train`` on a thread."""

    def __init__(self, threads, folder, *words):
        self.path = folder / "runs" / "recipe" / "run-001"
        self._done = threads.submit(
            cli, "train", folder / "recipe.yaml", *words, cwd=folder, timeout=1800.0
        )

    def steps(self):
        metrics = self.path / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def until(self, holds):
        while not holds():
            assert not self._done.done(), self._done.result().stderr
            time.sleep(0.02)

    def goes_on(self, steps):
        last = self.steps() + steps
        self.until(lambda: self.steps() >= last)

    def end(self):
        return self._done.result()

    def saved(self):
        """The step of the newest checkpoint."""
        names = (folder.name for folder in (self.path / "checkpoints").iterdir())
        return max(int(name.removeprefix("step-")) for name in names)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What happened to two servers and their run, which was resumed once."""
    folder = tmp_path_factory.mktemp("lost")
    servers = [Script(folder / str(number), folder / "model") for number in range(2)]
    rollout = {"servers": [server.url for server in servers], "server_timeout_s": GONE_S}
    rollout |= {"rollout_batch_size": PROMPTS, "max_response_length": 6}
    recipe_in(
        folder,
        parallel={"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1},
        rollout={**rollout, "server_concurrency": 1},  # a rollout takes long enough to be met
        train={"steps": 10_000},
        eval={"num_problems": PROBES, "k": 1},
    )
    with ThreadPoolExecutor(1) as threads:
        try:
            for server in servers:
                server.start()
            while not all(server.answers() for server in servers):
                time.sleep(0.1)
            yield told(Run(threads, folder), threads, folder, *servers)
        finally:
            for server in servers:
                server.close()


def told(run, threads, folder, one, two):
    found = SimpleNamespace(one=one, two=two, urls=[one.url, two.url])
    run.goes_on(2)
    run.until(one.is_sampling)
    one.signal(signal.SIGKILL)
    found.killed_at = run.steps()
    run.goes_on(3)

    one.start()
    run.until(one.is_sampling)
    found.asked_first = one.asked()
    found.back_at = run.steps()
    run.goes_on(2)

    run.until(two.is_sampling)
    two.signal(signal.SIGSTOP)
    found.stalled_at, before = run.steps(), two.loads()
    run.goes_on(2)
    two.signal(signal.SIGCONT)
    run.until(lambda: two.loads() > before + 1 and two.is_sampling())
    found.awake_at = run.steps()
    run.goes_on(1)

    for server in (one, two):
        server.signal(signal.SIGSTOP)
    found.first = run.end()
    found.steps, found.saved = run.steps(), run.saved()
    for server in (one, two):
        server.signal(signal.SIGCONT)
    again = Run(threads, folder, "--resume", "auto", "rollout.min_servers=2")
    again.goes_on(2)
    one.signal(signal.SIGKILL)
    found.second = again.end()
    found.lines, found.saved_again = read_metrics(run.path), again.saved()
    return found


def test_all_that_was_trained_on_was_sampled_with_the_present_weights(story):
    """By both servers, whatever had happened to them: wrong weights differ by over 1e-3."""
    for line in story.lines:
        assert line["rollout/staleness_max"] == 0
        assert line["rollout_train/logprob_abs_diff"] < 1e-4
        assert line.get("rollout/probe_diff", 0.0) < 1e-4


def test_a_killed_server_costs_its_requests_and_not_the_run(story):
    # It is met in the middle of a request, or in the moment behind its last one.
    assert re.search(f"{story.urls[0]} is (away|left out for now): ", story.first.stderr)
    assert story.killed_at + 3 <= story.back_at


def test_a_server_that_is_back_has_the_weights_before_it_gets_work(story):
    """It is asked what it serves, loads, forgets, and answers the probe; then it works."""
    loads = ["collective_rpc", "collective_rpc", "reset_prefix_cache"]
    assert story.asked_first[: len(loads)] == loads
    latest = story.asked_first[::-1].index("reset_prefix_cache")
    assert story.asked_first[-latest:].count("completions") > PROBES
    assert story.back_at < story.stalled_at


def test_a_stalled_server_is_left_out_until_it_answers_again(story):
    assert f"{story.urls[1]} is left out for now: " in story.first.stderr
    assert story.stalled_at + 2 <= story.awake_at


def test_a_run_without_servers_ends_with_a_checkpoint(story):
    assert story.first.returncode == 1
    (line,) = [line for line in story.first.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"min_servers: expected at least 1 .* got 0 of 2", line)
    assert story.first.left == []
    assert story.saved == story.steps


def test_a_resumed_run_ends_below_min_servers(story):
    assert story.second.returncode == 1
    (line,) = [line for line in story.second.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(rf"min_servers: expected at least 2 .* got 1 of 2 \({story.urls[0]}: ", line)
    assert story.second.left == []
    assert story.saved_again == len(story.lines) >= story.saved + 2
    assert [line["step"] for line in story.lines] == list(range(1, story.saved_again + 1))
