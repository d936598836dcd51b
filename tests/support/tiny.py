"""A model and recipes so small that whole runs fit into a test, and the command line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sapo_megatron.sample import Prompt
from tests.support import forked

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
TOKENIZER = ROOT / "recipes" / "tiny-moe" / "tokenizer.model"
IN_PROCESS = {
    **{"rollout.engine": "in_process", "rollout.vllm_python": "null", "rollout.servers": "[]"},
    **{"rollout.colocate": "false", "rollout.colocate_offload": "gradients"},
    **{"rollout.large_in_process": "true", "rollout.generation_batch_size": "64"},
}
"""Settings with which a recipe for GPUs generates in the training processes."""
ARCH: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.2,  # far from uniform, so that sampled tokens mean something
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 104,
}


def even(prompt: Prompt, response: str) -> float:
    """A reward that differs within nearly every group, also of an untrained model."""
    return sum(c in "02468" for c in response) / max(len(response), 1)


def varied(prompt: Prompt, response: str) -> float:
    """A reward that differs between nearly any two responses."""
    return zlib.crc32(response.encode()) % 16 / 15


def starts_even(prompt: Prompt, response: str) -> float:
    """A reward of 0 or 1 that some groups agree on."""
    return float(response[:1] in "02468")


def never(prompt: Prompt, response: str) -> float:
    """A reward that no group has anything to learn from."""
    return 0.0


def fades(prompt: Prompt, response: str) -> float:
    """A reward that differs between responses, until the source's first prompts are through."""
    return varied(prompt, response) if prompt.uid < 12 else 0.0


def fails_on_short(prompt: Prompt, response: str) -> float:
    """A reward that breaks on responses of fewer than four characters."""
    return float(response[3] in "02468")


def tells_two_apart(prompt: Prompt, response: str) -> float:
    """A reward that differs between responses to the source's first two prompts alone."""
    return zlib.crc32(response.encode()) / 2**32 if prompt.uid < 3 else 0.0


def breaks(prompt: Prompt, response: str) -> float:
    """A reward that is none."""
    raise RuntimeError("the judge is down")


def write_recipe(folder: Path, *, arch: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A recipe, its model and its data below ``folder``; ``sections`` are merged into it."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps({**ARCH, **(arch or {})}))
    rows = [
        {"prompt": f"Calculate {a} + {b}.", "answer": a + b} for a in range(12) for b in (3, 45)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "model": {
            "path": "model",
            "tokenizer": str(TOKENIZER),
            "init": "random",
            "params_dtype": "float32",
        },
        "data": {"train": {"path": "sums.jsonl"}},
        "rollout": {
            "rollout_batch_size": 4,
            "num_generations": 4,
            "max_prompt_length": 16,
            "max_response_length": 6,
        },
        "reward": {"function": "tests.support.tiny:varied"},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 1, "num_mini_batches": 2, "max_tokens_per_gpu": 128},
        "eval": {"num_problems": 4, "k": 2},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


WITHOUT_REPORT = (
    "-c",
    "import sys; from sapo_megatron import __main__ as program; "
    "program._report_apart = lambda run: None; sys.exit(program.main(sys.argv[1:]))",
)
"""The program for tests that do not look at its report, which takes longer than a tiny run."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Done:
    """What a program left."""

    returncode: int
    stdout: str
    stderr: str
    left: list[str]
    """Processes that were still there a minute after its end, as they called themselves."""


def cli(
    *words: Any,
    cwd: Path,
    env: dict[str, str] | None = None,
    program: tuple[str, ...] = ("-m", "sapo_megatron"),
    fresh: bool = False,
    timeout: float = 280.0,
) -> Done:
    """``sapo-megatron words`` as a program; whatever it starts is gone afterwards.

    ``fresh``: in a Python that has imported nothing yet, which takes seconds.
    """
    mark = f"SAPO_MEGATRON_TEST={uuid.uuid4().hex}"
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *inherited])}
    env = {**kept, **paths, **dict([mark.split("=")]), "OMP_NUM_THREADS": "1", **(env or {})}
    words = (*program, *map(str, words))
    # Into files: what a killed process leaves behind would keep a pipe open.
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
        if fresh:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            wait = process.wait
        else:
            process = forked.start(forked.program, words, cwd, env, out.name, err.name)
            wait = process.join
        try:
            wait(timeout)
            left = still_there(mark, process.pid)
        finally:
            end(mark, process.pid)
        status = process.returncode if fresh else process.exitcode
        assert status is not None, f"it took longer than {timeout} s: {words}"
        out.seek(0)
        err.seek(0)
        return Done(status, out.read(), err.read(), left)


def bearing(mark: str, session: int | None = None) -> list[int]:
    """Processes with this in their environment or of this session: a program and all of it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = int((path / "stat").read_text().rpartition(")")[2].split()[3]) == session
            if mine or mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def still_there(mark: str, session: int | None = None, seconds: float = 60.0) -> list[str]:
    """What has not ended after so long a time, state and command line; most often nothing."""
    last = time.monotonic() + seconds
    while (pids := bearing(mark, session)) and time.monotonic() < last:
        time.sleep(0.05)
    return [_described(pid) for pid in pids]


def _described(pid: int) -> str:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        return f"{pid} {state} {' '.join(words)}"
    return f"{pid} has ended"


def end(mark: str, session: int | None = None) -> None:
    """Kill what is still there."""
    for pid in bearing(mark, session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
