"""Published data: every layout and place gives the same problems, each once; refusals in one line.

The Hugging Face hub is a server of this test, asked by the real client library.
"""

import http.server
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapo_megatron.data import rows as rows_of
from sapo_megatron.data.datasets import find_files, read_problems
from sapo_megatron.errors import UserError
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import DataConfig, SourceConfig

PROBLEMS = [("What is 30 + 4?", "34"), ("What is 3 * 11?", "033"), ("What is x?", "7")]
SHA = "ab" * 20


def user(text):
    return [{"role": "user", "content": text}]


def verl(text, answer):
    return {
        "data_source": "math_dapo",
        "prompt": user(text),
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": uuid.uuid4().hex},
    }


def slime(text, answer):
    return {"prompt": user(text), "label": answer}


def plain(text, answer):
    return {"problem": text, "answer": answer, "url": "https://"}


def capital(text, answer):
    return {"ID": "2024-I-1", "Problem": text, "Solution": "", "Answer": int(answer)}


LAYOUTS = {
    verl: ("prompt", "reward_model.ground_truth"),
    slime: ("prompt", "label"),
    plain: ("problem", "answer"),
    capital: ("Problem", "Answer"),
}


def write(path, rows, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, **kwargs)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, keys=("prompt", "answer"), *, chat=True, **kwargs):
    source = SourceConfig(path=str(path), prompt_key=keys[0], answer_key=keys[1], **kwargs)
    return read_problems(DataConfig(train=source, apply_chat_template=chat), "data.train")


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_problems(tmp_path, layout, suffix):
    rows = [layout(*problem) for problem in PROBLEMS]
    problems = read(write(tmp_path / f"rows{suffix}", rows), LAYOUTS[layout])
    found = [(p.text, p.answer) for p in problems]
    as_read = [(t, str(int(a)) if layout is capital else a) for t, a in PROBLEMS]
    assert found == as_read
    assert [p.entry for p in problems] == rows
    assert {p.task for p in problems} == {"rows"}
    conversation = layout in (verl, slime)
    assert all(p.messages == (tuple(user(p.text)) if conversation else ()) for p in problems)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_wrong_keys_are_answered_with_the_right_ones(tmp_path, layout, suffix):
    path = write(tmp_path / f"rows{suffix}", [layout(*PROBLEMS[0])])
    prompt_key, answer_key = LAYOUTS[layout]
    message = refusal(read, path, ("text", "solution.final"))
    assert f"{path}" in message
    assert "expected the key 'text'" in message
    assert ", ".join(map(repr, layout(*PROBLEMS[0]))) in message
    fix = f"set data.train.prompt_key={prompt_key} and data.train.answer_key={answer_key}"
    assert message.endswith(fix)
    assert "solution.final" in refusal(read, path, (prompt_key, "solution.final"))
    if layout is verl:
        assert "'reward_model.truth'" in refusal(read, path, ("prompt", "reward_model.truth"))
        assert "'data_source.x'" in refusal(read, path, ("prompt", "data_source.x"))


def test_a_column_with_a_dot_in_its_name(tmp_path):
    rows = [{"a.b": "text", "a": {"b": "inner"}, "c": {"d": {"e": 5}}}]
    for suffix in (".parquet", ".jsonl"):
        (problem,) = read(write(tmp_path / f"rows{suffix}", rows), ("a.b", "c.d.e"))
        assert (problem.text, problem.answer) == ("text", "5")


def test_repeated_rows_are_left_out_and_counted_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(rows_of, "BATCH", 7)
    rows = [verl(*problem) for _ in range(20) for problem in PROBLEMS]
    rows.append(verl(PROBLEMS[0][0], "35"))  # the same prompt with another answer
    write(tmp_path / "d" / "a.parquet", rows, row_group_size=11)
    write(tmp_path / "d" / "b.jsonl", [verl(*PROBLEMS[1]), verl(*PROBLEMS[2]), verl("new", "1")])
    with caplog.at_level(logging.INFO):
        problems = read(tmp_path / "d", LAYOUTS[verl])
    assert [(p.text, p.answer) for p in problems] == [
        *PROBLEMS,
        (PROBLEMS[0][0], "35"),
        ("new", "1"),
    ]
    assert [p.entry for p in problems[:4]] == [*rows[:3], rows[-1]]  # the first of each
    (message,) = caplog.messages
    assert "5 problems; 59 of the 64 rows" in message
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read(tmp_path / "d" / "b.jsonl", LAYOUTS[verl])
    assert caplog.messages == []


def test_memory_is_that_of_the_problems_not_of_the_rows(tmp_path):
    rows = [verl(f"problem {i} " + "x" * 500, "1") for i in range(100)]
    once = pa.Table.from_pylist(rows)
    pq.write_table(pa.concat_tables([once] * 400), tmp_path / "rows.parquet")
    tracemalloc.start()
    assert len(read(tmp_path / "rows.parquet", LAYOUTS[verl])) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # 40,000 rows as objects are more than 100 MB; a batch is 10


def test_a_folder_is_all_files_in_it_sorted(tmp_path):
    for name in ("b.jsonl", "a/train-00001-of-00002.parquet", "a/train-00000-of-00002.parquet"):
        write(tmp_path / name, [{"prompt": name, "answer": 1}])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a" / "dataset_infos.json").write_text("{}")
    names = ["a/train-00000-of-00002.parquet", "a/train-00001-of-00002.parquet", "b.jsonl"]
    assert [p.text for p in read(tmp_path)] == names
    assert {p.task for p in read(tmp_path)} == {tmp_path.name}
    assert [p.text for p in read(tmp_path / "a" / "train-*1-of-*")] == names[1:2]
    assert find_files(str(tmp_path / "b.jsonl"), "") == [tmp_path / "b.jsonl"]


def test_splits_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "main" / f"{split}-00000-of-00001.parquet", [{"prompt": split}])
    message = refusal(read, tmp_path)
    assert "the files of one split, got test, train" in message
    assert f"{tmp_path}/main/test-*.parquet" in message
    assert len(find_files(f"{tmp_path}/main/test-*.parquet", "")) == 1
    write(tmp_path / "one" / "train_not_test.jsonl", [])
    assert len(find_files(f"{tmp_path}/one", "")) == 1
    write(tmp_path / "two" / "contest-1.jsonl", [])
    write(tmp_path / "two" / "trainer-2.jsonl", [])
    assert len(find_files(f"{tmp_path}/two", "")) == 2


def test_files_that_are_not_there(tmp_path):
    assert f"no such file: {tmp_path}/no-*" in refusal(read, tmp_path / "no-*")
    message = refusal(read, tmp_path)
    assert f".parquet or .jsonl files in {tmp_path}, got none" in message


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "a.parquet").write_text("not parquet")
    message = refusal(read, tmp_path / "a.parquet")
    assert f"data.train.path: cannot read {tmp_path}/a.parquet: Parquet magic" in message
    whole = write(tmp_path / "b.parquet", [slime("x" * 100, "1")] * 2).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:40] + b"\xff" * 60 + whole[100:])
    assert f"cannot read {tmp_path}/b.parquet" in refusal(read, tmp_path / "b.parquet")
    empty = write(tmp_path / "c.parquet", [slime("x", "1")])
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    assert "got an empty file" in refusal(read, empty)
    (tmp_path / "folder.jsonl").mkdir()
    assert "cannot read" in refusal(read, tmp_path / "*.jsonl")


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ([], "expected a text or a list of messages, got []"),
        (None, "expected a text or a list of messages, got None"),
        (["x"], "prompt.0: expected a message (role, content), got 'x'"),
        ([{"content": "x"}], "prompt.0.role: expected system, user, assistant, got None"),
        ([{"role": "tool", "content": "x"}], "prompt.0.role: expected system, user, assistant"),
        ([{"role": "user", "content": [{"text": "x"}]}], "prompt.0.content: expected a text"),
        ([{"role": "user", "content": ""}], "prompt.0.content: expected a text, got ''"),
        ([*user("x"), {"role": "user"}], "prompt.1.content: expected a text, got None"),
        ([{"role": "system", "content": "x"}], "the last message to be the user's, got system"),
        ([*user("x"), {"role": "assistant", "content": "y"}], "the user's, got assistant"),
    ],
)
def test_a_conversation_that_is_none(tmp_path, prompt, part):
    path = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": 1}])
    message = refusal(read, path)
    assert f"{path}:1: prompt" in message
    assert part in message


def test_a_null_of_a_parquet_file_is_named_with_its_row(tmp_path):
    rows = [slime("x", "1"), slime("y", None)]
    path = write(tmp_path / "rows.parquet", rows)
    message = refusal(read, path, LAYOUTS[slime])
    assert message == f"{path}: row 2: label: expected a text or a number, got None"


def test_more_turns_need_a_chat_template(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, *user("x")]
    path = write(tmp_path / "rows.parquet", [{"prompt": turns, "answer": "1"}])
    assert read(path)[0].messages == tuple(turns)
    message = refusal(read, path, chat=False)
    assert "data.apply_chat_template is false, got 2 messages; set it to true" in message


def test_a_sources_template_is_not_for_messages(tmp_path):
    path = write(tmp_path / "rows.parquet", [slime("x", "1")])
    message = refusal(read, path, LAYOUTS[slime], template="Q {prompt}")
    assert "data.train.template: expected none" in message
    assert "got 'Q {prompt}'; remove it" in message
    assert read(path, LAYOUTS[slime], chat=False, template="Q {prompt}")


def snippets():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.MULTILINE)
    return [textwrap.dedent(b) for b in blocks if b.strip().startswith("data:")]


@pytest.mark.parametrize("snippet", snippets())
def test_the_recipes_of_the_documentation_load(tmp_path, snippet):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: m}}\nreward: {{function: math_verify}}\n{snippet}")
    data = load(recipe).data
    assert (data.train.prompt_key, data.train.answer_key) in LAYOUTS.values() or (
        data.train.path == str(tmp_path / "problems.jsonl")
    )
    if data.eval and data.eval.template:
        assert data.eval.template == "{prompt}\n\nPut the final answer in \\boxed{}."


def test_the_documentation_has_recipes():
    assert len(snippets()) == 5


READ = """
import sys
from sapo_megatron.data.datasets import read_problems
from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import DataConfig, SourceConfig
for path in sys.argv[1:]:
    data = DataConfig(train=SourceConfig(path=path, prompt_key="problem"))
    try:
        print([p.text for p in read_problems(data, "data.eval")])
    except UserError as error:
        print(error)
"""
HUB = {
    "owner/aime": {"data/train-00000-of-00001.parquet": ["p0", "p1"], "README.md": None},
    "owner/both": {"main/train-0.jsonl": ["a"], "main/test-0.jsonl": ["b"], "big.bin": None},
}


def start(*paths, **env):
    """Other processes, since the hub's library reads its environment when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", READ, *paths],
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_XET": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


def contents(tmp_path, name, file):
    texts = HUB[name][file]
    if texts is None:
        return b"about"
    path = tmp_path / "served" / Path(file).name
    return write(path, [plain(text, "1") for text in texts]).read_bytes()


def test_a_copy_in_the_cache_is_used_offline(tmp_path):
    """The cache as the hub's library lays it out: a reference, blobs, and links to them."""
    folder = tmp_path / "hub" / "datasets--owner--aime"
    file = "data/train-00000-of-00001.parquet"
    link = folder / "snapshots" / SHA / file
    link.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    (folder / "blobs" / "0123").write_bytes(contents(tmp_path, "owner/aime", file))
    link.symlink_to("../../../blobs/0123")
    found = lines(
        start(
            "owner/aime",
            "owner/aime/data/",
            f"owner/aime/{file}",
            "owner/aime/data/train-*",
            "owner/aime/data/test-*",
            "owner/none",
            "owner/none/data/x.parquet",
            "a/b--c",
            HF_HOME=str(tmp_path),
            HF_HUB_OFFLINE="1",
        )
    )
    assert found[:4] == ["['p0', 'p1']"] * 4
    assert "no such file" in found[4]
    assert "data/test-*" in found[4]
    for message, path in zip(found[5:7], ["owner/none", "owner/none/data/x.parquet"], strict=True):
        assert "data.eval.path: expected a file or folder beside the recipe, or a dat" in message
        assert f"got {path}: there is no copy in {tmp_path}/hub, and HF_HUB_OFFLINE is" in message
        assert message.endswith("hf download owner/none --repo-type dataset")
    assert "a/b--c" in found[7]
    assert len(found) == 8


@pytest.fixture
def hub(tmp_path):
    """The part of the hub's interface that a download uses; yields its address and what was got."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
            if name not in HUB:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                sizes = {file: len(contents(tmp_path, name, file)) for file in HUB[name]}
                files = [
                    {"type": "file", "path": file, "size": size, "oid": f"{name}-{file}"}
                    for file, size in sizes.items()
                ]
                return self.answer(200, json.dumps(files))
            if parts[0] == "api":
                files = [{"rfilename": file} for file in HUB[name]]
                return self.answer(200, json.dumps({"id": name, "sha": SHA, "siblings": files}))
            file = "/".join(parts[5:])
            if self.command == "GET":
                got.append(f"{name}/{file}")
            tag = {"ETag": f'"{name}-{file}"'.replace("/", "-"), "X-Repo-Commit": SHA}
            return self.answer(200, contents(tmp_path, name, file), tag)

        do_HEAD = do_GET

        def answer(self, status, body, headers=None):
            body = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_dataset_is_downloaded_once_and_no_more_than_was_asked_for(tmp_path, hub):
    address, got = hub
    names = ("owner/aime", "owner/both/main/test-*", "owner/none", "owner/both")
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address}
    for process in [start(*names, **env) for _ in range(2)]:  # at once, as ranks do
        aime, test, none, both = lines(process)
        assert (aime, test) == ("['p0', 'p1']", "['b']")
        assert "the hub has no such dataset" in none
        assert "the files of one split, got test, train in owner/both" in both
        assert both.endswith("e.g. owner/both/main/test-0.jsonl")
    assert sorted(got) == [
        "owner/aime/data/train-00000-of-00001.parquet",
        "owner/both/main/test-0.jsonl",
        "owner/both/main/train-0.jsonl",
    ]
    offline = lines(start("owner/aime", HF_HUB_OFFLINE="1", **env))
    unreachable = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    kept, message = lines(start("owner/aime", "owner/new", **unreachable))
    assert offline == [kept] == ["['p0', 'p1']"]
    assert "and the hub does not answer" in message
