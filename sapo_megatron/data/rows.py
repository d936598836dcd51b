"""Files of published data -> rows: JSONL, a JSON list or parquet, each row with its place."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sapo_megatron.errors import UserError, one_line

SUFFIXES = (".parquet", ".jsonl")
"""Of the files that are looked for in a folder."""
OTHER_SUFFIXES = {
    ".csv": "CSV",
    ".tsv": "TSV",
    ".xlsx": "a spreadsheet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
}
OTHER_BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"ARROW1": "Arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"<": "HTML or XML",
    b"version https://git-lfs": "a pointer of git LFS (run git lfs pull)",
}
"""What is not read: how its name ends, and how it begins."""
BATCH = 4096
"""Rows of a parquet file that are in memory at once."""
DEEPEST = 100
"""Objects and lists within one another, in a row; deeper ones cannot be sent to reward workers."""


class Row(NamedTuple):
    at: str
    """The file and the row's number in it, for messages."""
    fields: dict[str, Any]
    """The fields that the keys lead into, and maybe others."""
    whole: Callable[[], dict[str, Any]]


def read_rows(file: Path, keys: Collection[str]) -> Iterator[Row]:
    """The rows of a file in whose ``keys`` (dotted where they go into objects) one is interested.

    Raises UserError for what is no such file or no row, OSError and pyarrow's errors.
    """
    if not file.is_file():
        raise OSError("expected a file, got a folder, a pipe or a device")
    with file.open("rb") as opened:
        head = opened.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    begun = (name for mark, name in OTHER_BEGINNINGS.items() if head.startswith(mark))
    other = OTHER_SUFFIXES.get(file.suffix.lower()) or next(begun, None)
    if other:
        raise UserError(
            f"{file}: expected JSONL, a JSON list or parquet, got {other}; unpack or convert it"
        )
    if file.suffix == ".parquet" or head.startswith(b"PAR1"):
        return _parquet_rows(file, keys)
    return _list_rows(file) if head.startswith(b"[") else _jsonl_rows(file)


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                at = f"{file}:{number}"
                yield _row(_parsed(line, at), at)


def _list_rows(file: Path) -> Iterator[Row]:
    rows = _parsed(file.read_bytes(), str(file))
    yield from (_row(row, f"{file}: row {number}") for number, row in enumerate(rows, 1))


def _parsed(text: bytes, at: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in text.strip() else ""
        raise UserError(f"{at}: not JSON: {error.msg} at {line}column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{at}: not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:  # endless digits, names and nesting
        raise UserError(f"{at}: cannot be read: {one_line(error, 100)}; correct it") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is given twice")
    return made


def _row(row: Any, at: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{at}: expected a JSON object, got {one_line(json.dumps(row), 40)}")
    if _too_deep(row, DEEPEST):
        raise UserError(f"{at}: expected at most {DEEPEST} objects in one another, got more")
    return Row(at, row, row.copy)


def _too_deep(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return not left or any(_too_deep(part, left - 1) for part in parts)


def _parquet_rows(file: Path, keys: Collection[str]) -> Iterator[Row]:
    """Most columns stay packed: they become objects for the few rows that are asked for whole."""
    number = 0
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"{file}: expected each column once, got {name!r} {count} times")
        heads = {head for key in keys for head in (key, key.split(".")[0])}
        columns = [name for name in names if name in heads]
        for batch in table.iter_batches(BATCH):
            chosen, first = batch.select(columns), number
            try:
                rows = iter(chosen.to_pylist())
            except ValueError:  # one of them says which it is
                rows = (_packed(chosen, i, file, first) for i in range(len(chosen)))
            for i, fields in enumerate(rows):
                number += 1
                whole = lambda b=batch, i=i, n=first: _packed(b, i, file, n)  # noqa: E731
                yield Row(f"{file}: row {number}", fields, whole)


def _packed(batch: pa.RecordBatch, i: int, file: Path, before: int) -> dict[str, Any]:
    """Row ``i`` of a batch that begins after so many rows. Raises UserError."""
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{file}: row {before + i + 1}: {one_line(error, 200)}") from None
