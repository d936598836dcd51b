"""Which settings do not go together, as a table; all others do (docs/rollout.md)."""

from operator import attrgetter
from typing import Any, NamedTuple

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import Recipe


class Needs(NamedTuple):
    """What one key's value asks of another key."""

    given: str
    value: Any
    key: str
    allowed: tuple[Any, ...]
    why: str


RULES = (
    Needs("rollout.colocate", True, "rollout.engine", ("vllm",), "whose GPUs servers share"),
    Needs(
        *("rollout.on_new_weights", "continue", "rollout.engine", ("vllm",)),
        "which finds servers in the middle of responses",
    ),
    Needs(
        *("rollout.on_new_weights", "continue", "routing.router_replay", ("disabled", "R2")),
        "since a response that is interrupted comes without its experts",
    ),
    Needs(
        *("rollout.vllm_python", None, "rollout.num_servers", (None,)),
        "the Python of servers to start",
    ),
    Needs(
        *("rollout.colocate", False, "rollout.colocate_offload", ("gradients",)),
        "whose servers have GPUs of their own",
    ),
    Needs(
        *("rollout.colocate", True, "rollout.async_steps", (0,)),
        "whose servers sleep while the model trains",
    ),
    Needs(
        *("algorithm.old_policy", "rollout", "routing.router_replay", ("disabled", "R3")),
        "which saves the forward pass that R2 has its experts from",
    ),
    Needs(
        *("algorithm.old_policy", "rollout", "correction.rollout_is", ("disabled",)),
        "whose ratio has in it what this corrects",
    ),
    Needs(
        *("algorithm.old_policy", "rollout", "correction.sequence_mask_kl", (None,)),
        "whose ratio has in it what this corrects",
    ),
    Needs(
        *("algorithm.loss_type", "vespo", "correction.rollout_is", ("disabled",)),
        "whose weight of a sequence a factor of single tokens would undo",
    ),
    Needs(
        *("algorithm.old_policy", "rollout", "rollout.top_p", (1.0,)),
        "whose log-probs are those before top-p",
    ),
)


def check_together(recipe: Recipe) -> None:
    """Raises UserError for the first rule that is broken."""
    for given, value, key, allowed, why in RULES:
        got = attrgetter(key)(recipe)
        if attrgetter(given)(recipe) == value and got not in allowed:
            raise UserError(
                f"{key}: expected {' or '.join(map(_text, allowed))} with {given} {_text(value)}, "
                f"{why}, got {_text(got)}; change one of the two"
            )


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
