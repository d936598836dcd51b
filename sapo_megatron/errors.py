"""What a user sees when something is wrong: kinds of errors, and how they are put into words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reward workers start without it
    from pydantic import ValidationError


EXTRAS = {
    "report": "PIL jinja2 matplotlib numpy pyarrow",
    "rewards": "math_verify reasoning_gym",
    "rollout": "httpx",
    "train": "einops huggingface_hub megatron numpy psutil pyarrow safetensors sentencepiece "
    "tensorboard transformers",
    "wandb": "wandb",
}
"""Modules that the extras of ``pyproject.toml`` bring."""


class UserError(ValueError):
    """The user's input is wrong: what, expected, got, how to fix it; exit status 2."""


class RunFailed(RuntimeError):
    """The work itself failed (a diverged run, a plan that does not fit); exit status 1."""


def not_installed(error: ModuleNotFoundError) -> UserError | None:
    """What to install where a module of :data:`EXTRAS` is missing; None: it is none of them."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules.split():
            return UserError(
                f"{module}: expected it to be installed, got no such module; "
                f"pip install 'sapo-megatron[{extra}]'"
            )
    return None


def one_line(message: object, longest: int | None = None) -> str:
    """A text or an error's message without line breaks, of at most ``longest`` characters.

    Of an error without a message it is the name of its type.
    """
    line = " ".join(str(message).split())
    if not line and isinstance(message, BaseException):
        line = type(message).__name__
    return line if longest is None or len(line) <= longest else f"{line[: longest - 4]} ..."


def with_type(error: BaseException, longest: int | None = None) -> str:
    """The type of an error and its message, as by ``one_line``: ``KeyError: 'weight'``."""
    parts = (type(error).__name__, str(error).strip())
    return one_line(": ".join(filter(None, parts)), longest)


def first_problem(error: ValidationError) -> str:
    """What pydantic finds wrong first: ``key: Input should be a valid integer, got 'x'``."""
    problem = error.errors(include_url=False)[0]
    value, parts = problem["input"], [".".join(map(str, problem["loc"])), problem["msg"]]
    found = ": ".join(filter(None, parts))
    if problem["type"] == "missing":
        return found
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return f"{found}, got {one_line(text, 80)}"


def nearest(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The one of ``names`` that is most like ``word``; None where none is as much as ``cutoff``."""
    return next(iter(difflib.get_close_matches(word[:200], list(names), n=1, cutoff=cutoff)), None)


def hint(word: str, names: Iterable[str]) -> str:
    """``; the nearest is NAME``; nothing where none is near."""
    near = nearest(word, names)
    return f"; the nearest is {near}" if near else ""
