"""vLLM servers that others have started, and a run on them, which can be ended from outside."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress

import httpx
import psutil

from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.vllm import guard
from sapo_megatron.rollout.vllm.servers import _free_port
from sapo_megatron.runs.dump import read_dumps
from sapo_megatron.runs.history import checkpoints, step_of
from sapo_megatron.training.inputs import read_inputs
from tests.support.tiny import ROOT, cli
from tests.vllm.test_training import recipe_in

PROBES = 2
"""Of a server, for every load: as many as there are held-out problems."""
PROMPTS, GENERATIONS = 8, 4
"""Of a step: two servers have sixteen responses each."""
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

    def is_interrupted(self):
        """Whether it was told to end what it is in the middle of, and has no new weights yet."""
        told = {"abort_requests", "reset_prefix_cache"}
        return [path for path in self.asked() if path in told][-1:] == ["abort_requests"]

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
        self._threads, self._folder, self._words = threads, folder, words
        self.path = folder / "runs" / "recipe" / "run-001"
        self._done = threads.submit(
            cli, "train", folder / "recipe.yaml", *words, cwd=folder, timeout=1800.0
        )

    def resumed(self):
        """Another that goes on with it."""
        return Run(self._threads, self._folder, *self._words, "--resume", "auto")

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

    def stop(self):
        """Ask for its end, and wait for it."""
        (self.path / "stop").touch()
        return self.end()

    def kill(self):
        """All of its processes, and none of the servers'."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a killed server's guard is a zombie
                if process.cwd() == str(self._folder):
                    process.kill()
        return self.end()

    def saved(self):
        """The step of the newest checkpoint."""
        return step_of(checkpoints(self.path)[-1])


@contextmanager
def two_servers(folder, **changes):
    """Both, for the recipe that is written into ``folder``."""
    servers = [Script(folder / str(number), folder / "model") for number in range(2)]
    rollout = {"servers": [server.url for server in servers], "server_timeout_s": GONE_S}
    rollout |= {"rollout_batch_size": PROMPTS, "num_generations": GENERATIONS}
    rollout |= {"max_response_length": 6}
    rollout |= {"server_concurrency": 1}  # a rollout takes long enough to be met
    sections = {
        "parallel": {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1},
        "train": {"steps": 10_000},
        "eval": {"num_problems": PROBES, "k": 1},
        **changes,
    }
    recipe_in(folder, **{**sections, "rollout": rollout | changes.get("rollout", {})})
    try:
        for server in servers:
            server.start()
        while not all(server.answers() for server in servers):
            time.sleep(0.1)
        yield servers
    finally:
        for server in servers:
            server.close()


def groups_trained(run, steps):
    """How many responses of each group ``steps`` have trained on, by ``logging.dump_every: 1``."""
    found = Counter()
    for step in steps:
        rows = read_dumps((run / "dumps").glob(f"step-{step:06d}*")).rows
        found.update(uid // GENERATIONS for uid in set(rows.sequence.tolist()))
    return found


def groups_drawn(run, steps):
    """The same as it must be: the first problems that are not too long, in their order."""
    recipe = load(run / "config.yaml")
    problems = read_inputs(recipe, 1).source.next(PROMPTS * len(steps))
    return dict.fromkeys((problem.uid for problem in problems), GENERATIONS)
