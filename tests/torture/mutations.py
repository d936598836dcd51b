"""Recipes, command lines and ``config.json`` with wrong values: refused in a line, or meant so.

What a value means is decided here, apart from the package: YAML's numbers are decimal, and a text
is what was written. An acceptance is silent where the loaded value is another, or beyond what
computers hold, and where a value of a ``config.json`` is of another type than what it replaces.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sapo_megatron.__main__ import main
from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.recipe.load import keys, load, to_yaml
from tests.torture import Outcome

ROOT = Path(__file__).parents[2] / "recipes"
LONGEST_S, LONGEST_WAIT_S = 10, 600
"""Seconds of work, and of any time, after which a trial hangs; the slowest works half a second."""

NUMBERS = {
    "0": 0,
    "1": 1,
    "-1": -1,
    "-0": 0,
    "2147483648": 2**31,
    "1_000": 1000,
    "1" + "0" * 30: 10**30,
    "1.5": 1.5,
    ".5": 0.5,
    "5.": 5.0,
    "1e-6": 1e-6,
    "1E3": 1e3,
    "1e300": 1e300,
    "-1e300": -1e300,
    "1e-300": 1e-300,
    "1e999": math.inf,
    ".inf": math.inf,
    "-.inf": -math.inf,
    ".nan": math.nan,
}
OTHERS: dict[str, Any] = {
    "true": True,
    "no": False,
    "on": True,
    "~": None,
    "null": None,
    "": None,
    "[]": [],
    "{}": {},
    "[1, a]": [1, "a"],
    "{a: 1}": {"a": 1},
    "[[[]]]": [[[]]],
    "''": "",
    "' '": " ",
    "'1'": "1",
    "abc": "abc",
    "010": "010",
    "1:30": "1:30",
    "0x10": "0x10",
    "0b11": "0b11",
    "0o17": "0o17",
    "09": "09",
    "1:2:3.5": "1:2:3.5",
    "2024-01-01": "2024-01-01",
    "2001-12-14 21:59:43.10 -5": "2001-12-14 21:59:43.10 -5",
    "NaN": "NaN",
    "inf": "inf",
    "1e": "1e",
    "--1": "--1",
    "1,5": "1,5",
    "50%": "50%",
    "=": "=",
    "<<": "<<",
    "x" * 5000: "x" * 5000,
    "/" + "a" * 300: "/" + "a" * 300,
    "~no-such-user/x": "~no-such-user/x",
}
REFUSED = (
    "9" * 5000,
    '"\\0"',
    '"a\\x1bb"',
    '"\\ud800"',
    "!!int '010'",
    "!!python/name:os.system",
    "!!python/object/apply:os.system ['true']",
    "!!binary YQ==",
    "!!set {a}",
    "!!timestamp x",
    "{1: 2}",
    "{2024-01-01: x}",
    "{~: x}",
    "{true: x}",
    "{[a]: x}",
    "&a [*a]",
    "&a {b: *a}",
    "[" * 600,
    "[" * 600 + "]" * 600,
    "{a: " * 600,
)
"""Values that nothing may be."""
FILES = {
    "empty": "",
    "a list": "- 1",
    "a text": "abc",
    "two documents": "a: 1\n---\nb: 2\n",
    "a loop": "model: &a {path: *a}",
    "a loop of the whole": "&a {model: *a, data: *a}",
    "a billion laughs": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
    "merged laughs": "a0: &a0 {x0: 1, y0: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
    "nested": "a:" + "\n".join(" " * i + "a:" for i in range(1, 2000)),
    "a tab": "model:\n\tpath: x",
    "control characters": "model: {path: \x07}",
    "a date for a key": "2024-01-01: 1",
    "a number for a key": "1: {path: a}",
    "a list for a key": "? [a, b]\n: 1",
    "a key twice": "model: {path: a, path: b}",
    "null for a key": "~: 1",
    "true for a key": "on: 1",
    "an anchor that is not there": "a: *b",
    "a directive": "%YAML 3.0\n---\na: 1",
    "a tag": "!!omap [a: 1]",
    "base of a number": "base: 3",
    "base of nothing": "base: ''",
    "base of itself": "base: recipe.yaml",
    "base of a folder": "base: .",
    "base of a pipe": "base: pipe",
    "base of a device": "base: /dev/zero",
    "base of a loop of links": "base: loop.yaml",
    "base with NUL": 'base: "a\\0b"',
    "base of a long name": "base: " + "x" * 5000,
}
COMMANDS: list[list[str]] = [
    [],
    ["trian"],
    ["train"],
    ["train", ""],
    ["train", "none.yaml"],
    ["train", "."],
    ["train", "pipe"],
    ["train", "/dev/zero"],
    ["train", "loop.yaml"],
    ["train", "x" * 5000],
    ["train", "good.yaml", "--"],
    ["train", "good.yaml", "--=1"],
    ["train", "good.yaml", "=1"],
    ["train", "good.yaml", "."],
    ["train", "good.yaml", "..=1"],
    ["train", "good.yaml", "--tau_pos"],
    ["train", "good.yaml", "--tau_pos", "--tau_neg", "1"],
    ["train", "good.yaml", "model=1"],
    ["train", "good.yaml", "model.path.x=1"],
    ["train", "good.yaml", "data.train.tasks.0.name=x"],
    ["train", "good.yaml", "--model.path", "/nowhere"],
    ["train", "good.yaml", "--model.path", "pipe"],
    ["train", "good.yaml", "--model.path", "a/b/c"],
    ["train", "good.yaml", "x" * 3000 + "=1"],
    ["train", "good.yaml", "\ud83d=1"],
    ["train", "good.yaml", "--name", "\udcff"],
    ["plan", "none.yaml", "--json"],
    ["plan", "good.yaml", "--gpu", "abacus"],
    ["plan", "good.yaml", "--nodes", "0"],
    ["plan", "good.yaml", "--nodes", "1" + "0" * 30],
    ["plan", "good.yaml", "--architecture", "pipe"],
    ["plan", "good.yaml", "--architecture", "/dev/zero"],
    ["eval", "good.yaml"],
    ["eval", "good.yaml", "--checkpoint"],
    ["eval", "good.yaml", "--checkpoint", "x", "--out", "."],
    ["export", "good.yaml", "--checkpoint", "x", "--out", "."],
    ["report"],
    ["report", "none"],
    ["report", "pipe"],
    ["report", "x" * 5000],
    ["report", ".", "more"],
    ["gates", "none"],
    ["gates", ".", "--gate", "sapo:nan,1"],
    ["gates", ".", "--gate", "sapo:1e999,1"],
    ["gates", ".", "--gate", "x"],
    ["gates", ".", "--attenuation", "x"],
    ["gates", ".", "--attenuation", "nan"],
    ["doctor", "--host", "x"],
    ["qualify", "--section", "Z"],
]
CONFIG_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2.5, 1e300, -1e300, 10**30, 2**31, 2**63, "", "x", "4",
    [], [0], ["x"], [None], [[[]]], [10**30], {}, {"a": 1}, {"rope_type": 3}, math.nan, math.inf,
]  # fmt: skip
MAY_BE_OTHER = {"rope_scaling", "rope_parameters", "layer_types", "eos_token_id", "rope_theta"}
"""Keys that have values of several types."""


def trials(seed: int, folder: Path) -> Iterator[Outcome]:
    """Files, command lines, keys of ``config.json``, damaged recipes, and each key of a recipe."""
    os.mkfifo(folder / "pipe")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    good = folder / "good.yaml"
    good.write_text(
        "model: {path: m}\ndata: {train: {tasks: [{name: chain_sum}]}, template: 'a {prompt}'}\n"
    )
    rng = random.Random(seed)
    yield from _files(folder)
    yield from _commands(folder)
    yield from _configs(rng)
    yield from _damaged(rng, folder)
    yield from _values(good, rng, 24)


def _values(good: Path, rng: random.Random, number: int) -> Iterator[Outcome]:
    """So many of the values, for each key others."""
    meant = {**NUMBERS, **OTHERS}
    for key in keys():
        for text in rng.sample([*meant, *REFUSED], number):
            check = _meant(key, meant[text]) if text in meant else _never
            yield _tried(f"{key}={text[:60]}", lambda k=key, t=text: load(good, {k: t}), check)


def _meant(key: str, value: Any) -> Callable[[Any], str]:
    """What is wrong with a recipe in which ``key`` was to have this value; nothing where it has."""

    def check(recipe: Any) -> str:
        found: Any = recipe
        for part in key.split("."):
            found = getattr(found, part)
        if dataclasses.is_dataclass(found):
            return "" if isinstance(value, dict) else f"became a section: {found!r:.80}"
        plain = json.loads(json.dumps(found))
        numbers = isinstance(value, int | float) and not isinstance(value, bool)
        if numbers and not (math.isfinite(value) and abs(value) < 2**31):
            return f"became {found!r:.80}"
        if isinstance(plain, str) and isinstance(value, str) and value.strip():
            return "" if plain == value or plain.endswith("/" + value) else f"became {plain:.80}"
        same = plain == value and isinstance(plain, bool) == isinstance(value, bool)
        return "" if same else f"became {found!r:.80}"

    return check


def _never(_: Any) -> str:
    return "was accepted"


def _files(folder: Path) -> Iterator[Outcome]:
    path = folder / "recipe.yaml"
    for name, text in FILES.items():
        path.write_text(text)
        yield _tried(f"a recipe: {name}", lambda: load(path), _never)
    for name, content in {
        "latin": b"name: \xe9",
        "UTF-16": "model: {path: a}".encode("utf-16"),
        "NUL": b"model:\0",
        "binary": bytes(range(256)),
    }.items():
        path.write_bytes(content)
        yield _tried(f"a recipe: {name}", lambda: load(path), _never)


def _commands(folder: Path) -> Iterator[Outcome]:
    for words in COMMANDS:
        yield _tried(
            f"sapo-megatron {' '.join(words)[:80]!a}", lambda w=words: _run(folder, w), str
        )


def _run(folder: Path, words: list[str]) -> str:
    """What is wrong with how a command refuses; nothing where it does it in a line."""
    written = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(written):
        status = main(words)
    text = written.getvalue()
    one = text.startswith("error: ") and text.count("\n") == 1 and len(text) < 2000
    return "" if status == 2 and one else f"status {status}: {text[:200]!r}"


def _configs(rng: random.Random) -> Iterator[Outcome]:
    for file in sorted((*ROOT.glob("models/*/config.json"), ROOT / "tiny-moe" / "config.json")):
        config = json.loads(file.read_text())
        for key in config:
            for value in rng.sample(CONFIG_VALUES, 8):
                changed = config | {key: value}
                yield _tried(
                    f"{file.parent.name}: {key}: {value!r}",
                    lambda c=changed: parse_architecture(c, "config.json"),
                    lambda arch, k=key, v=value, c=config: _sane(arch, k, v, c[k]),
                )


def _sane(arch: Any, key: str, value: Any, before: Any) -> str:
    sizes = (arch.num_layers, arch.hidden_size, arch.vocab_size, arch.ffn_hidden_size)
    if max(sizes) > 2**24 or not 0 < arch.norm_eps < 1 or not 0 < arch.rope.theta < 1e30:
        return "absurd sizes were accepted"
    numbers = isinstance(before, int | float) and not isinstance(before, bool)
    if value is None or key in MAY_BE_OTHER or before is None:
        return ""
    if isinstance(before, float) and type(value) is int:
        return "" if abs(value) < 2**53 else "was accepted"
    if numbers and isinstance(value, float) and not math.isfinite(value):
        return "was accepted"
    return "" if type(value) is type(before) else f"was accepted in place of {before!r:.60}"


def _damaged(rng: random.Random, folder: Path) -> Iterator[Outcome]:
    """Recipes of the project with bytes and lines changed: refused, or what they say they are."""
    path = folder / "damaged.yaml"
    for _ in range(200):
        recipe = rng.choice(sorted(ROOT.glob("*.yaml")))
        text = re.sub(r"^base: ", f"base: {ROOT}/", recipe.read_text(), flags=re.MULTILINE)
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 3)):
            place, what = rng.randrange(len(data)), rng.randrange(4)
            if what == 0:
                data[place] = rng.randrange(256)
            elif what == 1:
                del data[place : place + rng.randint(1, 20)]
            elif what == 2:
                data[place:place] = rng.choice(
                    [b": ", b"\n", b"[", b"}", b"&a ", b"*a", b"\0", b"'"]
                )
            else:
                data[place:place] = data[place : place + 40]
        path.write_bytes(data)
        yield _tried(
            f"{recipe.name} as {bytes(data)[:60]!r}", lambda: load(path), _same_again(folder)
        )


def _same_again(folder: Path) -> Callable[[Any], str]:
    def check(recipe: Any) -> str:
        (folder / "again.yaml").write_text(to_yaml(recipe))
        return "" if load(folder / "again.yaml") == recipe else "is another when it is written"

    return check


def _tried(trial: str, act: Callable[[], Any], check: Callable[[Any], str]) -> Outcome:
    """What comes of it: refused in one line, or accepted and checked; all else is a problem."""

    def hang(*_: Any) -> None:
        raise TimeoutError("took too long")

    alarms = (
        (signal.ITIMER_PROF, signal.SIGPROF, LONGEST_S),
        (signal.ITIMER_REAL, signal.SIGALRM, LONGEST_WAIT_S),
    )
    for timer, number, seconds in alarms:
        signal.signal(number, hang)
        signal.setitimer(timer, seconds)
    try:
        problem = check(act())
    except UserError as error:
        message = str(error)
        problem = (
            "" if "\n" not in message and 0 < len(message) < 20_000 else f"said {message[:200]!r}"
        )
    except BaseException as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        for timer, number, _ in alarms:
            signal.setitimer(timer, 0)
            signal.signal(number, signal.SIG_DFL)
    return Outcome(trial=trial, problem=problem)
