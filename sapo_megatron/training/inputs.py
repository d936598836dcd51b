"""What a run reads before it starts; mistakes are found here, before any process is started."""

import logging
from dataclasses import dataclass
from pathlib import Path

from sapo_megatron.data.endings import Endings, find_endings
from sapo_megatron.data.prompts import PromptSource, held_out
from sapo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import Architecture, read_architecture
from sapo_megatron.hf.folder import WeightFiles, check_same, find_model
from sapo_megatron.policy.machine import check_machine, check_servers
from sapo_megatron.recipe.check import check_architecture, check_generation, check_world
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.rollout.verifiers import why_unverifiable
from sapo_megatron.sample import Prompt, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    arch: Architecture
    model: Path
    """The model's folder."""
    tokenizer: Tokenizer
    endings: Endings
    problems: list[Prompt]
    """Held-out problems."""
    source: PromptSource


def read_model(recipe: Recipe, world_size: int, *, weights: bool) -> tuple[Path, Architecture]:
    """The model's folder, with ``weights`` or without, and its architecture. Raises UserError."""
    model = find_model(recipe.model.path, weights=weights)
    check_machine(recipe)
    arch = check_same(read_architecture(model), recipe.model.path, recipe.model.architecture)
    check_architecture(recipe, arch)
    check_world(recipe, world_size)
    return model, arch


def read_inputs(recipe: Recipe, world_size: int, *, fresh: bool = True) -> Inputs:
    """Read them, and check them against the recipe and each other. Raises UserError.

    ``fresh``: for weights of the model's folder, not of a checkpoint.
    """
    model, arch = read_model(recipe, world_size, weights=fresh)
    check_generation(recipe.rollout, arch)
    check_servers(recipe, arch)
    tokenizer = load_tokenizer(
        recipe.model.tokenizer or str(model),
        arch.vocab_size,
        trust_remote_code=recipe.model.trust_remote_code,
        template_arguments=recipe.data.chat_template_kwargs,
    )
    longest = recipe.rollout.max_prompt_length
    useless = why_unverifiable(recipe.reward.function)
    source = PromptSource(recipe.data, tokenizer, max_prompt_length=longest, unverifiable=useless)
    problems = held_out(
        recipe.data,
        tokenizer,
        recipe.eval.num_problems,
        max_prompt_length=longest,
        unverifiable=useless,
    )
    source.exclude(p.text for p in problems)
    return Inputs(
        arch=arch,
        model=model,
        tokenizer=tokenizer,
        endings=find_endings(recipe, model, arch, tokenizer),
        problems=problems,
        source=source,
    )


def preflight(recipe: Recipe, world_size: int, *, fresh: bool = True) -> Inputs:
    """``read_inputs``, and use each once: what every process would stumble over, one finds."""
    inputs = read_inputs(recipe, world_size, fresh=fresh)
    if fresh and recipe.model.init == "pretrained":
        left_out = WeightFiles(inputs.model).left_out(inputs.arch)
        if left_out:
            logger.info("of the model neither trained nor exported: %s", left_out)
    beginning = inputs.source.state_dict()
    (prompt,) = inputs.source.next(1)
    if fresh and recipe.cold_start.steps:
        demonstrations(recipe, inputs)
    inputs.source.load_state_dict(beginning)
    with Scorer(recipe.reward) as scorer:
        scorer.try_on(prompt)
    return inputs


def demonstrations(recipe: Recipe, inputs: Inputs) -> list[Sample]:
    """The source's next problems, answered: a batch of the cold start. Raises UserError."""
    prompts = inputs.source.next(recipe.cold_start.batch_size)
    return [_demonstration(p, inputs, recipe) for p in prompts]


def _demonstration(prompt: Prompt, inputs: Inputs, recipe: Recipe) -> Sample:
    if not prompt.answer:
        raise UserError(
            f"cold_start: expected problems with an answer to learn from, got none for "
            f"{prompt.text!r} of {prompt.task}; use another task or set cold_start.steps=0"
        )
    response = [*inputs.tokenizer.encode(prompt.answer), inputs.endings.turn_id]
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
