"""The launch scripts: real processes on this machine; doubles only for Slurm and GPUs.

A fake ``srun`` runs its command once on each node of its list, all of which are this machine, with
a log for each as Slurm would; a fake ``scontrol`` names the nodes and writes down what it is asked.
"""

import contextlib
import http.server
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import yaml

from sapo_megatron.__main__ import ENVIRONMENT
from sapo_megatron.rollout.vllm.client import EXTENSION
from tests.support.tiny import ROOT, bearing, end, read_metrics, still_there, write_recipe

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class Script:
    """A script that runs, and everything that came of it."""

    def __init__(self, path, *words, cwd, env=None):
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "RUN_DIR")}
        ours = {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": "2",
        }
        mark = uuid.uuid4().hex
        self.mark = f"SAPO_MEGATRON_TEST={mark}"
        self.log = cwd / f"{Path(path).name}-{mark[:6]}.log"
        env = {**kept, **ours, "SAPO_MEGATRON_TEST": mark, **(env or {})}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", str(path), *words],
                cwd=cwd,
                env={k: v for k, v in env.items() if v is not None},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self):
        return self.log.read_text()

    def wait(self, timeout=250.0):
        """Its exit status; nothing of it may be left."""
        try:
            status = self.process.wait(timeout)
            assert still_there(self.mark) == []
        finally:
            self.end()
        return status

    def processes(self):
        return bearing(self.mark)

    def end(self):
        end(self.mark)


def until(true, what, *scripts, timeout=250.0):
    end = time.monotonic() + timeout
    while not true():
        said = "\n".join(script.said for script in scripts)
        assert time.monotonic() < end, f"never came: {what}\n{said}"
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path):
    """Starts scripts in a working folder with a recipe; none outlives the test."""
    write_recipe(tmp_path)
    scripts = []

    def start(path, *words, **env):
        scripts.append(Script(LAUNCH / path, *words, cwd=tmp_path, env=env))
        return scripts[-1]

    yield start
    for script in scripts:
        script.end()


@pytest.fixture
def bystander():
    """A process that looks like torchrun and is somebody else's."""
    words = ["bash", "-c", "exec -a 'python -m torch.distributed.run sapo_megatron' sleep 600"]
    process = subprocess.Popen(words)
    yield process
    assert process.poll() is None
    process.kill()
    process.wait()


def free_port():
    """One below those that the system gives away, so that nothing else here gets it meanwhile."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return str(port)


# What they would do


def test_shellcheck_finds_nothing():
    here = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([here, os.environ["PATH"]]))
    assert shellcheck, "shellcheck: expected it beside python or on PATH; make venv installs it"
    words = [shellcheck, "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_house_rules_of_the_scripts():
    assert len(SCRIPTS) >= 6
    for path in SCRIPTS:
        text = path.read_text()
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= 100, path.name
        assert not re.search(r"\b(pkill|killall)\b|kill -9", text), path.name
        if path.name not in ("env.sh", "common.sh"):
            assert "\nset -euo pipefail\n" in text
    for name in ("single_node.sh", "multi_node.sh", "rollout_server.sh"):
        assert os.access(LAUNCH / name, os.X_OK)


NODES = {"NNODES": "2:4", "MASTER_ADDR": "node7", "JOB_ID": "j1"}


@pytest.mark.parametrize(
    ("script", "words", "env", "expected"),
    [
        (
            "single_node.sh",
            ["recipe.yaml", "--loss_type", "grpo", "logging.wandb_name=two words"],
            {"JOB_ID": "j1"},
            [
                *[sys.executable, "-m", "sapo_megatron.launcher", "2"],
                *["sapo_megatron", "train", "recipe.yaml", "--resume", "auto"],
                *["train.run_dir=runs/recipe/j1"],
                *["--loss_type", "grpo", "logging.wandb_name=two words"],
            ],
        ),
        (
            "multi_node.sh",
            ["a/recipe.yaml", "train.steps=3"],
            {**NODES, "RUN_DIR": "/shared/run"},
            [
                *[*TORCHRUN, "--nnodes", "2:4", "--nproc-per-node", "2", "--rdzv-backend", "c10d"],
                *["--rdzv-endpoint", "node7:29500", "--rdzv-id", "j1", "--max-restarts", "3"],
                *["-m", "sapo_megatron", "train", "a/recipe.yaml", "--resume", "auto"],
                *["train.run_dir=/shared/run", "train.steps=3"],
            ],
        ),
        (
            "rollout_server.sh",
            ["Qwen/Qwen3-30B-A3B", "--max-model-len", "4096"],
            {},
            [
                *[sys.executable, "-m", "vllm.entrypoints.openai.api_server"],
                *["--model", "Qwen/Qwen3-30B-A3B", "--host", "127.0.0.1", "--port", "8000"],
                *["--tensor-parallel-size", "2", "--generation-config", "vllm"],
                *["--worker-extension-cls", EXTENSION, "--max-model-len", "4096"],
            ],
        ),
    ],
    ids=["single_node", "multi_node", "rollout_server"],
)
def test_a_dry_run_shows_the_command(start, tmp_path, script, words, env, expected):
    path = two_gpus(tmp_path)
    before = {p for p in tmp_path.rglob("*") if p.suffix != ".log"}
    secret = {"DRY_RUN": "1", "WANDB_API_KEY": "a-secret", "PATH": path}
    run = start(script, *words, **env, **secret)
    assert run.wait() == 0, run.said
    assert shlex.split(run.said) == expected
    assert {p for p in tmp_path.rglob("*") if p.suffix != ".log"} == before


def two_gpus(folder):
    """A PATH with an nvidia-smi that lists two GPUs."""
    program = folder / "gpus" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: A\\n'\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_a_port_that_a_program_has(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = start("rollout_server.sh", "model", ROLLOUT_PORT=port)
        assert run.wait() == 2
    assert run.said.strip().endswith(
        f"expected a free port, got {port}, where a program listens; choose another"
    )


def test_a_server_without_gpus_takes_prompts_whole(start):
    without_gpus = "/usr/bin:/bin"
    run = start("rollout_server.sh", "model", DRY_RUN="1", PATH=without_gpus)
    assert run.wait() == 0
    assert run.said.strip().endswith(f"{EXTENSION} --no-enable-chunked-prefill")


def test_one_process_a_gpu_unless_told(start, tmp_path):
    path = two_gpus(tmp_path)
    run = start("single_node.sh", "recipe.yaml", DRY_RUN="1", NPROC_PER_NODE=None, PATH=path)
    assert run.wait() == 0
    assert " sapo_megatron.launcher 2 sapo_megatron train " in run.said
    env = {"NPROC_PER_NODE": None, "PATH": path, "CUDA_VISIBLE_DEVICES": "1"}
    one = start("single_node.sh", "recipe.yaml", DRY_RUN="1", **env)
    assert one.wait() == 0
    assert " sapo_megatron.launcher 1 sapo_megatron train " in one.said


@pytest.mark.parametrize(
    ("script", "words", "env", "said"),
    [
        ("single_node.sh", [], {}, "usage: launch/single_node.sh RECIPE"),
        ("multi_node.sh", [], {}, "usage: launch/multi_node.sh RECIPE"),
        ("rollout_server.sh", [], {}, "usage: launch/rollout_server.sh MODEL"),
        ("slurm.sbatch", [], {"SLURM_SUBMIT_DIR": str(ROOT)}, "usage: sbatch"),
        ("slurm.sbatch", ["recipe.yaml"], {"SLURM_SUBMIT_DIR": str(ROOT)}, "SLURM_JOB_ID"),
        ("slurm.sbatch", ["recipe.yaml"], {"SLURM_SUBMIT_DIR": "/proc"}, "/proc/launch"),
        ("multi_node.sh", ["recipe.yaml"], {**NODES, "MASTER_ADDR": None}, "MASTER_ADDR"),
        ("multi_node.sh", ["recipe.yaml"], {**NODES, "JOB_ID": None}, "JOB_ID"),
        ("multi_node.sh", ["recipe.yaml"], {**NODES, "NNODES": "two"}, "got 'two'"),
        ("single_node.sh", ["recipe.yaml"], {"NPROC_PER_NODE": None}, "NPROC_PER_NODE"),
    ],
)
def test_one_line_for_what_is_missing(start, tmp_path, script, words, env, said):
    if "NPROC_PER_NODE" in env and shutil.which("nvidia-smi"):
        pytest.skip("with GPUs it has a default")
    run = start(script, *words, **env)
    assert run.wait() == 2
    (line,) = run.said.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_the_environment_keeps_what_is_set():
    def environment(**env):
        words = ["bash", "-euc", f"source {LAUNCH}/env.sh; env"]
        kept = {"PATH": os.environ["PATH"], **env}
        done = subprocess.run(words, env=kept, capture_output=True, text=True, check=True)
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    ours = environment()
    assert ours["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert ours["PYTORCH_ALLOC_CONF"] == ours["PYTORCH_CUDA_ALLOC_CONF"]
    assert ours["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    # A process that is started in another way has the same; the rest is torchrun's and the shell's.
    others = {"OMP_NUM_THREADS", "PYTHON", "PYTHONUNBUFFERED", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    shells = {"PATH", "PWD", "SHLVL", "_", "OLDPWD", "PYTORCH_CUDA_ALLOC_CONF"}
    assert {n: v for n, v in ours.items() if n not in others | shells} == ENVIRONMENT
    for name in ours.keys() - {"PATH", "PWD", "SHLVL", "_", "OLDPWD"}:
        assert environment(**{name: "mine"})[name] == "mine"
    old = environment(PYTORCH_CUDA_ALLOC_CONF="mine")
    assert old["PYTORCH_ALLOC_CONF"] == old["PYTORCH_CUDA_ALLOC_CONF"] == "mine"


@pytest.mark.parametrize(
    ("env", "allocator"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "mine"}, "mine"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "mine"}, "mine"),
    ],
)
def test_a_process_without_the_scripts_has_their_environment(env, allocator):
    program = (
        "import os, sys; from sapo_megatron.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "main(['nothing']); [print(f'{n}={v}') for n, v in os.environ.items()]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT), "NCCL_DEBUG": "mine", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    got = dict(line.split("=", 1) for line in done.stdout.splitlines())
    wanted = ENVIRONMENT | {"NCCL_DEBUG": "mine", "PYTORCH_ALLOC_CONF": allocator}
    assert wanted.items() <= got.items()
    assert got["PYTORCH_CUDA_ALLOC_CONF"] == allocator


# What they do


@pytest.mark.slow
def test_single_node_runs_a_recipe(start, tmp_path, bystander):
    run = start("single_node.sh", "recipe.yaml", JOB_ID="j1", NPROC_PER_NODE="1")
    assert run.wait() == 0, run.said
    assert (tmp_path / "runs" / "recipe" / "j1" / "summary.json").exists()


def test_a_single_node_that_is_ended_leaves_nothing(start, tmp_path, bystander):
    env = {"JOB_ID": "j1", "NPROC_PER_NODE": "1"}
    run = start("single_node.sh", "recipe.yaml", "train.steps=500", **env)
    until((tmp_path / "runs/recipe/j1/metrics.jsonl").exists, "a first step", run)
    run.process.terminate()
    assert run.wait() != 0
    assert not (tmp_path / "runs/recipe/j1/summary.json").exists()


@pytest.mark.slow
def test_two_agents_go_on_from_a_checkpoint_when_a_worker_is_killed(start, tmp_path, bystander):
    words = [
        "recipe.yaml",
        "train.steps=4",
        "checkpoint.every=1",
        "reward.function=tests.support.tiny:varied",
    ]
    env = {
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
        "JOB_ID": "j1",
    }
    agents = [start("multi_node.sh", *words, **env) for _ in range(2)]
    run = tmp_path / "runs" / "recipe" / "j1"
    until(lambda: list(run.glob("checkpoints/step-*/state.json")), "a checkpoint", *agents)
    (victim,) = [pid for agent in agents for pid in agent.processes() if rank(pid) == "1"]
    os.kill(victim, signal.SIGKILL)
    first = read_metrics(run)[0]
    assert [agent.wait() for agent in agents] == [0, 0], "\n".join(a.said for a in agents)
    said = "".join(agent.said for agent in agents)
    assert re.search(r"^loaded .*/j1/checkpoints/step-", said, re.M)
    rows = read_metrics(run)
    assert rows[0] == first  # with its timings: the step was not taken again
    assert [row["step"] for row in rows] == list(range(1, 5))
    assert (run / "summary.json").exists()


def rank(pid):
    """RANK of a trainer; None for another process, such as torchrun, or one that has gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if b"sapo_megatron" not in words or b"torch.distributed.run" in words:
        return None
    return next((e.removeprefix(b"RANK=").decode() for e in env if e.startswith(b"RANK=")), None)


# Slurm


SCONTROL = """\
#!/bin/bash
case "$1 $2" in
"show hostnames") tr , '\\n' <<<"$3" ;;
*) echo "$@" >>"$SLURM_SUBMIT_DIR/scontrol" ;;
esac
"""
SRUN = """\
#!/bin/bash
for word in "$@"; do
    case "$word" in
    --nodelist=*) IFS=, read -ra nodes <<<"${word#*=}" ;;
    --output=*) output=${word#*=} ;;
    --*) ;;
    *) break ;;
    esac
    shift
done
pids=()
trap 'kill "${pids[@]}"' TERM
for node in "${nodes[@]}"; do
    "$@" >>"${output//%N/$node}" 2>&1 &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
exit "$status"
"""
TRAINER = """\
#!/bin/bash
# Stands for the trainer, between USR1 and its end: saves when it is asked to stop.
echo "$NNODES $MASTER_ADDR $JOB_ID $*"
until [[ -e $RUN_DIR/stop ]]; do
    touch "$RUN_DIR/trains-$$"
    sleep 0.1
done
[[ ${DEAF:-} ]] && exec sleep 600
touch "$RUN_DIR/saw-$$"
until [[ $(find "$RUN_DIR" -name 'saw-*' | wc -l) == "$NNODES" ]]; do sleep 0.1; done
rm -f "$RUN_DIR/stop"
[[ ${FINISHES:-} ]] && touch "$RUN_DIR/summary.json"
exit "${FAILS:-0}"
"""
SERVER = """\
#!/bin/bash
echo "$ROLLOUT_HOST $*"
exec sleep 600
"""


@pytest.fixture
def slurm(start, tmp_path):
    """Runs slurm.sbatch as a job of localhost nodes, with the scripts below it standing in."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    launch = tmp_path / "launch"
    launch.mkdir()
    shutil.copy(LAUNCH / "common.sh", launch)
    for name, text in {"multi_node.sh": TRAINER, "rollout_server.sh": SERVER}.items():
        (launch / name).write_text(text)
        (launch / name).chmod(0o755)

    def slurm(*words, nodes="localhost", **env):
        ours = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": nodes,
        }
        return start("slurm.sbatch", "recipe.yaml", *words, **{**ours, **env})

    return slurm


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "recipe" / "42"


def asked_of_scontrol(tmp_path):
    path = tmp_path / "scontrol"
    return path.read_text().splitlines() if path.exists() else []


def test_usr1_saves_and_requeues(slurm, tmp_path, run_dir, bystander):
    run_dir.mkdir(parents=True)
    (run_dir / "stop").touch()  # left by an earlier start: it must not end this one
    job = slurm("train.steps=9", nodes="localhost,n2")
    log = run_dir / "logs" / "train-localhost.log"
    until(lambda: len(list(run_dir.glob("trains-*"))) == 2, "both trainers", job)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, job.said
    assert asked_of_scontrol(tmp_path) == ["requeue 42"]
    assert log.read_text() == "2 localhost 42 recipe.yaml train.steps=9\n"
    assert sorted(p.name for p in (run_dir / "logs").iterdir()) == [
        *["started", "train-localhost.log", "train-n2.log"]
    ]
    assert not (run_dir / "stop").exists()


@pytest.mark.parametrize(
    ("env", "status"), [({"FINISHES": "1"}, 0), ({"FAILS": "3"}, 3)], ids=["finished", "failed"]
)
def test_what_needs_no_second_start_is_not_requeued(slurm, tmp_path, run_dir, env, status):
    job = slurm(**env)
    until((run_dir / "logs" / "train-localhost.log").exists, "the trainer", job)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == status, job.said
    assert asked_of_scontrol(tmp_path) == []


def test_a_summary_from_before_does_not_keep_it_from_the_queue(slurm, tmp_path, run_dir):
    run_dir.mkdir(parents=True)
    (run_dir / "summary.json").touch()
    os.utime(run_dir / "summary.json", (1, 1))
    job = slurm()
    until((run_dir / "logs" / "train-localhost.log").exists, "the trainer", job)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, job.said
    assert asked_of_scontrol(tmp_path) == ["requeue 42"]


def test_a_trainer_that_does_not_stop_in_time_is_requeued(slurm, tmp_path, run_dir):
    job = slurm(DEAF="1", STOP_WAIT_S="1")
    until((run_dir / "logs" / "train-localhost.log").exists, "the trainer", job)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, job.said
    assert "did not end in time" in job.said
    assert asked_of_scontrol(tmp_path) == ["requeue 42"]


def test_a_cancelled_job_ends_what_it_started(slurm, tmp_path, run_dir, bystander):
    job = slurm()
    until((run_dir / "logs" / "train-localhost.log").exists, "the trainer", job)
    job.process.terminate()
    assert job.wait() == 143, job.said
    assert asked_of_scontrol(tmp_path) == []


def test_rollout_nodes_serve_before_the_trainer_starts(slurm, run_dir, tmp_path):
    with health() as (port, healthy, refused):
        env = {"ROLLOUT_NODES": "1", "ROLLOUT_MODEL": "org/model", "ROLLOUT_PORT": port}
        job = slurm("train.steps=9", nodes="n1,localhost", **env)
        served = run_dir / "logs" / "rollout-localhost.log"
        until(lambda: served.exists() and served.read_text(), "the server", job)
        assert served.read_text() == "0.0.0.0 org/model\n"
        until(lambda: len(refused) > 1, "somebody who asks whether it is up", job)
        trained = run_dir / "logs" / "train-n1.log"
        assert not trained.exists()
        healthy.set()
        until(lambda: trained.exists() and trained.read_text(), "the trainer", job)
    assert trained.read_text() == (
        f"1 n1 42 recipe.yaml rollout.engine=vllm rollout.servers=[http://localhost:{port}] "
        "train.steps=9\n"
    )
    (run_dir / "stop").touch()  # by hand: the run ends, and nobody asked for another start
    assert job.wait() == 0, job.said
    assert asked_of_scontrol(tmp_path) == []


def test_rollout_nodes_that_never_answer_end_the_job(slurm, run_dir):
    env = {"ROLLOUT_NODES": "1", "ROLLOUT_MODEL": "m", "ROLLOUT_PORT": free_port()}
    job = slurm(nodes="n1,localhost", ROLLOUT_WAIT_S="1", **env)
    assert job.wait() == 1
    assert re.search(r"error: no answer from http://localhost:\d+/health; see .*rollout-", job.said)
    assert not (run_dir / "logs" / "train-n1.log").exists()


@contextlib.contextmanager
def health():
    """A server whose GET /health fails until the event is set, and those that were refused."""
    healthy, refused = threading.Event(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            up = healthy.is_set() and self.path == "/health"
            refused.extend([] if up else [self.path])
            self.send_response(200 if up else 503)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield str(server.server_port), healthy, refused
    finally:
        server.shutdown()
        server.server_close()


def test_a_dry_run_of_a_job(slurm, tmp_path, run_dir):
    job = slurm(
        "train.steps=9",
        nodes="n1,n2,n3",
        DRY_RUN="1",
        ROLLOUT_NODES="1",
        ROLLOUT_MODEL="org/model",
        ROLLOUT_PYTHON="/vllm/python",
        ROLLOUT_OPTIONS='--weight-transfer-config {"backend":"nccl"}',
        SRUN_OPTIONS="--container-image=nvcr.io#nvidia/pytorch",
    )
    assert job.wait() == 0, job.said
    serve, train = map(shlex.split, job.said.splitlines())
    logs = "runs/recipe/42/logs"
    common = ["--cpu-bind=none", "--kill-on-bad-exit=1", "--open-mode=append"]
    container = "--container-image=nvcr.io#nvidia/pytorch"
    assert serve == [
        *["env", "PYTHON=/vllm/python", "ROLLOUT_HOST=0.0.0.0"],
        *["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--nodelist=n3", *common],
        *[f"--output={logs}/rollout-%N.log", container],
        *[f"{tmp_path}/launch/rollout_server.sh", "org/model"],
        *["--weight-transfer-config", '{"backend":"nccl"}'],
    ]
    assert train == [
        *["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2", *common],
        *[f"--output={logs}/train-%N.log", container],
        *[f"{tmp_path}/launch/multi_node.sh", "recipe.yaml", "rollout.engine=vllm"],
        *["rollout.servers=[http://n3:8000]", "train.steps=9"],
    ]
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ROLLOUT_NODES": "1", "ROLLOUT_MODEL": "m"}, "ROLLOUT_NODES: expected fewer than 1"),
        ({"ROLLOUT_NODES": "1", "nodes": "n1,n2"}, "ROLLOUT_MODEL"),
    ],
)
def test_rollout_nodes_that_do_not_fit(slurm, env, said):
    job = slurm(**env)
    assert job.wait() == 2
    (line,) = job.said.splitlines()
    assert said in line


def test_what_the_job_asks_of_slurm():
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = re.findall(r"^#SBATCH (.*)$", text, re.M)
    assert {"--requeue", "--signal=B:USR1@600", "--open-mode=append"} <= set(asked)
    # Slurm reads no directive below the first command.
    assert text.rindex("#SBATCH") < text.index("\nset -euo pipefail")


# Kubernetes


def test_the_manifest():
    text = (LAUNCH / "kubernetes.yaml").read_text()
    job = next(d for d in yaml.safe_load_all(text) if d["kind"] == "PyTorchJob")
    assert job["apiVersion"] == "kubeflow.org/v1"
    policy = job["spec"]["elasticPolicy"]
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert policy["rdzvBackend"] == "c10d"
    assert policy["maxRestarts"] > 0
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert {"nvidia.com/gpu", "cpu", "memory"} <= container["resources"]["limits"].keys()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    by_path = {path: volumes[name] for name, path in mounts.items()}
    assert by_path["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in by_path["/shared"]
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["WANDB_API_KEY"]["valueFrom"]["secretKeyRef"].keys() >= {"name", "key"}
    assert "value" not in env["WANDB_API_KEY"]
    assert env["RUN_DIR"]["value"].startswith("/shared/")
    assert not any(d["kind"] == "Secret" for d in yaml.safe_load_all(text))


def test_the_manifests_command_is_multi_node(start):
    text = (LAUNCH / "kubernetes.yaml").read_text()
    job = next(d for d in yaml.safe_load_all(text) if d["kind"] == "PyTorchJob")
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    env = {v["name"]: v["value"] for v in container["env"] if "value" in v}
    # What the operator adds to the environment of a job with an elastic policy.
    operator = {"PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_NNODES": "2:4"}
    operator |= {"PET_RDZV_BACKEND": "c10d", "PET_MAX_RESTARTS": "10"}
    done = subprocess.run(
        [*container["command"]],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **env, **operator, "DRY_RUN": "1", "NPROC_PER_NODE": "8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[words.index("--nnodes") + 1] == "2:4"
    assert words[words.index("--rdzv-endpoint") + 1] == "job-worker-0:23456"
    assert words[words.index("--max-restarts") + 1] == "10"
    assert f"train.run_dir={env['RUN_DIR']}" in words
