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
    *("model.params_dtype", "optimizer.optimizer_offload_fraction"),
    *("parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"),
    *("parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"),
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.num_layers_in_first_pipeline_stage",
    "parallel.num_layers_in_last_pipeline_stage",
)
"""Keys that the tensors of a checkpoint are bound to."""

BOUND_AHEAD = (
    *("data.template", "data.train.template", "data.apply_chat_template"),
    *("data.chat_template_kwargs", "model.tokenizer", "rollout.engine", "rollout.temperature"),
    *("rollout.top_p", "rollout.num_generations", "rollout.stop_token_ids"),
    *("rollout.max_prompt_length", "rollout.max_response_length", "reward.function"),
    *("routing.router_replay", "routing.observe"),
)
"""Keys that responses which were generated ahead are bound to."""

KEPT = {
    **dict.fromkeys(("name", "train.run_dir"), "the run stays in its folder"),
    "model.init": "the weights are the checkpoint's",
    "cold_start": "it is over",
}
"""Keys, or sections, for which a change comes too late, and why."""

NOTES = {
    "model.path": "the weights are the checkpoint's; the rest is read there",
    **dict.fromkeys(("eval", "data.eval"), "the score before the first step stays as it was"),
}
"""What is said beside a change that takes effect."""


def check_bound(saved: dict[str, Any], recipe: Recipe, checkpoint: Path, *, ahead: bool) -> None:
    """Raise UserError where ``recipe`` does not fit a checkpoint, the work of ``saved``, as data.

    ``ahead``: whether it has responses that were generated ahead.
    """
    reasons = dict.fromkeys(BOUND, f"with which {checkpoint} was written")
    if ahead:
        held = f"with which {checkpoint} has responses that were generated ahead"
        reasons |= dict.fromkeys(BOUND_AHEAD, f"{held} (rollout.async_steps)")
    for key, before, now in changed(saved, to_plain(recipe)):
        if key in reasons:
            raise UserError(f"{key}: expected {before}, {reasons[key]}, got {now}; set it back")


def going_on(saved: dict[str, Any], recipe: Recipe) -> Recipe:
    """``recipe`` with what is kept of ``saved``; says in a line each what is different."""
    ours = to_plain(recipe)
    for key, before, now in changed(saved, ours):
        section, _, name = key.rpartition(".")
        if why := KEPT.get(key, KEPT.get(section)):
            (ours[section] if section else ours)[name] = before
            logger.info("changed: %s: %s is kept, not %s (%s)", key, before, now, why)
        else:
            note = NOTES.get(key, NOTES.get(section))
            logger.info("changed: %s: %s -> %s%s", key, before, now, f" ({note})" if note else "")
    return recipe if ours == to_plain(recipe) else from_plain(ours)


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of what differs between two recipes as data."""
    sections = {key.rpartition(".")[0] for key in keys()}
    values = [(k, _value(before, k), _value(now, k)) for k in keys() if k not in sections]
    return [(key, old, new) for key, old, new in values if old != new]


def _value(plain: dict[str, Any], key: str) -> Any:
    """None in a section that is left out."""
    node: Any = plain
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
