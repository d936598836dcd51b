"""The reward functions, and the worker process that calls them for :mod:`.reward`.

A reward function is called as ``function(prompt, response)`` and returns a finite number. The
worker is started as ``python -m sapo_megatron.rollout.verifiers FD FUNCTION TIMEOUT`` and talks
over the inherited socket FD; it imports neither torch nor Megatron, so that it starts fast.
"""

import faulthandler
import functools
import importlib
import json
import logging
import math
import numbers
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from sapo_megatron.errors import nearest, with_type
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
    for found in candidates(response):
        if found.final or says_something(found.text) or squeezed(found.text) == squeezed(right):
            return float(found.text != "" and _same(right, found.text))
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


def find_function(name: str) -> RewardFunction:
    """The built-in function, or ``module:function``. Raises ValueError when there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"cannot import {module_name!r}: {with_type(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = nearest(part, dir(found), cutoff=0.6)
            hint = f"; the nearest is {near}" if near else ""
            raise ValueError(f"{module_name!r} has no {path!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"expected a function, got {type(found).__name__}")
    return found


def judge(function: RewardFunction, prompt: Prompt, response: str) -> tuple[float, str]:
    """(reward, ""), or (0.0, the problem) where the function raises or gives no finite number."""
    try:
        reward: Any = function(prompt, response)
    except BaseException as error:  # also sys.exit() and math-verify's own TimeoutException
        return 0.0, with_type(error)
    if not isinstance(reward, numbers.Real):
        return 0.0, f"expected a number, got {type(reward).__name__}"
    if not math.isfinite(reward):
        return 0.0, f"expected a finite number, got {reward}"
    return float(reward), ""


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


def _serve(connection: Connection, function: RewardFunction, timeout_s: float) -> None:
    """Answer requests (prompt, responses) with a ``judge`` result per response until the end."""
    with open(os.devnull, "w") as nowhere:
        while True:
            prompt, responses = connection.recv()
            # Ends this process should it hang after its parent, which keeps the time, is gone.
            limit = 60.0 + 2.0 * timeout_s * len(responses)
            faulthandler.dump_traceback_later(limit, exit=True, file=nowhere)
            for response in responses:
                connection.send(judge(function, prompt, response))
            faulthandler.cancel_dump_traceback_later()


def _main(fd: str, name: str, timeout_s: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we keep the time
    connection = Connection(int(fd))
    try:
        function = find_function(name)
        if name == "reasoning_gym":
            importlib.import_module("reasoning_gym")
        elif name == "math_verify":
            importlib.import_module("math_verify")
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send("")
    try:
        _serve(connection, function, float(timeout_s))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    _main(*sys.argv[1:])
