"""Reward functions as users write them, right and wrong: each has its number or one line.

A case is the text of a module with a ``reward``, and what the response ``RESPONSE`` to ``PROMPT``
gets: a number, a part of the line that says why there is none, or of the one that refuses it.
"""

import contextlib
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import RewardConfig
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.sample import Group, Prompt, Sample
from tests.support.scoring import score
from tests.torture import Outcome

RESPONSE = "so it is 34"
ROW = {
    "data_source": "openai/gsm8k",
    "question": "30 + 4",
    "reward_model": {"style": "rule", "ground_truth": "34"},
    "extra_info": {"index": 7, "split": "train"},
    "level": 5,
    "class": "sums",
}
PROMPT = Prompt(uid=7, text="30 + 4", answer="34", tokens=(1, 2), task="sums", entry=ROW)

OURS = "def reward(prompt, response):\n    return "
NUMBERS = {
    "int": ("3", 3),
    "bool": ("response.endswith(prompt.answer)", 1),
    "text": ("'0.25'", 0.25),
    "int of 60 digits": ("10 ** 60", 1e60),
    "negative zero": ("-0.0", 0),
    "Decimal": ("__import__('decimal').Decimal('0.25')", 0.25),
    "Fraction": ("__import__('fractions').Fraction(1, 4)", 0.25),
    "numpy bool": ("__import__('numpy').bool_(True)", 1),
    "numpy half": ("__import__('numpy').float16(0.25)", 0.25),
    "numpy int": ("__import__('numpy').int64(-2)", -2),
    "0-d array": ("__import__('numpy').array(0.25)", 0.25),
    "torch scalar": ("__import__('torch').tensor(0.25)", 0.25),
    "torch bfloat16": ("__import__('torch').tensor([0.25]).bfloat16()", 0.25),
    "torch with gradient": ("__import__('torch').ones((), requires_grad=True)", 1),
    "dictionary": ("{'score': 0.25, 'acc': True, 'pred': response}", 0.25),
    "dictionary of numpy": ("{'score': __import__('numpy').float32(0.25)}", 0.25),
    "list": ("[0.25]", 0.25),
    "None": ("None", "got NoneType"),
    "words": ("'correct'", "got str"),
    "empty text": ("''", "got str"),
    "two numbers": ("[0.25, 1.0]", "got list"),
    "pair": ("(0.25, 'why')", "got tuple"),
    "array": ("__import__('numpy').zeros(3)", "got ndarray"),
    "torch of two": ("__import__('torch').zeros(2)", "got Tensor"),
    "torch on meta": ("__import__('torch').zeros((), device='meta')", "got Tensor"),
    "dictionary without score": ("{'reward': 1.0}", "got dict"),
    "score that is none": ("{'score': None}", "got dict"),
    "complex": ("1 + 0j", "got complex"),
    "function": ("reward", "got function"),
    "generator": ("(x for x in [1.0])", "got generator"),
    "NaN": ("float('nan')", "expected a finite number, got nan"),
    "infinity": ("float('-inf')", "expected a finite number, got -inf"),
    "text of NaN": ("'nan'", "expected a finite number, got nan"),
    "int of 400 digits": ("10 ** 400", "expected a finite number, got inf"),
    "huge Decimal": ("__import__('decimal').Decimal('1e999')", "expected a finite number, got inf"),
    "numpy NaN": ("__import__('numpy').float32('nan')", "expected a finite number"),
}
VERL = "def reward(data_source, solution_str, ground_truth, extra_info=None"
SIGNATURES = {
    "verl": (f"{VERL}):\n    return float(ground_truth in solution_str)", 1),
    "verl with more": (f"{VERL}, **kwargs):\n    return len(kwargs)", 0),
    "verl with a dictionary": (f"{VERL}):\n    return {{'score': extra_info['index']}}", 7),
    "verl by source": (f"{VERL}):\n    return data_source == 'openai/gsm8k'", 1),
    "verl without the rest": (
        "def reward(solution_str, ground_truth, method='strict', score=0.5):\n    return score",
        0.5,
    ),
    "verl, awaited": (f"async {VERL}):\n    return {{'score': 0.25}}", 0.25),
    "TRL": (
        "def reward(completions, **kwargs):\n    return [float('34' in c) for c in completions]",
        1,
    ),
    "TRL with prompts": (
        "def reward(prompts, completions, level):\n"
        "    return [l * len(p) for p, l in zip(prompts, level)]",
        30,
    ),
    "TRL with the answer": (
        "def reward(completions, answer, **kw):\n"
        "    return [float(a in c) for a, c in zip(answer, completions)]",
        1,
    ),
    "TRL that does not apply": ("def reward(completions, **kw):\n    return [None]", "got list"),
    "TRL that wants ids": (
        "def reward(completions, completion_ids):\n    return [1.0]",
        "missing 1 required positional argument: 'completion_ids'",
    ),
    "keyword for more": ("def reward(prompt, response, *, scale=2):\n    return scale", 2),
    "any arguments": ("def reward(*args):\n    return len(args)", 2),
    "partial": (
        "import functools\nreward = functools.partial(lambda k, p, r: k, 0.25)",
        0.25,
    ),
    "object": ("class R:\n    def __call__(self, p, r): return 0.25\nreward = R()", 0.25),
    "in C": ("from operator import eq as reward", 0),
    "coroutine": ("async def reward(prompt, response):\n    return 0.25", 0.25),
    "coroutine that sleeps": (
        "import asyncio\nasync def reward(p, r):\n    await asyncio.sleep(0)\n    return 0.25",
        0.25,
    ),
    "coroutine that fails": (
        "async def reward(p, r):\n    raise OSError('no judge')",
        "OSError: no judge",
    ),
    "its own loop": (
        "import asyncio\nasync def f(): return 0.25\ndef reward(p, r): return asyncio.run(f())",
        0.25,
    ),
    "slime": ("async def reward(args, sample, **kw):\n    return sample.reward", "AttributeError"),
}
FAILURES = {
    "raises": ("raise KeyError('answer')", "KeyError: 'answer'"),
    "long error": ("raise ValueError('x' * 10 ** 7)", "ValueError: xxxx"),
    "many lines": ("raise ValueError('one\\n\\ttwo\\r\\nthree')", "one two three"),
    "half a character": ("raise ValueError('\\ud800 \\x1b[2J')", "ValueError: ? ?[2J"),
    "group of errors": (
        "raise ExceptionGroup('many', [ValueError('one')])",
        "ExceptionGroup: many",
    ),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "leaves": ("raise SystemExit(0)", "SystemExit"),
    "recursion": ("return reward(prompt, response)", "RecursionError"),
    "ends": ("import os; os._exit(0)", "the process ended: exit status 0"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "the process ended: exit status 137"),
    "segmentation fault": (
        "import ctypes; return ctypes.string_at(0)",
        "the process ended: exit status 139",
    ),
    "no memory": ("return len('x' * 10 ** 15)", "MemoryError"),
    "closes everything": ("import os; os.closerange(3, 99)", "the process ended"),
    "forks": ("import os; os.fork(); return 0.25", 0.25),
    "threads": (
        "import threading as t; t.Thread(target=t.Event().wait, daemon=True).start(); return 0.25",
        0.25,
    ),
    "loops": ("while True: pass", "took longer than reward.timeout_s"),
    "ignores all": (
        "import signal, time\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    while True:\n"
        "        try: time.sleep(9)\n        except BaseException: pass",
        "took longer than reward.timeout_s",
    ),
    "regular expression": (
        "import re; return bool(re.match('(a+)+$', 'a' * 40 + 'b'))",
        "took longer than reward.timeout_s",
    ),
}
MODULES = {
    "no function": ("rewards = 1", "no 'reward'; the nearest is rewards"),
    "no callable": ("reward = 3", "expected a function, got int"),
    "not Python": ("def reward(:", "SyntaxError"),
    "NUL": ("reward = '\0'", "cannot import"),
    "raises": ("raise OSError('no such file: rubric.txt')", "OSError: no such file: rubric.txt"),
    "ends": ("import sys; sys.exit(3)", "cannot import"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "ended: exit status 137"),
    "forks": ("import os; os.fork()\ndef reward(p, r): return 1", "forks when it is imported"),
    "pool": (
        "import multiprocessing as m; pool = m.get_context('fork').Pool(2)\n"
        "def reward(p, r): return 1",
        "forks when it is imported",
    ),
    "four arguments": ("def reward(a, b, c, d): return 1", "got (a, b, c, d)"),
    "none": ("def reward(): return 1", "got ()"),
    "verl in batches": (
        "def reward(data_sources, solution_strs, ground_truths, extra_infos): return [1.0]",
        "expected function(prompt, response)",
    ),
    "too large": ("x = bytearray(10 ** 15)", "MemoryError"),
}
CHILDREN = {
    "child": "subprocess.Popen(['sleep', '1000'])",
    "child in its own session": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "grandchild": "subprocess.Popen(['sh', '-c', 'sleep 1000 & wait'])",
    "orphan": "subprocess.run(['sh', '-c', 'setsid sleep 1000 >/dev/null 2>&1 &'])",
    "fork that stays": "os.fork() or time.sleep(1000)",
}


def trials(seed: int, folder: Path) -> Iterator[Outcome]:
    """Every case, in an order of the seed; no process may be left behind by any."""
    cases: list[tuple[str, str, float | str]] = []
    cases += [(f"number, {n}", OURS + text, want) for n, (text, want) in NUMBERS.items()]
    cases += [(f"signature, {n}", text, want) for n, (text, want) in SIGNATURES.items()]
    body = OURS.removesuffix("return ")
    cases += [(f"failure, {n}", body + text, want) for n, (text, want) in FAILURES.items()]
    cases += [(f"module, {n}", text, want) for n, (text, want) in MODULES.items()]
    for name, text in CHILDREN.items():
        for end, value in (("returns", 1.0), ("ends", "the process ended")):
            how = "return 1.0" if value == 1.0 else "os._exit(3)"
            source = f"import os, subprocess, time\n{body}{text}; {how}"
            cases.append((f"children, {name}, {end}", source, value))
    random.Random(seed).shuffle(cases)
    sys.path.insert(0, str(folder))
    try:
        for number, (name, source, expected) in enumerate(cases):
            module = f"reward_case_{seed}_{number}"
            (folder / f"{module}.py").write_text(source, errors="surrogatepass")
            yield Outcome(trial=f"reward: {name}", problem=_tried(f"{module}:reward", expected))
    finally:
        sys.path.remove(str(folder))


def _tried(function: str, expected: float | str) -> str:
    sample = Sample(
        uid=0, prompt_tokens=(1,), response_tokens=[2], rollout_logprobs=[0.0], truncated=False
    )
    sample.text = RESPONSE
    limit = 1.0 if "longer" in str(expected) else 60.0
    mark = f"REWARD_CASE={function}"
    with _environment(mark):
        try:
            with Scorer(RewardConfig(function=function, timeout_s=limit)) as scorer:
                score(scorer, [Group(prompt=PROMPT, samples=[sample])])
            found: float | str = sample.reward if sample.scored else sample.problem
        except UserError as error:
            found = str(error)
    left = _bearing(mark)
    if left:
        return f"left {len(left)} processes behind"
    if isinstance(found, str) and ("\n" in found or len(found) > 500):
        return f"expected a short line, got {found[:600]!r}"
    fits = expected in found if isinstance(found, str) and isinstance(expected, str) else False
    return "" if fits or found == expected else f"expected {expected!r}, got {found!r}"


@contextlib.contextmanager
def _environment(mark: str) -> Iterator[None]:
    """What is started in the block has the mark in its environment."""
    name, value = mark.split("=")
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _bearing(mark: str) -> list[int]:
    """The processes with the mark; what was killed may take a moment to be gone."""
    end = time.monotonic() + 5.0
    while True:
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in place.read_bytes().split(b"\0"):
                    found.append(int(place.parent.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)
