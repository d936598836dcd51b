"""A recipe that has changed when a run goes on: a key takes effect, unless a table here has it.

What the place in the training data means is asked of the data, not of keys.
"""

import logging
from pathlib import Path
from typing import Any

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.load import from_plain, keys, to_plain
from sapo_megatron.recipe.schema import Recipe

logger = logging.getLogger(__name__)

BOUND = (
    "model.params_dtype",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.num_layers_in_first_pipeline_stage",
    "parallel.num_layers_in_last_pipeline_stage",
    "optimizer.optimizer_offload_fraction",
)
"""Keys that the tensors of a checkpoint are bound to."""

BOUND_AHEAD = (
    "model.tokenizer",
    "data.train.template",
    "data.template",
    "data.apply_chat_template",
    "data.chat_template_kwargs",
    "rollout.num_generations",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.max_prompt_length",
    "rollout.max_response_length",
    "rollout.stop_token_ids",
    "reward.function",
    "routing.router_replay",
    "routing.observe",
)
"""Keys that responses which were generated ahead are bound to."""

KEPT = {
    "name": "the run stays in its folder",
    "train.run_dir": "the run stays in its folder",
    "model.init": "the weights are the checkpoint's",
    "cold_start.steps": "it is over",
    "cold_start.batch_size": "it is over",
    "cold_start.lr": "it is over",
    "cold_start.lr_warmup_steps": "it is over",
}
"""Keys for which a change comes too late, and why."""

NOTES = {
    "model.path": "the weights are the checkpoint's; the rest is read there",
    "eval": "the score before the first step stays as it was measured",
    "data.eval": "the score before the first step stays as it was measured",
}
"""What is said beside a change of a key, or of any in a section, that takes effect."""


def check_bound(saved: dict[str, Any], recipe: Recipe, checkpoint: Path, *, ahead: bool) -> None:
    """Raise UserError where ``recipe`` does not fit a checkpoint, the work of ``saved``, as data.

    ``ahead``: whether it has responses that were generated ahead.
    """
    ours = to_plain(recipe)
    reasons = dict.fromkeys(BOUND, f"with which {checkpoint} was written")
    if ahead:
        held = f"with which {checkpoint} has responses that were generated ahead"
        reasons |= dict.fromkeys(BOUND_AHEAD, f"{held} (rollout.async_steps)")
    for key, reason in reasons.items():
        before, now = value(saved, key), value(ours, key)
        if before != now:
            raise UserError(f"{key}: expected {before}, {reason}, got {now}; set it back")


def going_on(saved: dict[str, Any], recipe: Recipe) -> Recipe:
    """``recipe`` with what is kept of ``saved``; says in a line each what is different."""
    ours, every, kept = to_plain(recipe), keys(), False
    sections = {key.rpartition(".")[0] for key in every}
    for key in every:
        before, now = value(saved, key), value(ours, key)
        if key in sections or before == now:
            continue
        if key in KEPT:
            kept = True
            *parents, name = key.split(".")
            (value(ours, parents[0]) if parents else ours)[name] = before
            logger.info("changed: %s: %s is kept, not %s (%s)", key, before, now, KEPT[key])
        else:
            note = next((f" ({n})" for k, n in NOTES.items() if f"{key}.".startswith(f"{k}.")), "")
            logger.info("changed: %s: %s -> %s%s", key, before, now, note)
    return from_plain(ours) if kept else recipe


def value(plain: dict[str, Any], key: str) -> Any:
    """The value of a dotted key of a recipe as data; None in a section that is left out."""
    node: Any = plain
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
