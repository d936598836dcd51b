"""A training run of a tiny model, as ``train`` makes it, and what its metrics say."""

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sapo_megatron.commands.qualify.models import VOCABULARY, make_model
from sapo_megatron.commands.qualify.policies import Dtype, Result, Setting, recipe_for
from sapo_megatron.data.endings import Endings
from sapo_megatron.data.prompts import PromptSource, held_out
from sapo_megatron.data.tokenizer import Message
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.policy import parallel
from sapo_megatron.recipe.schema import (
    DataConfig,
    EvalConfig,
    RolloutConfig,
    RoutingConfig,
    SourceConfig,
)
from sapo_megatron.training.inputs import Inputs
from sapo_megatron.training.loop import train


class Parity:
    """A tokenizer without files: text is its bytes, and ids say whether their sum is odd.

    Half of what a random model answers is then right, and advantages are not all zero.
    """

    eos_id = 1
    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [2 + byte % (VOCABULARY - 2) for byte in text.encode()]

    encode_prompt = encode

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        raise AssertionError("its prompts are no conversations")

    def turn_ends(self) -> dict[int, str]:
        return {}

    def decode(self, ids: Iterable[int]) -> str:
        return str(sum(ids) % 2)

    spell = decode


def whole_runs(setting: Setting) -> Result:
    """Three steps in fp32 and in bf16, two updates each; and one step of a single update."""
    found: Result = {}
    runs: tuple[tuple[str, Dtype, int, int], ...] = (
        ("first update", "float32", 1, 1),
        ("float32", "float32", 3, 2),
        ("bfloat16", "bfloat16", 3, 2),
    )
    for name, dtype, steps, updates in runs:
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            for line in _train(setting, Path(folder), dtype, steps, updates):
                for key, value in line.items():
                    if isinstance(value, int | float):
                        found.setdefault(f"{name} {key}", []).append(float(value))
    return found


def _train(
    setting: Setting, folder: Path, dtype: Dtype, steps: int, updates: int
) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    make_model("qwen3-moe", folder / "model", getattr(torch, dtype))
    rows = [
        {"prompt": f"{a} + {b} =", "answer": str((a + b) % 2)} for a in range(9) for b in (3, 8)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = recipe_for(setting, folder / "model", dtype)
    recipe = dataclasses.replace(
        base,
        data=DataConfig(train=SourceConfig(path=str(folder / "sums.jsonl"))),
        rollout=RolloutConfig(
            rollout_batch_size=4, num_generations=4, max_prompt_length=16, max_response_length=6
        ),
        routing=RoutingConfig(decompose_every=1, prob_every=2),
        optimizer=dataclasses.replace(base.optimizer, lr=1e-3),
        train=dataclasses.replace(
            base.train, steps=steps, num_mini_batches=updates, run_dir=str(folder / "run")
        ),
        eval=EvalConfig(num_problems=4, k=2),
    )
    tokenizer = Parity()
    source = PromptSource(recipe.data, tokenizer, max_prompt_length=16)
    problems = held_out(recipe.data, tokenizer, 4, max_prompt_length=16)
    source.exclude(problem.text for problem in problems)
    inputs = Inputs(
        arch=read_architecture(folder / "model"),
        model=folder / "model",
        tokenizer=tokenizer,
        endings=Endings(stop_ids=(Parity.eos_id,), turn_id=Parity.eos_id),
        problems=problems,
        source=source,
    )
    try:
        train(recipe, inputs)
    finally:
        parallel.teardown()
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
