"""Rows that are bad in ways that files of real sets are: one line with the file and the row.

Whatever number an answer is, it keeps its value; answers of no use are counted before training.
"""

import decimal
import gzip
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapo_megatron.data.datasets import read_problems
from sapo_megatron.data.prompts import PromptSource
from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import DataConfig, SourceConfig
from sapo_megatron.rollout.verifiers import why_unverifiable
from tests.support.chat import save_tokenizer

ROW = {"prompt": "p", "answer": "1"}


def read(path, *, function="module:function", **kwargs):
    data = DataConfig(train=SourceConfig(path=str(path)), **kwargs)
    return read_problems(data, "data.train", why_unverifiable(function))


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


NUMBERS = [
    ("0.00001", "0.00001"),
    ("1e-5", "0.00001"),
    ("1e16", "10000000000000000"),
    ("1.5e300", "15" + "0" * 299),
    ("34.0", "34"),
    ("-34.0", "-34"),
    ("-0.0", "0"),
    ("0", "0"),
    ("100", "100"),
    ("100.0", "100"),
    ("18.90", "18.9"),
    ("9007199254740993", "9007199254740993"),
    ("123456789012345678901234567890", "123456789012345678901234567890"),
    ("5e-324", "0." + "0" * 323 + "5"),
    ('"1e-05"', "1e-05"),
    ('"033"', "033"),
]


@pytest.mark.parametrize(("number", "text"), NUMBERS)
def test_a_number_keeps_its_value(tmp_path, number, text):
    (problem,) = read(write(tmp_path / "a.jsonl", f'{{"prompt": "p", "answer": {number}}}'))
    assert problem.answer == text


def test_numbers_of_parquet_keep_their_value(tmp_path):
    for values, texts in (
        (pa.array([34.0, 1e16, None][:2]), ["34", "10000000000000000"]),
        (pa.array([decimal.Decimal("18.90"), decimal.Decimal("34.00")]), ["18.9", "34"]),
        (pa.array([0.5, -2.0], pa.float32()), ["0.5", "-2"]),
    ):
        pq.write_table(pa.table({"prompt": ["a", "b"], "answer": values}), tmp_path / "a.parquet")
        assert [p.answer for p in read(tmp_path / "a.parquet")] == texts


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "-Infinity", "null", "true", "[1]"])
def test_what_is_no_answer_is_refused_with_its_row(tmp_path, number):
    content = f'{json.dumps(ROW)}\n{{"prompt": "p", "answer": {number}}}'
    message = refusal(read, write(tmp_path / "a.jsonl", content))
    assert message.startswith(f"{tmp_path}/a.jsonl:2: answer: expected a text or a number, got ")
    pq.write_table(pa.table({"prompt": ["a"], "answer": [float("nan")]}), tmp_path / "a.parquet")
    assert f"{tmp_path}/a.parquet: row 1: answer" in refusal(read, tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ""])
@pytest.mark.parametrize("front", [b"", b"\xef\xbb\xbf", b"\n  "])
def test_a_json_list_is_read(tmp_path, suffix, front):
    rows = [{"prompt": f"p{i}", "answer": i, "more": [i]} for i in range(3)]
    path = write(tmp_path / f"a{suffix}", front + json.dumps(rows, indent=1).encode())
    problems = read(path)
    assert [p.entry for p in problems] == rows
    assert {p.task for p in problems} == {"a"}
    assert problems[2].at == f"{path}: row 3"


SURROGATE = '"a \\ud83d b"'
DEEP = "[" * 200 + "]" * 200
BAD = {
    # content: what its message says
    f'{{"prompt": {SURROGATE}, "answer": 1}}': [":1: prompt: expected Unicode", "character 3"],
    f'{{"prompt": "p", "answer": {SURROGATE}}}': [":1: answer: expected Unicode"],
    f'{{"prompt": [{{"role": "user", "content": {SURROGATE}}}], "answer": 1}}': [
        ":1: prompt.0.content: expected Unicode"
    ],
    f'{{"prompt": "p", "answer": {"9" * 5000}}}': [":1: cannot be read", "4300 digits"],
    f'{{"prompt": "p", "answer": 1, "x": {"9" * 5000}}}': [":1: cannot be read"],
    f'{{"prompt": "p", "answer": 1, "x": {DEEP}}}': [":1: expected at most 100 objects"],
    f'{{"prompt": {DEEP}, "answer": 1}}': [":1: expected at most 100 objects"],
    '{"prompt": "p", "answer": 1, "x": ' + "[" * 100_000: [":1: cannot be read", "recursion"],
    '{"a":' * 100_000: [":1: cannot be read", "recursion"],
    '{"prompt": "p", "answer": 1, "answer": 2}': [":1: cannot be read: 'answer' is given twice"],
    '{"prompt": "p", "answer": 1, "x": {"y": 1, "y": 1}}': ["'y' is given twice"],
    "prompt,answer\np,1\n": [":1: not JSON: Expecting value at column 1"],
    '{\n "prompt": "p",\n "answer": 1\n}': [":1: not JSON"],
    "[1, 2]": [": row 1: expected a JSON object, got 1"],
    '[{"prompt": "p", "answer": 1}, [': ["not JSON: Expecting value at column"],
    '[{"prompt": "p", "answer": 1},\n{"prompt": "p"}]': [": row 2: expected the key 'answer'"],
    "[]": ["an empty file"],
    "[1]\n[2]": ["not JSON: Extra data at line 2, column 1"],
    '{"prompt": "p", "answer": "1"}\n\x00': [":2: not JSON"],
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_a_row_that_is_none(tmp_path, content):
    message = refusal(read, write(tmp_path / "a.jsonl", content), apply_chat_template=True)
    assert message.startswith((f"{tmp_path}/a.jsonl", "data.train.path: "))
    assert all(part in message for part in BAD[content]), message


def test_what_is_read_can_be_sent_to_workers(tmp_path):
    deep = "[" * 99 + "]" * 99
    content = f'{{"prompt": "p", "answer": 1, "x": {deep}}}'
    (problem,) = read(write(tmp_path / "a.jsonl", content))
    assert pickle.loads(pickle.dumps(problem)) == problem


OTHERS = {
    "a.jsonl.gz": (gzip.compress(json.dumps(ROW).encode()), "gzip"),
    "a.jsonl": (gzip.compress(json.dumps(ROW).encode()), "gzip"),
    "b.parquet": (b"\x28\xb5\x2f\xfd....", "zstd"),
    "a.csv": (b"prompt,answer\np,1\n", "CSV"),
    "a.CSV": (b"prompt,answer\np,1\n", "CSV"),
    "a.tsv": (b"prompt\tanswer\n", "TSV"),
    "a.zip": (b"PK\x03\x04....", "zip"),
    "a.arrow": (b"ARROW1\0\0", "Arrow"),
    "a.html": (b"<!DOCTYPE html>", "HTML"),
    "c.jsonl": ('{"prompt": "p", "answer": 1}'.encode("utf-16"), "UTF-16"),
    "d.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git LFS"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_formats_that_are_not_read_are_named(tmp_path, name):
    content, format_ = OTHERS[name]
    message = refusal(read, write(tmp_path / name, content))
    assert f"{tmp_path}/{name}: expected JSONL, a JSON list or parquet, got {format_}" in message


def test_a_folder_with_other_formats_alone_names_them(tmp_path):
    write(tmp_path / "train.csv", b"a")
    write(tmp_path / "train.json", b"[]")
    assert "got none (train.csv, train.json)" in refusal(read, tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", tmp_path / "*.jsonl", "/dev/zero"):
        assert "a folder, a pipe or a device" in refusal(read, path)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "cannot read" in refusal(read, tmp_path / "loop.jsonl")


def columns(names, *arrays):
    return pa.Table.from_arrays([pa.array(a) for a in arrays], names=names)


def test_parquet_that_rows_cannot_be_made_of(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(columns(["prompt", "prompt", "answer"], ["a"], ["b"], ["1"]), path)
    assert "expected each column once, got 'prompt' 2 times" in refusal(read, path)
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(columns(["prompt", "answer", "more"], ["a"], ["1"], twice), path)
    assert f"{path}: row 1: " in refusal(read, path)
    data = pa.py_buffer(b"ab\xff\xfe")
    text = pa.Array.from_buffers(pa.string(), 2, [None, pa.array(["ab", "cd"]).buffers()[1], data])
    pq.write_table(columns(["prompt", "answer"], text, ["1", "2"]), path)
    assert f"{path}: row 2: 'utf-8' codec" in refusal(read, path)


ANSWERS = ["34", "proof", "\\$18.90", "", "proof", "Proof.", "\\boxed{1", "B"]


@pytest.fixture
def answers(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": answer} for i, answer in enumerate(ANSWERS)]
    return write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))


def test_answers_of_no_use_are_counted_by_reason(answers, caplog):
    message = refusal(read, answers, function="math_verify")
    assert "5 of 8 that reward.function cannot: " in message
    assert f"3 no answer (proof) (first {answers}:2)" in message
    assert f"1 empty (first {answers}:4)" in message
    assert f"1 cut off (first {answers}:7)" in message
    assert message.endswith("set data.on_unverifiable=drop to leave them out")
    problems = read(answers, function="math_verify", on_unverifiable="drop")
    assert [p.answer for p in problems] == ["34", "\\$18.90", "B"]
    (warning,) = caplog.messages
    assert "left out" in warning
    assert "5 of 8" in warning
    assert len(read(answers)) == 8
    assert "1 of 8 that reward.function cannot: 1 empty" in refusal(
        read, answers, function="exact_match"
    )


def test_nothing_is_left_to_train_on(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "p", "answer": "proof"}))
    message = refusal(read, path, function="math_verify", on_unverifiable="drop")
    assert "got none to use in" in message


def source(folder, path, template):
    tokenizer = load_tokenizer(str(save_tokenizer(folder, template)), 512)
    data = DataConfig(train=SourceConfig(path=str(path)), apply_chat_template=True)
    return PromptSource(data, tokenizer, max_prompt_length=200)


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ raise_exception('no') }}", "refuses the turns user: no"),
        ("{{ 1 / 0 }}", "refuses the turns user"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "refuses the turns user"),
        ("{{ messages[9].content }}", "refuses the turns user"),
        ("{% if", "refuses the turns user"),
        ("{% if false %}x{% endif %}", "expected a prompt of at least one token"),
        (
            "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}a",
            "a.jsonl:2: data.apply_chat_template: the chat template",
        ),
    ],
)
def test_a_template_that_raises_or_renders_nothing(tmp_path, template, part):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    rows = [ROW, {"prompt": turns, "answer": "1"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    message = refusal(source, tmp_path / "model", path, template)
    assert f"{path}:" in message
    assert part in message
