"""Published data -> problems: JSON and parquet files, of this machine or of the Hugging Face hub.

Files are read row by row; of rows with the same prompt and answer only the first is kept, so that
a set that was published with its epochs written out takes the memory of one.
"""

import glob
import logging
import math
import re
import reprlib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from sapo_megatron.data.rows import SUFFIXES, Row, read_rows
from sapo_megatron.data.tokenizer import Message
from sapo_megatron.errors import UserError, one_line
from sapo_megatron.recipe.schema import DataConfig, SourceConfig

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
COLUMNS = (
    ("prompt", "reward_model.ground_truth"),
    ("prompt", "label"),
    ("prompt", "answer"),
    ("problem", "answer"),
    ("Problem", "Answer"),
    ("question", "answer"),
)
"""(prompt_key, answer_key) of sets that people train and evaluate on."""
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev)(?![a-z])")


class Problem(NamedTuple):
    """A problem before it is tokenized."""

    text: str
    """What is asked: the prompt, or the last turn of a conversation."""
    answer: str
    """Empty where a reasoning-gym task has no single right answer; its scorer knows."""
    task: str
    entry: dict[str, Any]
    """A row of the file; or reasoning-gym's item, with the task's ``options`` added."""
    messages: tuple[Message, ...] = ()
    """The conversation that the prompt is; empty where it is a text."""
    at: str = ""
    """Where it stands, for messages."""


Unverifiable = Callable[[str], str]
"""Why no response can be compared with an answer; nothing where one can."""


def read_problems(
    data: DataConfig, where: str, unverifiable: Unverifiable | None = None
) -> list[Problem]:
    """The problems of ``data.train.path``, each once, in the order of the files.

    ``where`` names the source in messages; ``data.on_unverifiable`` says what becomes of problems
    with answers that are ``unverifiable``. Raises UserError for files that are missing, malformed
    or hold something else.
    """
    source = data.train
    assert source.path is not None
    task = re.sub(r"\.(parquet|jsonl?)$", "", source.path.rsplit("/", 1)[-1])
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()
    useless: dict[str, list[str]] = {}
    read = 0
    files = find_files(source.path, where)
    for file in files:
        try:
            for row in read_rows(file, _keys(source)):
                read += 1
                prompt, given = (_field(row, key, where) for key in _keys(source))
                answer = _answer(given, f"{row.at}: {source.answer_key}")
                identity = repr(prompt), answer
                if identity in seen:
                    continue
                seen.add(identity)
                if unverifiable and (reason := unverifiable(answer)):
                    useless.setdefault(reason, []).append(row.at)
                else:
                    problems.append(_problem(prompt, answer, row, data, where, task))
        except (OSError, pa.ArrowException) as error:  # pyarrow raises either for a broken file
            raise UserError(f"{where}.path: cannot read {file}: {one_line(error)}") from None
    if useless:
        _answer_for(useless, len(seen), data, where)
    if not problems:
        raise UserError(
            f"{where}.path: expected rows with {source.prompt_key} and {source.answer_key}, got "
            f"{'none to use in' if read else 'an empty file:'} {', '.join(map(str, files))}"
        )
    if read > len(seen):
        logger.info(
            "%s: %d problems; %d of the %d rows in %s repeat an earlier prompt and answer and are "
            "left out",
            where,
            len(seen),
            read - len(seen),
            read,
            source.path,
        )
    return problems


def _answer_for(useless: dict[str, list[str]], total: int, data: DataConfig, where: str) -> None:
    """Refuse what cannot be verified, or say that it is left out: how many for each reason."""
    reasons = ", ".join(f"{len(at)} {why} (first {at[0]})" for why, at in useless.items())
    told = f"{sum(map(len, useless.values()))} of {total} that reward.function cannot: {reasons}"
    if data.on_unverifiable == "drop":
        logger.warning("%s: left out of the answers to compare with: %s", where, told)
        return
    raise UserError(
        f"{where}.path: expected answers to compare responses with, got {told}; correct them, or "
        f"set data.on_unverifiable=drop to leave them out"
    )


def find_files(path: str, where: str) -> list[Path]:
    """The files that a source's ``path`` means, sorted; downloads a dataset of the hub.

    An absolute path is a file, a folder or a pattern of this machine; any other is ``owner/name``
    of a dataset, with a file, a folder or a pattern inside it after another slash. Raises
    UserError where there are none, or where a folder holds several splits.
    """
    place = Path(path) if Path(path).is_absolute() else _download(path.rstrip("/"), where)
    if place.is_dir():
        found = sorted(f for f in place.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        _check_splits(path, [str(f.relative_to(place)) for f in found], where)
    else:
        found = [place] if place.exists() else sorted(map(Path, glob.glob(str(place))))
    if found:
        return found
    if place.is_dir():
        others = ", ".join(sorted(f.name for f in place.iterdir() if f.is_file())) or "no file"
        raise UserError(
            f"{where}.path: expected {' or '.join(SUFFIXES)} files in {place}, got none "
            f"({one_line(others, 80)}); name a file, or a folder that has some"
        )
    raise UserError(f"{where}.path: no such file: {place}; correct the path")


def _download(path: str, where: str) -> Path:
    """The place in the local copy of a dataset that ``path`` means, downloaded if it is not there.

    Locks of the hub's library let many processes ask at once.
    """
    from huggingface_hub import constants, snapshot_download  # half a second to import
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    owner, name, *inside = path.split("/")
    name = f"{owner}/{name}"
    patterns = ["/".join([*inside, f"*{suffix}"]) for suffix in SUFFIXES]
    if inside:
        patterns.append("/".join(inside))
    try:
        copy = snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
        return Path(copy, *inside)
    except RepositoryNotFoundError:
        reason = "the hub has no such dataset, or you may not read it; correct it or log in"
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        reason = f"there is no copy in {constants.HF_HUB_CACHE}, and {offline}"
    except (OSError, ValueError) as error:
        reason = one_line(error, 200)
    raise UserError(
        f"{where}.path: expected a file or folder beside the recipe, or a dataset of the Hugging "
        f"Face hub, got {path}: {reason}; correct it, or make a copy where the hub can be reached: "
        f"hf download {name} --repo-type dataset"
    )


def _check_splits(path: str, names: list[str], where: str) -> None:
    """One file for each split that the names tell of; more than one split is a mistake."""
    by_split = {found[1]: name for name in names if (found := _SPLIT.search(name.lower()))}
    if len(by_split) > 1:
        example = re.sub(r"-\d+-of-\d+", "-*", next(iter(by_split.values())))
        raise UserError(
            f"{where}.path: expected the files of one split, got {', '.join(sorted(by_split))} in "
            f"{path}; name a file, a folder or a pattern in it, e.g. {path}/{example}"
        )


def _keys(source: SourceConfig) -> tuple[str, str]:
    return source.prompt_key, source.answer_key


def _field(row: Row, key: str, where: str) -> Any:
    try:
        return _pick(row.fields, key)
    except KeyError:
        whole = row.whole()
    usual = next((keys for keys in COLUMNS if all(_has(whole, key) for key in keys)), None)
    fix = (
        f"set {where}.prompt_key={usual[0]} and {where}.answer_key={usual[1]}"
        if usual
        else "set prompt_key and answer_key to the file's names"
    )
    raise UserError(
        f"{row.at}: expected the key {key!r}, got {', '.join(map(repr, whole)) or 'none'}; {fix}"
    )


def _pick(fields: dict[str, Any], key: str) -> Any:
    """The value of ``key``, or, where it is dotted, inside nested objects. Raises KeyError."""
    if key in fields:
        return fields[key]
    value: Any = fields
    for part in key.split("."):
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[part]
    return value


def _has(fields: dict[str, Any], key: str) -> bool:
    try:
        _pick(fields, key)
    except KeyError:
        return False
    return True


def _answer(given: Any, at: str) -> str:
    """An answer as a text; numbers keep their value, and whole ones have no point."""
    if isinstance(given, str):
        return _encodable(given, at)
    number = isinstance(given, int | float | Decimal) and not isinstance(given, bool)
    if not (number and math.isfinite(given)):
        raise UserError(f"{at}: expected a text or a number, got {reprlib.repr(given)}")
    text = f"{Decimal(repr(given) if isinstance(given, float) else given):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _encodable(text: str, at: str) -> str:
    """``text``, if UTF-8 has all of it, as tokenizers want. Raises UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{at}: expected Unicode, got half of a surrogate pair as character {error.start + 1}"
        ) from None
    return text


def _problem(
    prompt: Any, answer: str, row: Row, data: DataConfig, where: str, task: str
) -> Problem:
    at, source = row.at, data.train
    if isinstance(prompt, str) and prompt:
        text = _encodable(prompt, f"{at}: {source.prompt_key}")
        return Problem(text, answer, task, row.whole(), at=at)
    if not (isinstance(prompt, list) and prompt):
        raise UserError(
            f"{at}: {source.prompt_key}: expected a text or a list of messages, got "
            f"{reprlib.repr(prompt)}"
        )
    messages = tuple(_message(m, f"{at}: {source.prompt_key}.{i}") for i, m in enumerate(prompt))
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{at}: {source.prompt_key}: expected the last message to be the user's, got "
            f"{messages[-1]['role']}"
        )
    if len(messages) > 1 and not data.apply_chat_template:
        raise UserError(
            f"{at}: {source.prompt_key}: expected a text or one message of the user where "
            f"data.apply_chat_template is false, got {len(messages)} messages; set it to true"
        )
    if source.template is not None and data.apply_chat_template:
        raise UserError(
            f"{where}.template: expected none where prompts are messages, as in {at} (the chat "
            f"template renders them as they are), got {source.template!r}; remove it"
        )
    return Problem(messages[-1]["content"], answer, task, row.whole(), messages, at)


def _message(message: Any, at: str) -> Message:
    """One turn, with nothing but its role and content. Raises UserError."""
    if not isinstance(message, dict):
        raise UserError(f"{at}: expected a message (role, content), got {reprlib.repr(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"{at}.role: expected {', '.join(ROLES)}, got {reprlib.repr(role)}")
    if not (isinstance(content, str) and content):
        raise UserError(f"{at}.content: expected a text, got {reprlib.repr(content)}")
    return {"role": role, "content": _encodable(content, f"{at}.content")}
