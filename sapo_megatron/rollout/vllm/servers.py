"""vLLM servers that the trainer starts, on the machine it runs on."""

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import torch

import sapo_megatron
from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.recipe.schema import Recipe, RolloutConfig
from sapo_megatron.rollout.vllm import guard
from sapo_megatron.rollout.vllm.answers import PLAIN_FLAG, ROUTES_FLAG, SLEEP_FLAG, WHOLE_FLAG
from sapo_megatron.rollout.vllm.client import EXTENSION

logger = logging.getLogger(__name__)

POLL_S = 0.5
LOG_LINES = 3
"""Last lines of a log that an error shows."""


OF_THE_TRAINER = re.compile(
    "(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$|MEGATRON_CORE_VERSION$"
    # vLLM's tensor parallelism dies of segments that can grow (vllm issue 42609).
    "|PYTORCH_(CUDA_)?ALLOC_CONF$|CUDA_DEVICE_MAX_CONNECTIONS$"
    "|TORCHELASTIC_|TORCH_NCCL_|GROUP_|ROLE_|PYTHON|SAPO_MEGATRON_(STORE|PARENT)$"
)
"""Variables that torchrun and the trainer set for themselves, by how their names begin."""


@dataclass(frozen=True)
class _Process:
    url: str
    log: Path
    guard: subprocess.Popen
    port: socket.socket
    """Keeps the server's port from others who ask for a free one."""


class LocalServers:
    """``rollout.num_servers`` servers on free loopback ports, without weights until the first load.

    One process of each node has some.

    They end with ``close``, with a ``with`` statement, and when this process dies. Logs and what
    else they need are in a folder of the run.
    """

    def __init__(self, recipe: Recipe, model: Path, folder: Path, weights: Path) -> None:
        """Start them and wait until they answer; ``model`` holds ``config.json``.

        ``weights``: where they will get theirs from, which is removed with them.

        Raises UserError where there is no such Python, and RunFailed for a server that exits or
        is not up within ``rollout.server_timeout_s``.
        """
        python = recipe.rollout.vllm_python
        assert python is not None
        if shutil.which(python) is None:
            raise UserError(
                f"rollout.vllm_python: expected the Python of an environment with vLLM, got "
                f"{python}, which is no program; make one: python -m venv venvs/vllm && "
                f"venvs/vllm/bin/pip install vllm==0.32.0"
            )
        gpus = _gpus_of_servers(recipe.rollout)
        if len(gpus) < (least := recipe.rollout.min_servers):
            raise UserError(
                f"rollout.min_servers: expected at most {len(gpus)}, as many as this node starts, "
                f"got {least}; lower it, or raise rollout.num_servers"
            )
        folder.mkdir(parents=True, exist_ok=True)
        environment = _environment(folder)
        self._weights = weights
        self._processes: list[_Process] = []
        try:
            for number, visible in enumerate(gpus):
                theirs = environment if visible is None else {**environment, _VISIBLE: visible}
                self._processes.append(_start(recipe, model, folder, number, theirs, weights))
            self._wait(recipe.rollout.server_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(p.url for p in self._processes)

    def exited(self, url: str) -> str | None:
        """Why the server at ``url`` will not come back; None: it runs."""
        (process,) = (p for p in self._processes if p.url == url)
        status = process.guard.poll()
        return (
            None
            if status is None
            else f"it has ended with status {status}; {_last_words(process.log)}"
        )

    def close(self) -> None:
        """End all servers and wait until they are gone."""
        for process in self._processes:
            assert process.guard.stdin is not None
            process.guard.stdin.close()
        for process in self._processes:
            process.guard.wait(2 * guard.GRACE_S)
            process.port.close()
        shutil.rmtree(self._weights, ignore_errors=True)
        self._processes = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, timeout_s: float) -> None:
        began = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5.0) as http:
            for process in self._processes:
                while not _answers(http, process.url):
                    if gone := self.exited(process.url):
                        raise RunFailed(f"{process.url}: expected a vLLM server, but {gone}")
                    if time.monotonic() - began > timeout_s:
                        raise RunFailed(
                            f"{process.url}: expected a vLLM server within "
                            f"rollout.server_timeout_s {timeout_s:g} s, got none yet; "
                            f"{_last_words(process.log)}, or raise the limit"
                        )
                    time.sleep(POLL_S)
        seconds = time.monotonic() - began
        logger.info("vLLM up after %.0f s at %s", seconds, ", ".join(self.urls))


def _start(
    recipe: Recipe,
    model: Path,
    folder: Path,
    number: int,
    environment: dict[str, str],
    weights: Path,
) -> _Process:
    port = _free_port()
    number_of_port = port.getsockname()[1]
    url, log = f"http://127.0.0.1:{number_of_port}", folder / f"{number}.log"
    command = [
        sys.executable,
        "-m",
        guard.__name__,
        str(weights),
        *_command(recipe, model, number_of_port),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is the trainer's, which ends its servers
        )
    return _Process(url, log, process, port)


def _command(recipe: Recipe, model: Path, port: int) -> list[str]:
    rollout = recipe.rollout
    assert rollout.vllm_python is not None
    words = [rollout.vllm_python, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(model), "--load-format", "dummy", "--skip-tokenizer-init"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", recipe.model.params_dtype, "--generation-config", "vllm"]
    words += ["--tensor-parallel-size", str(rollout.server_tensor_parallel_size)]
    words += ["--max-model-len", str(rollout.max_prompt_length + rollout.max_response_length)]
    words += ["--worker-extension-cls", EXTENSION, *PLAIN_FLAG]
    if recipe.routing.router_replay == "R3":
        words += [ROUTES_FLAG]
    if rollout.colocate:
        words += [SLEEP_FLAG, "--gpu-memory-utilization", str(rollout.gpu_memory_utilization)]
    if not torch.cuda.is_available():
        # Compiling takes longer than a small model runs.
        words += ["--enforce-eager", WHOLE_FLAG]
    return words


def _environment(folder: Path) -> dict[str, str]:
    """A server's environment: the trainer's, without what torchrun and its own packages left."""
    kept = {name: value for name, value in os.environ.items() if not OF_THE_TRAINER.match(name)}
    # The package alone: beside it may lie everything else that the trainer has installed.
    link = folder / "path" / "sapo_megatron"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(sapo_megatron.__file__).parent)
    ours = {
        "PYTHONPATH": str(link.parent),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # a server's workers are all on this machine
    }
    # GiB; what vLLM takes otherwise is most of the machine's memory, for every server.
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | kept | ours


_VISIBLE = "CUDA_VISIBLE_DEVICES"


def _gpus_of_servers(rollout: RolloutConfig) -> list[str | None]:
    """For each server of this node, what of ``CUDA_VISIBLE_DEVICES`` it gets; None without GPUs.

    The trainer's own, or those behind the last that a process of the trainer has. Raises UserError
    where there are too few.
    """
    count, size = torch.cuda.device_count(), rollout.server_tensor_parallel_size
    if not count and not rollout.colocate:
        return [None] * (rollout.num_servers or 1)
    first = 0 if rollout.colocate else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    number = rollout.num_servers or max(1, (count - first) // size)
    if first + number * size > count:
        whose = "of the trainer" if rollout.colocate else "that no process trains on"
        raise UserError(
            f"rollout.num_servers: expected at most {max(0, count - first) // size} servers with "
            f"rollout.server_tensor_parallel_size {size} on the {max(0, count - first)} GPUs of "
            f"this node {whose}, got {number}; start fewer, or smaller ones"
        )
    names = os.environ.get(_VISIBLE, "").split(",")
    names = names if names != [""] else [str(gpu) for gpu in range(count)]
    starts = range(first, first + number * size, size)
    return [",".join(names[start : start + size]) for start in starts]


def _free_port() -> socket.socket:
    """A socket that holds a free loopback port, and lets a server have it, too."""
    free = socket.socket()
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    free.bind(("127.0.0.1", 0))
    return free


def _answers(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def _last_words(log: Path) -> str:
    """The error that a server ended with, behind which there may be thousands of lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    for line in lines:
        if re.search(r"\w(Error|Exception): ", line) and " WARNING " not in line:
            return f"the first error in {log} is: {line}"
    last = [line for line in lines if line][-LOG_LINES:]
    return f"the last lines of {log} are: {' | '.join(last) or 'none'}"
