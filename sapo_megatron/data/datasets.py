"""Published data -> problems: JSONL and parquet files, of this machine or of the Hugging Face hub.

Files are read row by row; of rows with the same prompt and answer only the first is kept, so that
a set that was published with its epochs written out takes the memory of one.
"""

import glob
import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sapo_megatron.data.tokenizer import Message
from sapo_megatron.errors import UserError, one_line
from sapo_megatron.recipe.schema import DataConfig, SourceConfig

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl")
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
BATCH = 4096
"""Rows of a parquet file that are in memory at once."""
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


class _Row(NamedTuple):
    at: str
    """The file and the row's number in it, for messages."""
    fields: dict[str, Any]
    """The fields that the keys lead into, and maybe others."""
    whole: Callable[[], dict[str, Any]]


def read_problems(data: DataConfig, where: str) -> list[Problem]:
    """The problems of ``data.train.path``, each once, in the order of the files.

    ``where`` names the source in messages. Raises UserError for files that are missing, malformed
    or hold something else.
    """
    source = data.train
    assert source.path is not None
    task = re.sub(r"\.(parquet|jsonl)$", "", source.path.rsplit("/", 1)[-1])
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()
    read = 0
    files = find_files(source.path, where)
    for file in files:
        rows = _parquet_rows if file.suffix == ".parquet" else _jsonl_rows
        try:
            for row in rows(file, source):
                read += 1
                prompt, answer = (_field(row, key, where) for key in _keys(source))
                identity = repr(prompt), str(answer)
                if identity not in seen:
                    seen.add(identity)
                    problems.append(_problem(prompt, answer, row, data, where, task))
        except (OSError, pa.ArrowException) as error:  # pyarrow raises either for a broken file
            raise UserError(f"{where}.path: cannot read {file}: {one_line(error)}") from None
    if not problems:
        raise UserError(
            f"{where}.path: expected rows with {source.prompt_key} and {source.answer_key}, got "
            f"an empty file: {', '.join(map(str, files))}"
        )
    if read > len(problems):
        logger.info(
            "%s: %d problems; %d of the %d rows in %s repeat an earlier prompt and answer and are "
            "left out",
            where,
            len(problems),
            read - len(problems),
            read,
            source.path,
        )
    return problems


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
        raise UserError(
            f"{where}.path: expected {' or '.join(SUFFIXES)} files in {place}, got none; name a "
            f"folder that has some"
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


def _jsonl_rows(file: Path, source: SourceConfig) -> Iterator[_Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                at = f"{file}:{number}"
                row = _parse(line, at)
                yield _Row(at, row, row.copy)


def _parse(line: bytes, at: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{at}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{at}: not UTF-8: {error.reason}") from None
    if not isinstance(row, dict):
        raise UserError(f"{at}: expected a JSON object, got {line.decode()[:40].strip()}")
    return row


def _parquet_rows(file: Path, source: SourceConfig) -> Iterator[_Row]:
    """Most columns stay packed: they become objects for the few rows that are asked for whole."""
    number = 0
    with pq.ParquetFile(file) as table:
        heads = {head for key in _keys(source) for head in (key, key.split(".")[0])}
        columns = [name for name in table.schema_arrow.names if name in heads]
        for batch in table.iter_batches(BATCH):
            for i, fields in enumerate(batch.select(columns).to_pylist()):
                number += 1
                whole = lambda batch=batch, i=i: batch.slice(i, 1).to_pylist()[0]  # noqa: E731
                yield _Row(f"{file}: row {number}", fields, whole)


def _keys(source: SourceConfig) -> tuple[str, str]:
    return source.prompt_key, source.answer_key


def _field(row: _Row, key: str, where: str) -> Any:
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


def _problem(
    prompt: Any, answer: Any, row: _Row, data: DataConfig, where: str, task: str
) -> Problem:
    at, source = row.at, data.train
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(
            f"{at}: {source.answer_key}: expected a text or a number, got {reprlib.repr(answer)}"
        )
    if isinstance(prompt, str) and prompt:
        return Problem(prompt, str(answer), task, row.whole())
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
    return Problem(messages[-1]["content"], str(answer), task, row.whole(), messages)


def _message(message: Any, at: str) -> Message:
    """One turn, with nothing but its role and content. Raises UserError."""
    if not isinstance(message, dict):
        raise UserError(f"{at}: expected a message (role, content), got {reprlib.repr(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"{at}.role: expected {', '.join(ROLES)}, got {reprlib.repr(role)}")
    if not (isinstance(content, str) and content):
        raise UserError(f"{at}.content: expected a text, got {reprlib.repr(content)}")
    return {"role": role, "content": content}
