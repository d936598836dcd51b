"""What a run reads before it starts; mistakes are found here, before any process is started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_megatron.check import check_architecture, check_world
from sapo_megatron.config import Recipe, UserError, read_architecture
from sapo_megatron.rollout.prompts import PromptSource, held_out
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.rollout.tokenizer import Tokenizer, load_tokenizer
from sapo_megatron.sample import Prompt, Sample

_DENSE = (
    "attention_bias",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)
_MOE = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
)
ARCHITECTURES = {"qwen3": _DENSE, "qwen3_moe": _DENSE + _MOE}
"""``model_type`` -> what ``config.json`` must say."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    arch: dict[str, Any]
    """The model's ``config.json``."""
    tokenizer: Tokenizer
    problems: list[Prompt]
    """Held-out problems."""
    source: PromptSource


def read_inputs(recipe: Recipe, world_size: int) -> Inputs:
    """Read them, and check them against the recipe and each other. Raises UserError."""
    arch = read_architecture(recipe.model)
    _check_supported(arch, Path(recipe.model.path) / "config.json")
    check_architecture(recipe, arch)
    check_world(recipe, world_size)
    tokenizer = load_tokenizer(recipe.model.tokenizer or recipe.model.path, arch["vocab_size"])
    longest = recipe.rollout.max_prompt_length
    excluded: set[str] = set()
    source = PromptSource(recipe.data, tokenizer, max_prompt_length=longest, exclude=excluded)
    problems = held_out(recipe.data, tokenizer, recipe.eval.num_problems, max_prompt_length=longest)
    excluded.update(p.text for p in problems)
    return Inputs(arch=arch, tokenizer=tokenizer, problems=problems, source=source)


def preflight(recipe: Recipe, world_size: int) -> Inputs:
    """``read_inputs``, and use each once: what every process would stumble over, one finds."""
    inputs = read_inputs(recipe, world_size)
    beginning = inputs.source.state_dict()
    inputs.source.next(1)
    if recipe.cold_start.steps:
        demonstrations(recipe, inputs)
    inputs.source.load_state_dict(beginning)
    Scorer(recipe.reward).close()
    return inputs


def demonstrations(recipe: Recipe, inputs: Inputs) -> list[Sample]:
    """The source's next problems, answered: a batch of the cold start. Raises UserError."""
    prompts = inputs.source.next(recipe.cold_start.batch_size)
    return [_demonstration(p, inputs.tokenizer, recipe) for p in prompts]


def _demonstration(prompt: Prompt, tokenizer: Tokenizer, recipe: Recipe) -> Sample:
    if not prompt.answer:
        raise UserError(
            f"cold_start: expected problems with an answer to learn from, got none for "
            f"{prompt.text!r} of {prompt.task}; use another task or set cold_start.steps=0"
        )
    response = [*tokenizer.encode(prompt.answer), tokenizer.eos_id]
    room = recipe.rollout.max_response_length
    if len(response) > room:
        raise UserError(
            f"cold_start: expected answers of at most rollout.max_response_length = {room} tokens, "
            f"got {len(response)} for {prompt.text!r} of {prompt.task}; raise it or set "
            f"cold_start.steps=0"
        )
    return Sample(
        uid=prompt.uid,
        prompt_tokens=prompt.tokens,
        response_tokens=response,
        rollout_logprobs=[0.0] * len(response),
        truncated=False,
    )


def _check_supported(arch: dict[str, Any], path: Path) -> None:
    kind = arch.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{path}: expected model_type {' or '.join(ARCHITECTURES)}, got {kind!r}; use a model "
            f"of such an architecture"
        )
    for key in ARCHITECTURES[kind]:
        if key not in arch:
            raise UserError(f"{path}: {key}: missing; a {kind} model needs it")
