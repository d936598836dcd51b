"""Rewards: right scores, and no verifier that stops the run."""

import contextlib
import dataclasses
import os
import subprocess
import time
from pathlib import Path

import pytest
import reasoning_gym

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import RewardConfig
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.rollout.worker import MEMORY
from sapo_megatron.sample import Group, Prompt, Sample
from tests.support.scoring import score as scored

VERIFIERS = """
import asyncio, os, re, subprocess, sys, time

def length(prompt, response):
    return len(response) + len(prompt.text) / 100

class Numberless:
    def __float__(self):
        raise RuntimeError("no")

class Unprintable(Exception):
    def __str__(self):
        raise ValueError

def given(prompt, response):
    from decimal import Decimal
    from fractions import Fraction
    import numpy as np
    return {
        "float32": np.float32(0.5),
        "0-d": np.array(0.5),
        "bool": np.bool_(True),
        "Decimal": Decimal("0.5"),
        "Fraction": Fraction(1, 2),
        "text": " 0.5 ",
        "int": 10 ** 20,
        "score": {"score": np.float64(0.5), "acc": True},
        "list": [0.5],
        "list of dict": [{"score": True}],
        "nothing": None,
        "words": "right",
        "two": [0.5, 0.5],
        "array": np.zeros(2),
        "other dict": {"reward": 1.0},
        "empty dict": {},
        "complex": 1j,
        "inf": float("inf"),
        "huge": 10 ** 400,
        "numberless": Numberless(),
        "signalling": Decimal("sNaN"),
    }[response]

async def awaited(prompt, response):
    await asyncio.sleep(0)
    if response == "raise":
        raise KeyError("in a coroutine")
    return id(asyncio.get_running_loop())

class Callable:
    async def __call__(self, prompt, response):
        return [0.25]

callable_object = Callable()

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert not kwargs and data_source == "gsm8k" and extra_info == {"index": 3}
    return {"score": solution_str == ground_truth, "acc": 1.0}

def few(solution_str, ground_truth, method="strict"):
    return 0.5 * (solution_str == ground_truth)

def trl(prompts, completions, level, **kwargs):
    assert prompts == ["1 + 1"] and level == [4] and kwargs["data_source"] == ["gsm8k"]
    return [float(c == a) for c, a in zip(completions, kwargs["answer"])]

def trl_accuracy(completions, solution):
    return [float(c == s) for c, s in zip(completions, solution)]

async def trl_async(completions, **kwargs):
    return [0.75]

def too_many(args, sample, more):
    return 1.0

def forks(prompt, response):
    os.fork()
    return os.getpid()

def long_error(prompt, response):
    if response == "unprintable":
        raise Unprintable
    raise ValueError("\\x1b[2J\\ud800 first\\nsecond " + "x" * 10 ** 6)

def greedy(prompt, response):
    return len(bytearray(10 ** int(response)))

def gigabytes(prompt, response):
    import mmap
    return len(mmap.mmap(-1, 10 ** 9 * int(response), flags=mmap.MAP_PRIVATE))  # and not touched

CHILD = "import sys, time; sys.stdout.write('up'); sys.stdout.flush(); time.sleep(1000)"

ORPHAN = (
    "import subprocess as s, sys; child = [sys.executable, '-c', sys.argv[1]]; "
    "print(s.Popen(child, stdout=-1, start_new_session=True).pid)"
)

def leaves_children(prompt, response):
    kinds = ({}, {"start_new_session": True})
    children = [subprocess.Popen([sys.executable, "-c", CHILD], stdout=-1, **k) for k in kinds]
    orphan = subprocess.run([sys.executable, "-c", ORPHAN, CHILD], stdout=-1).stdout
    pids = [c.pid for c in children] + [int(orphan)]
    for child in children:
        child.stdout.read(2)
    told = response.split()[-1]
    with open(told + ".part", "w") as file:
        file.write(" ".join(map(str, pids)))
    os.rename(told + ".part", told)
    if response.startswith("exit"):
        os._exit(3)
    while response.startswith("hang"):
        pass
    return 1.0

def meets(prompt, response):
    folder, number, wanted = response.split()
    open(os.path.join(folder, number), "w").close()
    while len(os.listdir(folder)) < int(wanted):
        time.sleep(0.02)
    return 1.0

def naughty(prompt, response):
    if response == "loop":
        while True:
            try:
                pass
            except:
                pass
    if response == "C loop":
        re.match("(a+)+$", "a" * 40 + "b")
    if response == "power":
        len(str(10 ** 10 ** 9))
    if response == "swallow":
        while True:
            try:
                time.sleep(100)
            except BaseException:
                pass
    if response.startswith("wait for "):
        while not os.path.exists(response.removeprefix("wait for ")):
            time.sleep(0.05)
    if response.startswith("make "):
        open(response.removeprefix("make "), "w").close()
    if response == "raise":
        raise KeyError("no\\nsuch")
    if response == "exit":
        raise SystemExit(0)
    if response == "die":
        os._exit(3)
    if response == "text":
        return "one"
    if response == "none":
        return None
    if response == "nan":
        return float("nan")
    return 1.0

class Holder:
    not_callable = 3
    length = staticmethod(length)

pid = os.getpid()
def worker(prompt, response):
    return os.getpid()
"""


@pytest.fixture
def verifiers(tmp_path, monkeypatch):
    (tmp_path / "verifiers_of_the_user.py").write_text(VERIFIERS)
    monkeypatch.chdir(tmp_path)
    return "verifiers_of_the_user"


def group(*texts, prompt=None):
    prompt = prompt or Prompt(uid=3, text="1 + 1", answer="2", tokens=(1,), task="sums")
    made = [
        Sample(uid=i, prompt_tokens=(1,), response_tokens=[], rollout_logprobs=[], truncated=False)
        for i in range(len(texts))
    ]
    for sample, text in zip(made, texts, strict=True):
        sample.text = text
    return Group(prompt=prompt, samples=made)


def score(function, *groups, **settings):
    with Scorer(RewardConfig(function=function, **settings)) as scorer:
        metrics = scored(scorer, groups).values()
    return [[s.reward if s.scored else None for s in g.samples] for g in groups], metrics


def alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_exact_match_ignores_only_the_white_space_around():
    rewards, metrics = score("exact_match", group("2", " 2\n", "2 2", "22", "", "3"))
    assert rewards == [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    assert metrics == {"reward/errors": 0.0, "reward/timeouts": 0.0}


def test_a_prompt_without_answer_is_an_error_not_a_score():
    prompt = Prompt(uid=0, text="", answer="", tokens=(1,), task="rush_hour")
    rewards, metrics = score("exact_match", group("", prompt=prompt))
    assert rewards == [[None]]
    assert metrics["reward/errors"] == 1


def test_reasoning_gym_gives_the_tasks_own_score():
    def prompt_of(task, **options):
        item = reasoning_gym.create_dataset(task, seed=1, size=1, **options)[0]
        return Prompt(
            uid=0,
            text=item["question"],
            answer=str(item["answer"]),
            tokens=(1,),
            task=task,
            entry={**item, "options": options},
        )

    arithmetic = prompt_of("basic_arithmetic", operators=["+"], max_terms=2)
    right = arithmetic.answer
    puzzle = prompt_of("decimal_arithmetic", min_num_decimal_places=2, max_num_decimal_places=2)
    rewards, metrics = score(
        "reasoning_gym",
        group(
            f" {right}\n",
            f"so <answer>0</answer> or <answer> {right} </answer> it is",
            f"{right}{'0' * len(right)}",
            "no",
            "",
            prompt=arithmetic,
        ),
        group(puzzle.answer, "x", prompt=puzzle),
    )
    assert rewards == [[1.0, 1.0, 0.5, 0.0, 0.0], [1.0, pytest.approx(0.0, abs=0.02)]]
    assert metrics["reward/errors"] == 0


def test_math_verify_compares_values():
    half = Prompt(uid=0, text="", answer="\\frac{1}{2}", tokens=(1,))
    linear = Prompt(uid=0, text="", answer="2x + 3", tokens=(1,))
    rewards, metrics = score(
        "math_verify",
        group("so it is $\\boxed{0.5}$", "1/2", "2/4", "0.51", "", prompt=half),
        group("$\\boxed{3 + 2x}$", "2", "3", prompt=linear),
    )
    assert rewards == [[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert metrics["reward/errors"] == 0


def test_a_users_function(verifiers):
    rewards, metrics = score(f"{verifiers}:length", group("ab", "abcd"), group("a"))
    assert rewards == [[2.05, 4.05], [1.05]]
    assert metrics == {"reward/errors": 0.0, "reward/timeouts": 0.0}
    assert score(f"{verifiers}:Holder.length", group("a"))[0] == [[1.05]]


NUMBERS = {
    **dict.fromkeys(("float32", "0-d", "Decimal", "Fraction", "text", "score", "list"), 0.5),
    "bool": 1.0,
    "list of dict": 1.0,
    "int": 1e20,
}
NO_NUMBERS = {
    "nothing": "got NoneType",
    "words": "got str",
    "two": "got list",
    "array": "got ndarray",
    "other dict": "got dict",
    "empty dict": "got dict",
    "complex": "got complex",
    "inf": "expected a finite number, got inf",
    "huge": "expected a finite number, got inf",
    "numberless": "got Numberless",
    "signalling": "got Decimal",
}


def test_whatever_float_takes_is_a_number(verifiers):
    asked = group(*NUMBERS, *NO_NUMBERS)
    (rewards,), metrics = score(f"{verifiers}:given", asked)
    assert dict(zip([*NUMBERS, *NO_NUMBERS], rewards, strict=True)) == {
        **NUMBERS,
        **dict.fromkeys(NO_NUMBERS),
    }
    assert metrics["reward/errors"] == len(NO_NUMBERS)
    problems = [s.problem for s in asked.samples]
    assert problems[: len(NUMBERS)] == [""] * len(NUMBERS)
    for said, problem in zip(NO_NUMBERS.values(), problems[len(NUMBERS) :], strict=True):
        assert said in problem
        assert problem.startswith(f"reward.function {verifiers}:given, problem 3 (sums): expected")


ROW = {"data_source": "gsm8k", "extra_info": {"index": 3}, "level": 4}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("compute_score", [1.0, 0.0]),
        ("few", [0.5, 0.0]),
        ("trl", [1.0, 0.0]),
        ("trl_accuracy", [1.0, 0.0]),
        ("trl_async", [0.75, 0.75]),
        ("callable_object", [0.25, 0.25]),
    ],
)
def test_signatures_of_others(verifiers, function, expected):
    prompt = Prompt(uid=3, text="1 + 1", answer="2", tokens=(1,), task="sums", entry=ROW)
    asked = group("2", "3", prompt=prompt)
    assert score(f"{verifiers}:{function}", asked)[0] == [expected], asked.samples[0].problem


def test_coroutines_are_awaited_in_one_loop(verifiers):
    ((first, second, failed),), metrics = score(f"{verifiers}:awaited", group("", "", "raise"))
    assert first == second > 0
    assert (failed, metrics["reward/errors"]) == (None, 1)


def test_a_function_that_forks_answers_once(verifiers):
    ((first, second),), metrics = score(f"{verifiers}:forks", group("", ""))
    assert first == second
    assert metrics["reward/errors"] == 0


def test_errors_are_a_short_line(verifiers, caplog):
    asked = group("long", "unprintable")
    score(f"{verifiers}:long_error", asked)
    long, short = (s.problem for s in asked.samples)
    assert "ValueError: ?[2J? first second xxx" in long
    assert len(long) < 400
    assert short.endswith(": Unprintable")
    assert all(c.isprintable() for message in caplog.messages for c in message)


def test_memory_has_a_limit(verifiers):
    """What lies between is more than a worker gets and less than this machine could promise."""
    asked = group("6", "15", "6")
    rewards, _ = score(f"{verifiers}:greedy", asked)
    assert rewards == [[1e6, None, 1e6]]
    assert "MemoryError" in asked.samples[1].problem
    too_much = MEMORY // 10**9 + 1
    assert score(f"{verifiers}:gigabytes", group(str(too_much)))[0] == [[None]]


@pytest.mark.parametrize("how", ["return", "hang", "exit"])
def test_what_a_worker_has_started_ends_with_it(verifiers, tmp_path, how):
    """Children, also in sessions of their own, and orphans; however the worker ends."""
    told = tmp_path / "pids"
    with Scorer(RewardConfig(function=f"{verifiers}:leaves_children", timeout_s=60.0)) as scorer:
        asked = group(f"{how} {told}")
        if how == "hang":
            scorer._workers[0]._connection.send((asked.prompt, asked.samples[0].text))
            while not told.exists():
                time.sleep(0.02)
        else:
            scored(scorer, [asked])
        pids = [int(pid) for pid in told.read_text().split()]
        assert len(pids) == 3
        assert [alive(pid) for pid in pids] == [how != "exit"] * 3
        assert asked.samples[0].scored == (how != "exit")
    assert not any(map(alive, pids))


@pytest.mark.parametrize("groups", [1, 3])
def test_several_workers_score_at_once(verifiers, tmp_path, groups):
    """Each response waits until three are being scored, of one group or of three."""
    texts = [f"{tmp_path / 'met'} {number} 3" for number in range(3)]
    (tmp_path / "met").mkdir()
    made = [group(*texts)] if groups == 1 else [group(text) for text in texts]
    rewards, _ = score(f"{verifiers}:meets", *made, num_workers=3, timeout_s=100.0)
    assert [r for each in rewards for r in each] == [1.0] * 3


def test_a_problem_is_tried_before_it_is_trained_on(verifiers):
    prompt = Prompt(uid=3, text="1 + 1", answer="raise", tokens=(1,), task="sums")
    with Scorer(RewardConfig(function=f"{verifiers}:naughty")) as scorer:
        with pytest.raises(UserError) as caught:
            scorer.try_on(prompt)
        scorer.try_on(dataclasses.replace(prompt, answer="2"))
    assert "problem 3 (sums): KeyError" in str(caught.value)
    assert "here 'raise'" in str(caught.value)


def test_whatever_a_function_does_the_rest_is_scored(verifiers, caplog):
    texts = ["raise", "exit", "die", "text", "none", "nan", "loop", "C loop", "raise", "swallow"]
    mixed = [text for pair in zip(texts, ["fine"] * len(texts), strict=True) for text in pair]
    rewards, metrics = score(f"{verifiers}:naughty", group(*mixed), group("fine"), timeout_s=2.0)
    assert rewards == [[None, 1.0] * len(texts), [1.0]]
    assert metrics == {"reward/errors": 7.0, "reward/timeouts": 3.0}
    assert len([m for m in caplog.messages if "KeyError: 'no" in m]) == 1
    assert len([m for m in caplog.messages if "longer than reward.timeout_s" in m]) == 1
    assert len([m for m in caplog.messages if "exit status 3" in m]) == 1
    assert len(caplog.messages) == 7
    assert all("problem 3 (sums)" in m and "\n" not in m for m in caplog.messages)


def test_several_workers_score_as_one_does(verifiers):
    texts = [["raise", "fine"], ["fine", "die", "fine"], ["loop"], ["fine"], ["text", "nan"], []]
    one, several = (
        score(
            f"{verifiers}:naughty",
            *(group(*g) for g in texts),
            timeout_s=2.0,
            num_workers=number,
        )
        for number in (1, 3)
    )
    assert several == one
    assert one[0] == [[None, 1.0], [1.0, None, 1.0], [None], [1.0], [None, None], []]


def test_a_response_that_hangs_holds_up_its_worker_alone(verifiers, tmp_path):
    """Two wait for what the last response makes: a third worker must come to it meanwhile."""
    config = RewardConfig(function=f"{verifiers}:naughty", timeout_s=60.0, num_workers=3)
    made = tmp_path / "made"
    with Scorer(config) as scorer:
        waiting = [group(f"wait for {made}"), group(f"wait for {made}")]
        metrics = scored(scorer, [*waiting, *[group("fine")] * 20, group(f"make {made}")])
        assert len(scorer._workers) == 3
        assert metrics.values()["reward/timeouts"] == 0
        assert all(sample.reward == 1 for waits in waiting for sample in waits.samples)
        pids = [worker._process.pid for worker in scorer._workers]
    assert not any(map(alive, pids))


def test_time_is_measured_for_each_response(verifiers):
    begin = time.monotonic()
    rewards, metrics = score(f"{verifiers}:naughty", group("power", "fine"), timeout_s=2.0)
    assert rewards == [[None, 1.0]]
    assert metrics["reward/timeouts"] == 1
    assert time.monotonic() - begin > 2.0


def test_no_process_is_left_behind(verifiers):
    scorer = Scorer(RewardConfig(function=f"{verifiers}:worker", timeout_s=5.0))
    asked = group("", "")
    scored(scorer, [asked])
    pid = int(asked.samples[0].reward)
    assert asked.samples[1].reward == pid != os.getpid()
    assert alive(pid)
    scorer.close()
    assert not alive(pid)
    scorer.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        scored(scorer, [asked])


def test_the_worker_ends_with_a_parent_that_is_killed(verifiers, tmp_path):
    program = (
        "import os, signal\n"
        "from sapo_megatron.recipe.schema import RewardConfig\n"
        "from sapo_megatron.rollout.reward import Scorer\n"
        f"scorer = Scorer(RewardConfig(function='{verifiers}:length'))\n"
        "print(scorer._workers[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    import sys

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 60.0
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("no_such_module_at_all:f", ["cannot import 'no_such_module_at_all'", "ModuleNotFound"]),
        ("{}:lenght", ["no 'lenght'", "nearest is length"]),
        ("{}:Holder.missing", ["no 'Holder.missing'"]),
        ("{}:Holder.not_callable", ["expected a function, got int"]),
        ("broken_of_the_user:f", ["cannot import 'broken_of_the_user'", "SyntaxError"]),
        ("leaves_of_the_user:f", ["ended", "exit status 4"]),
        ("forks_of_the_user:f", ["forks when it is imported"]),
        ("pool_of_the_user:f", ["forks when it is imported"]),
        ("daemon_of_the_user:f", ["ended", "exit status 0"]),
        ("hungry_of_the_user:f", ["cannot import", "MemoryError"]),
        ("{}:too_many", ["function(prompt, response), or as in verl", "(args, sample, more)"]),
    ],
)
def test_a_function_that_cannot_be_had(verifiers, tmp_path, function, parts):
    (tmp_path / "broken_of_the_user.py").write_text("def f(:")
    (tmp_path / "leaves_of_the_user.py").write_text("import os; os._exit(4)")
    (tmp_path / "forks_of_the_user.py").write_text("import os; os.fork()\ndef f(a, b): ...")
    pool = "import multiprocessing as m\npool = m.get_context('fork').Pool(2)\ndef f(a, b): ..."
    (tmp_path / "pool_of_the_user.py").write_text(pool)
    (tmp_path / "daemon_of_the_user.py").write_text("import os\nif os.fork(): os._exit(0)")
    (tmp_path / "hungry_of_the_user.py").write_text("x = bytearray(10 ** 15)")
    with pytest.raises(UserError) as caught:
        Scorer(RewardConfig(function=function.format(verifiers)))
    assert all(part in str(caught.value) for part in ["reward.function", *parts]), caught.value
    assert "\n" not in str(caught.value)
