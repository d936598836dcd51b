"""Answers, responses and rows of data: each worth what it is, or refused with its file and row.

After them come the cases of reward functions, :mod:`tests.torture.reward_cases`.
"""

import gzip
import importlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapo_megatron.data.datasets import read_problems
from sapo_megatron.errors import UserError, one_line
from sapo_megatron.recipe.schema import DataConfig, SourceConfig
from sapo_megatron.rollout.final_answer import unverifiable
from sapo_megatron.rollout.verifiers import math_verify, why_unverifiable
from sapo_megatron.sample import Prompt
from tests.support.math_answers import ANSWERS, UNVERIFIABLE
from tests.torture import Outcome

DEEP = "[" * 3000 + "]" * 3000
ROWS: dict[str, str] = {
    # a row of JSONL: the answer that it has, or nothing where it is refused
    '{"prompt": "p", "answer": 0.00001}': "0.00001",
    '{"prompt": "p", "answer": 1e16}': "10000000000000000",
    '{"prompt": "p", "answer": 34.0}': "34",
    '{"prompt": "p", "answer": -0.0}': "0",
    '{"prompt": "p", "answer": 12345678901234567890123}': "12345678901234567890123",
    '{"prompt": "p", "answer": "  34 "}': "  34 ",
    '{"prompt": "p", "answer": NaN}': "",
    '{"prompt": "p", "answer": Infinity}': "",
    '{"prompt": "p", "answer": 1e999}': "",
    '{"prompt": "p", "answer": null}': "",
    '{"prompt": "p", "answer": true}': "",
    '{"prompt": "p", "answer": ["34"]}': "",
    '{"prompt": "p", "answer": {"a": 1}}': "",
    '{"prompt": "p"}': "",
    '{"prompt": "", "answer": 1}': "",
    '{"prompt": 3, "answer": 1}': "",
    '{"prompt": "\\ud800", "answer": 1}': "",
    '{"prompt": "p", "answer": "\\udfff"}': "",
    '{"prompt": [{"role": "user", "content": "\\ud83d"}], "answer": 1}': "",
    '{"prompt": [{"role": "robot", "content": "p"}], "answer": 1}': "",
    '{"prompt": [], "answer": 1}': "",
    f'{{"prompt": "p", "answer": {"9" * 9000}}}': "",
    f'{{"prompt": "p", "answer": 1, "more": {"9" * 9000}}}': "",
    f'{{"prompt": "p", "answer": 1, "more": {DEEP}}}': "",
    f'{{"prompt": {DEEP}, "answer": 1}}': "",
    '{"a":' * 50_000: "",
    '{"prompt": "p", "answer": 1, "answer": 2}': "",
    '{"prompt": "p", "answer": 1': "",
    "[]": "",
    "[3]": "",
    "null": "",
    "p,1": "",
    "\x00": "",
}
FORMATS: dict[str, bytes] = {
    "a.jsonl.gz": gzip.compress(b'{"prompt": "p", "answer": 1}'),
    "b.jsonl": gzip.compress(b'{"prompt": "p", "answer": 1}'),
    "a.csv": b"prompt,answer\np,1\n",
    "a.tsv": b"prompt\tanswer\np\t1\n",
    "a.zip": b"PK\x03\x04",
    "a.arrow": b"ARROW1\0\0",
    "a.xlsx": b"PK\x03\x04",
    "c.jsonl": '{"prompt": "p", "answer": 1}'.encode("utf-16"),
    "d.jsonl": b"<html>not found</html>",
    "e.parquet": b"PAR1 and no more",
    "f.parquet": b"version https://git-lfs.github.com/spec/v1\n",
    "g.jsonl": b"",
    "h.jsonl": bytes(range(256)),
}


def trials(seed: int, folder: Path) -> Iterator[Outcome]:
    """Every answer of the table with its responses, rows, formats, and cuts of whole files."""
    yield from _responses()
    yield from _answers()
    yield from _rows(folder)
    yield from _cut(random.Random(seed), folder)
    (folder / "rewards").mkdir()
    yield from importlib.import_module("tests.torture.reward_cases").trials(
        seed, folder / "rewards"
    )


def _responses() -> Iterator[Outcome]:
    for shape, cases in ANSWERS.items():
        for answer, right, wrong in cases:
            prompt = Prompt(uid=0, text="", answer=answer, tokens=(1,))
            for worth, responses in ((1.0, right), (0.0, wrong)):
                for response in responses:
                    got = math_verify(prompt, response)
                    problem = "" if got == worth else f"expected {worth}, got {got}"
                    yield Outcome(trial=f"{shape}: {answer!r} and {response!r}", problem=problem)


def _answers() -> Iterator[Outcome]:
    for answer, reason in UNVERIFIABLE.items():
        got = unverifiable(answer)
        problem = "" if got == reason else f"expected {reason!r}, got {got!r}"
        yield Outcome(trial=f"the answer {answer!r:.80}", problem=problem)


def _rows(folder: Path) -> Iterator[Outcome]:
    path = folder / "rows.jsonl"
    for row, answer in ROWS.items():
        path.write_text(row)
        yield Outcome(trial=f"{row:.80}", problem=_problem(path, [answer] if answer else None))
    for name, content in FORMATS.items():
        (folder / name).write_bytes(content)
        yield Outcome(trial=name, problem=_problem(folder / name, None))
    os.mkfifo(folder / "pipe.jsonl")
    for other in (folder / "pipe.jsonl", Path("/dev/zero"), folder / "none", folder):
        yield Outcome(trial=str(other), problem=_problem(other, None))


def _cut(rng: random.Random, folder: Path) -> Iterator[Outcome]:
    """A JSON list that ends too early, and JSONL with bytes in the wrong place."""
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(20)]
    whole, path = json.dumps(rows).encode(), folder / "cut.json"
    for _ in range(20):
        end = rng.randrange(1, len(whole) - 1)
        path.write_bytes(whole[:end])
        yield Outcome(trial=f"a list cut at {end}", problem=_problem(path, None))


def _problem(path: Path, answers: list[str] | None) -> str:
    """What is wrong with what comes of a file that has these answers, or is to be refused."""
    data = DataConfig(train=SourceConfig(path=str(path)), apply_chat_template=True)
    try:
        got: Any = [
            problem.answer
            for problem in read_problems(data, "data.train", why_unverifiable("exact_match"))
        ]
    except UserError as error:
        message = str(error)
        if answers is not None or "\n" in message or len(message) > 800 or str(path) not in message:
            return f"said {message[:200]!r}"
        return ""
    except BaseException as error:
        return one_line(f"{type(error).__name__}: {error}", 200)
    return "" if got == answers else f"expected {answers}, got {got}"
