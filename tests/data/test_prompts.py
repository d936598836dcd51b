"""Prompts: the same everywhere, resumable, never those of the evaluation."""

import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sapo_megatron.data import prompts
from sapo_megatron.data.prompts import CHUNK, PromptSource, held_out
from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import DataConfig, SourceConfig, TaskConfig
from tests.support.chat import BOS, save_tokenizer

TOKENIZER = load_tokenizer(str(Path(__file__).parents[2] / "recipes" / "tiny-moe"), 104)
SUMS = TaskConfig(
    name="basic_arithmetic",
    options={
        "min_terms": 2,
        "max_terms": 2,
        "max_digits": 1,
        "operators": ["+"],
        "allow_parentheses": False,
        "allow_negation": False,
    },
)


def tasks(*names, seed=0, **kwargs):
    chosen = tuple(n if isinstance(n, TaskConfig) else TaskConfig(name=n) for n in names)
    return DataConfig(train=SourceConfig(tasks=chosen, seed=seed), **kwargs)


MIXED = tasks("chain_sum", "gcd", "list_functions")  # the last draws from the global generator


def source(data, *, exclude=(), **kwargs):
    made = PromptSource(data, TOKENIZER, **({"max_prompt_length": 200} | kwargs))
    made.exclude(exclude)
    return made


@pytest.fixture
def rows(tmp_path):
    """A DataConfig of a JSONL file with the given lines (texts, or objects to be encoded)."""

    def rows(*lines, **kwargs):
        path = tmp_path / "rows.jsonl"
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("".join(f"{text}\n" for text in texts))
        return DataConfig(train=SourceConfig(path=str(path), **kwargs))

    return rows


def numbered(n):
    return [{"prompt": f"p{i}", "answer": i} for i in range(n)]


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_prompt_holds_what_the_scorer_needs():
    (prompt,) = source(tasks(SUMS)).next(1)
    assert prompt.text.startswith("Calculate ")
    assert prompt.answer == str(eval_sum(prompt.text))
    assert TOKENIZER.decode(prompt.tokens) == prompt.text
    assert prompt.task == "basic_arithmetic"
    assert prompt.entry["answer"] == prompt.answer
    assert prompt.entry["options"] == SUMS.options
    assert pickle.loads(pickle.dumps(prompt)) == prompt


def eval_sum(text):
    return sum(int(term) for term in text.removeprefix("Calculate ").rstrip(".").split(" + "))


def test_the_same_prompts_in_another_process():
    program = (
        "import test_prompts as t;"
        "print([p.text for p in t.source(t.MIXED, max_prompt_length=9999).next(20)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    here = [p.text for p in source(MIXED, max_prompt_length=9999).next(20)]
    assert done.stdout.strip().splitlines()[-1] == str(here)


def test_seeds_differ_and_chunks_do_not_repeat():
    data = tasks("chain_sum")
    texts = [p.text for p in source(data).next(2 * CHUNK)]
    assert len(set(texts[:CHUNK]) & set(texts[CHUNK:])) < CHUNK // 10
    other = [p.text for p in source(tasks("chain_sum", seed=1)).next(CHUNK)]
    assert len(set(texts) & set(other)) < CHUNK // 10


def test_a_mixture_follows_its_weights():
    data = tasks(TaskConfig(name="chain_sum", weight=3.0), TaskConfig(name="gcd", weight=1.0))
    drawn = [p.task for p in source(data).next(800)]
    assert drawn.count("chain_sum") == pytest.approx(600, abs=50)


def test_drawing_leaves_the_global_generators_alone():
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    source(tasks("list_functions"), max_prompt_length=9999).next(3)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("kind", ["tasks", "file"])
def test_resume_goes_on_where_it_stopped(rows, kind):
    data = tasks(SUMS, "gcd") if kind == "tasks" else rows(*numbered(7))
    whole = source(data, max_prompt_length=60)
    drawn = whole.next(30)
    half = source(data, max_prompt_length=60)
    half.next(11)
    state = json.loads(json.dumps(half.state_dict()))
    resumed = source(data, max_prompt_length=60)
    resumed.load_state_dict(state)
    assert resumed.next(19) == drawn[11:]
    assert resumed.state_dict() == whole.state_dict()
    uids = [p.uid for p in drawn]
    assert uids == sorted(set(uids))


def test_a_file_is_read_in_epochs_of_different_orders(rows):
    data = rows(*numbered(20))
    drawn = [p.text for p in source(data).next(60)]
    epochs = [drawn[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(f"p{i}" for i in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [p.text for p in source(data).next(60)] == drawn
    other = dataclasses.replace(data, train=dataclasses.replace(data.train, seed=1))
    assert [p.text for p in source(other).next(20)] != epochs[0]


def test_a_row_keeps_its_fields_and_a_number_becomes_text(rows):
    row = {"question": "q", "solution": 2.5, "level": 3}
    data = rows(row, "", prompt_key="question", answer_key="solution")
    (prompt,) = source(data).next(1)
    assert (prompt.text, prompt.answer, prompt.entry) == ("q", "2.5", row)
    assert prompt.task == "rows"


def test_the_template_surrounds_the_prompt(rows):
    data = dataclasses.replace(rows({"prompt": "{x}", "answer": ""}), template="Q {prompt}\nA")
    (prompt,) = source(data).next(1)
    assert prompt.text == "{x}"
    assert TOKENIZER.decode(prompt.tokens) == "Q {x}\nA"
    assert len(prompt.tokens) == len(TOKENIZER.encode("Q {x}\nA"))


def test_a_source_may_have_a_template_of_its_own(rows):
    file = rows({"prompt": "x", "answer": ""}, template="own {prompt}").train
    data = dataclasses.replace(tasks(SUMS), eval=file, template="all {prompt}")
    (prompt,) = held_out(data, TOKENIZER, 1, max_prompt_length=200)
    assert (prompt.text, TOKENIZER.decode(prompt.tokens)) == ("x", "own x")
    (prompt,) = source(data).next(1)
    assert TOKENIZER.decode(prompt.tokens) == f"all {prompt.text}"


class Chat:
    """A tokenizer that keeps what it is asked to encode."""

    ending = "<|im_start|>assistant\n"

    def encode_prompt(self, text):
        raise AssertionError("the chat template was not used")

    def encode_chat(self, messages):
        self.turns = [(m["role"], m["content"]) for m in messages]
        return [1]

    def decode(self, ids):
        return self.ending


def test_a_text_becomes_the_users_turn_with_the_template_around_it(rows):
    text = {"prompt": "x", "answer": ""}
    data = dataclasses.replace(rows(text), template="Q {prompt}", apply_chat_template=True)
    chat = Chat()
    PromptSource(data, chat, max_prompt_length=1).next(1)
    assert chat.turns == [("user", "Q x")]


@pytest.mark.parametrize("ending", ["assistant\n", "<think>\n", "<think>\n\n</think>\n\n"])
def test_whether_the_response_begins_inside_a_thought(rows, ending):
    chat = Chat()
    chat.ending = ending
    data = dataclasses.replace(rows({"prompt": "x", "answer": ""}), apply_chat_template=True)
    (prompt,) = PromptSource(data, chat, max_prompt_length=1).next(1)
    assert prompt.thinking == (ending == "<think>\n")


def test_a_text_without_chat_template_begins_with_the_tokenizers_bos(rows, tmp_path):
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / "bos", front=(BOS,))), 512)
    data = rows({"prompt": "x", "answer": ""}, template="Q {prompt}")
    (prompt,) = PromptSource(data, tokenizer, max_prompt_length=4).next(1)
    assert prompt.tokens == (BOS, *tokenizer.encode("Q x"))


def test_messages_go_into_the_chat_template_as_they_are(rows):
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {"prompt": [{"role": r, "content": c} for r, c in turns], "answer": ""}
    data = dataclasses.replace(rows(row), template="Q {prompt}", apply_chat_template=True)
    chat = Chat()
    (prompt,) = PromptSource(data, chat, max_prompt_length=1).next(1)
    assert chat.turns == turns
    assert prompt.text == "c"


def test_without_a_chat_template_the_users_message_is_a_text(rows):
    row = {"prompt": [{"role": "user", "content": "x"}], "answer": ""}
    (prompt,) = source(dataclasses.replace(rows(row), template="Q {prompt}")).next(1)
    assert (prompt.text, TOKENIZER.decode(prompt.tokens)) == ("x", "Q x")


def test_a_held_out_problem_is_known_in_another_layout(rows, tmp_path):
    conversations = [
        {"prompt": [{"role": "user", "content": f"p{i}"}], "label": i} for i in range(9)
    ]
    data = rows(*conversations, answer_key="label")
    (tmp_path / "eval.jsonl").write_text('{"problem": "p4", "answer": "4"}\n')
    file = SourceConfig(path=str(tmp_path / "eval.jsonl"), prompt_key="problem")
    data = dataclasses.replace(data, eval=file)
    texts = {p.text for p in held_out(data, TOKENIZER, 9, max_prompt_length=9)}
    assert texts == {"p4"}
    training = source(data, exclude=texts)
    assert {p.text for p in training.next(16)} == {f"p{i}" for i in range(9)} - {"p4"}
    assert training.skipped["held_out"] == 2


def test_the_digest_stands_for_the_problems(rows):
    def digest(*lines, **kwargs):
        return source(rows(*lines, **kwargs)).digest()

    two = numbered(2)
    assert digest(*two) == digest(*two, *two, '{"prompt": "p0", "answer": "0", "more": 1}')
    assert digest(*two, seed=3) != digest(*two), "their order is another"
    assert len({digest(*two), digest(*two[::-1]), digest(two[0]), digest(*numbered(3))}) == 4
    assert digest(two[0]) != digest({"prompt": "p0", "answer": 1})


def test_long_prompts_are_skipped_and_counted(rows, caplog):
    data = rows(*numbered(5), {"prompt": "x" * 11, "answer": "1"})
    prompts = source(data, max_prompt_length=10)
    assert {p.text for p in prompts.next(10)} == {f"p{i}" for i in range(5)}
    assert prompts.skipped == {"too_long": 2, "held_out": 0, "failed": 0}
    assert len([m for m in caplog.messages if "max_prompt_length" in m]) == 1
    assert source(data, max_prompt_length=11).next(6)[0].uid == 0
    message = refusal(source(data, max_prompt_length=1).next, 1)
    assert "too_long" in message
    assert "max_prompt_length = 1 tokens" in message


@pytest.mark.parametrize("kind", ["tasks", "file"])
def test_training_never_draws_an_evaluation_problem(rows, kind):
    data = tasks(SUMS) if kind == "tasks" else rows(*numbered(40))
    evaluation = held_out(data, TOKENIZER, 30, max_prompt_length=200)
    texts = {p.text for p in evaluation}
    assert len(evaluation) == len(texts) == 30
    training = source(data, exclude=texts)
    drawn = training.next(200)
    assert not texts & {p.text for p in drawn}
    assert training.skipped["held_out"] > 30
    assert evaluation == held_out(data, TOKENIZER, 30, max_prompt_length=200)


def test_an_evaluation_source_of_its_own(rows):
    file = rows({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}).train
    data = dataclasses.replace(tasks(SUMS), eval=file)
    assert {p.text for p in held_out(data, TOKENIZER, 2, max_prompt_length=9)} == {"a", "b"}


def test_fewer_evaluation_problems_than_asked_for(rows, caplog):
    data = rows(*numbered(4))
    assert len(held_out(data, TOKENIZER, 9, max_prompt_length=9)) == 4
    assert "expected 9 different problems, got 4" in caplog.text


@pytest.mark.parametrize("kind", ["tasks", "file"])
def test_nothing_left_to_train_on_is_an_error_not_a_loop(rows, kind):
    sums = dataclasses.replace(SUMS, options=SUMS.options | {"min_digits": 1})
    data = tasks(sums) if kind == "tasks" else rows(*numbered(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts._Tasks, "patience", 3000)
        evaluation = held_out(data, TOKENIZER, 1000, max_prompt_length=200)
        message = refusal(source(data, exclude={p.text for p in evaluation}).next, 1)
    assert "held_out" in message
    assert "eval.num_problems" in message


def test_an_item_that_a_task_cannot_make_is_skipped(monkeypatch, caplog):
    data = tasks("chain_sum")
    expected = source(data).next(9)
    made = prompts._Tasks._item

    def broken(self, i, index):
        if index in (4, 6):
            raise IndexError("no such\nitem")
        return made(self, i, index)

    monkeypatch.setattr(prompts._Tasks, "_item", broken)
    broken_source = source(data)
    assert broken_source.next(7) == [p for p in expected if p.uid not in (4, 6)]
    assert broken_source.skipped["failed"] == 2
    assert caplog.messages == ["chain_sum made no item 4: no such item"]


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (TaskConfig(name="chain_sums"), ["tasks.0.name", "nearest is chain_sum"]),
        (TaskConfig(name="composite"), ["tasks.0.name", "composite"]),
        (TaskConfig(name="chain_sum", options={"min_term": 1}), ["nearest is min_terms"]),
        (TaskConfig(name="chain_sum", options={"seed": 1}), ["no option 'seed'"]),
        (TaskConfig(name="chain_sum", options={"min_terms": 0}), ["min_terms must be positive"]),
        (TaskConfig(name="chain_sum", options={"min_terms": "x"}), ["tasks.0.options", "'x'"]),
    ],
)
def test_a_wrong_task(task, parts):
    message = refusal(source, tasks(task))
    assert all(part in message for part in parts), message


def test_tasks_that_depend_on_the_hash_seed_ask_for_it(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert "PYTHONHASHSEED=0" in refusal(source, tasks("word_ladder"))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert source(tasks("word_ladder"), max_prompt_length=2000).next(1)


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (['{"prompt": "a", "answer": "b"}', "{"], ["rows.jsonl:2", "not JSON"]),
        (["", "", "3"], ["rows.jsonl:3", "a JSON object, got 3"]),
        ([{"prompt": "a"}], ["rows.jsonl:1", "'answer'", "got 'prompt'", "answer_key"]),
        ([{"answer": "a"}], ["rows.jsonl:1", "'prompt'", "prompt_key"]),
        ([{"prompt": 3, "answer": "a"}], ["rows.jsonl:1", "prompt: expected a text or a", "3"]),
        ([{"prompt": "", "answer": "a"}], ["rows.jsonl:1", "prompt"]),
        ([{"prompt": "a", "answer": None}], ["rows.jsonl:1", "a text or a number, got None"]),
        ([{"prompt": "a", "answer": True}], ["rows.jsonl:1", "got True"]),
        ([{"prompt": "a", "answer": ["b"]}], ["rows.jsonl:1", "got ['b']"]),
        ([], ["empty file", "rows.jsonl"]),
        (["", "  "], ["empty file", "rows.jsonl"]),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(rows, lines, parts):
    message = refusal(source, rows(*lines))
    assert all(part in message for part in parts), message


def test_a_file_that_cannot_be_read(tmp_path):
    message = refusal(source, DataConfig(train=SourceConfig(path=str(tmp_path / "none"))))
    assert f"no such file: {tmp_path}/none" in message
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9", "answer": 1}')
    message = refusal(source, DataConfig(train=SourceConfig(path=str(tmp_path / "latin"))))
    assert "latin:1: not UTF-8" in message
