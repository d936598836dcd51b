"""The reward functions: called as ``function(prompt, response)``, they return a finite number."""

import functools
import json
from collections.abc import Callable
from typing import Any

from sapo_megatron.rollout.final_answer import (
    bare,
    candidates,
    choice,
    given_answer,
    last_choice,
    number_in_full,
    outside_thinking,
    says_something,
    squeezed,
    unverifiable,
)
from sapo_megatron.sample import Prompt

RewardFunction = Callable[[Prompt, str], float]


def exact_match(prompt: Prompt, response: str) -> float:
    """1 where the response is the answer, white space around it aside; else 0."""
    return float(response.strip() == _answer(prompt))


def math_verify(prompt: Prompt, response: str) -> float:
    """1 where the response's answer equals the right one, as choice, text or mathematics; else 0.

    The answer is what stands last outside the thinking: in a box, in ``<answer>``, after "Answer:"
    or its likes; where there is none of these, the last expression. Raises ValueError when the
    right answer cannot be compared with anything.
    """
    import math_verify as library

    right = _given(_answer(prompt))
    response = f"<think>{response}" if prompt.thinking else response
    for found, final in candidates(response):
        if final or says_something(found) or squeezed(found) == squeezed(right):
            return float(found != "" and _same(right, found))
    said = bare(outside_thinking(response))
    if squeezed(right) == squeezed(said) or choice(right)[0] == last_choice(said) != "":
        return 1.0
    target = library.parse(said, parsing_timeout=None)
    return float(library.verify(_parsed(right), target, timeout_seconds=None))


def reasoning_gym(prompt: Prompt, response: str) -> float:
    """The task's own score in [0, 1]: of the last ``<answer>``, or else of the whole response.

    Most tasks give part of the score to a response that merely contains the answer. Some call
    ``eval`` on the response (binary_matrix, n_queens, spiral_matrix, string_insertion).
    """
    from reasoning_gym.utils import extract_answer

    answer = extract_answer(response)
    dataset = _dataset(prompt.task, json.dumps(prompt.entry["options"], sort_keys=True))
    return dataset.score_answer(response.strip() if answer is None else answer, prompt.entry)


BUILT_IN: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
}


def why_unverifiable(name: str) -> Callable[[str], str]:
    """What says why an answer is of no use to a reward function, and nothing of one that is."""
    if name == "math_verify":
        return unverifiable
    return lambda answer: "empty" if name == "exact_match" and not answer.strip() else ""


@functools.lru_cache(maxsize=64)
def _dataset(task: str, options: str) -> Any:
    import reasoning_gym as library

    return library.create_dataset(task, seed=0, **json.loads(options))


@functools.lru_cache(maxsize=4096)
def _given(answer: str) -> str:
    if reason := unverifiable(answer):
        raise ValueError(f"no response can be compared with the answer {answer!r}: {reason}")
    return given_answer(answer)


def _same(right: str, got: str) -> bool:
    """Whether two answers are the same: choices by letter, others as texts or as mathematics."""
    import math_verify as library

    got = number_in_full(bare(got))
    if squeezed(right).casefold() == squeezed(got).casefold() and "\\" not in squeezed(got):
        return True
    (letter, value), (other, given) = choice(right), choice(got)
    if letter and other:
        return letter == other
    if letter or other:
        right, got = value if letter else right, given if other else got
    texts = squeezed(right), squeezed(got)
    if not all(texts) or texts[0] == texts[1]:
        return all(texts)
    return library.verify(_parsed(right), _parsed(got), timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _parsed(answer: str) -> list:
    """An answer as mathematics; empty where it is none."""
    import math_verify as library

    marked = any(mark in answer for mark in ("$", "\\(", "\\[", "\\boxed"))
    return library.parse(answer if marked else f"${answer}$", parsing_timeout=None)


def _answer(prompt: Prompt) -> str:
    if not prompt.answer:
        raise ValueError(
            f"{prompt.task} gives no answer to compare with; use reward.function: reasoning_gym"
        )
    return prompt.answer.strip()
