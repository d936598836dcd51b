"""The tokens that end a response, and the one that ends a turn of the chat template."""

import logging
from dataclasses import dataclass
from pathlib import Path

from sapo_megatron.data.tokenizer import Tokenizer
from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.hf.folder import end_tokens
from sapo_megatron.recipe.schema import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Endings:
    """How a response ends."""

    stop_ids: tuple[int, ...]
    """Each of them ends a response; ascending."""
    turn_id: int
    """The one that an answer to learn from ends with."""


def find_endings(recipe: Recipe, model: Path, arch: Architecture, tokenizer: Tokenizer) -> Endings:
    """What the tokenizer, the model's folder and the recipe say, all together.

    ``turn_id`` is what the chat template ends an answer with where it is in use, else eos. Where
    it writes no token of its own after an answer, or refuses answers, nothing is checked, and the
    log says so. Raises UserError for ids that the model does not have, and where the token that
    ends a turn would not end a response.
    """
    for token in recipe.rollout.stop_token_ids:
        if token >= arch.vocab_size:
            raise UserError(
                f"rollout.stop_token_ids: expected ids below the model's vocab_size "
                f"{arch.vocab_size}, got {token}; correct it"
            )
    stops = {tokenizer.eos_id, *end_tokens(model, arch), *recipe.rollout.stop_token_ids}
    ends = tokenizer.turn_ends() if recipe.data.apply_chat_template else {}
    if recipe.data.apply_chat_template and not ends:
        logger.info("the chat template writes no token after an answer: how turns end is unchecked")
    known = [token for token in ends if token in stops]
    if ends and not known:
        token, text = next(iter(ends.items()))
        raise UserError(
            f"rollout.stop_token_ids: expected the token {text} (id {token}) in it, with which the "
            f"chat template ends a turn, since {model} and the tokenizer name only "
            f"{sorted(stops)}; set rollout.stop_token_ids=[{token}]"
        )
    return Endings(stop_ids=tuple(sorted(stops)), turn_id=known[0] if known else tokenizer.eos_id)
