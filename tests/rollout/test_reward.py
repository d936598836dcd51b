"""Rewards: right scores, and no verifier that stops the run."""

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pytest
import reasoning_gym

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import RewardConfig
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.sample import Group, Prompt, Sample

VERIFIERS = """
import os, re, time
import numpy as np

def length(prompt, response):
    return len(response) + len(prompt.text) / 100

def numpy_number(prompt, response):
    return np.float32(0.5)

def boolean(prompt, response):
    return response == prompt.answer

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
        return "1.0"
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
        metrics = scorer.score(groups).values()
    return [[s.reward for s in g.samples] for g in groups], metrics


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
    assert rewards == [[0.0]]
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
    assert score(f"{verifiers}:numpy_number", group("a"))[0] == [[0.5]]
    assert score(f"{verifiers}:boolean", group("2", "3"))[0] == [[1.0, 0.0]]


def test_whatever_a_function_does_the_rest_is_scored(verifiers, caplog):
    texts = ["raise", "exit", "die", "text", "none", "nan", "loop", "C loop", "raise", "swallow"]
    mixed = [text for pair in zip(texts, ["fine"] * len(texts), strict=True) for text in pair]
    rewards, metrics = score(f"{verifiers}:naughty", group(*mixed), group("fine"), timeout_s=2.0)
    assert rewards == [[0.0, 1.0] * len(texts), [1.0]]
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
    assert one[0] == [[0.0, 1.0], [1.0, 0.0, 1.0], [0.0], [1.0], [0.0, 0.0], []]


def test_a_response_that_hangs_holds_up_its_worker_alone(verifiers, tmp_path):
    """Two wait for what the last response makes: a third worker must come to it meanwhile."""
    config = RewardConfig(function=f"{verifiers}:naughty", timeout_s=60.0, num_workers=3)
    made = tmp_path / "made"
    with Scorer(config) as scorer:
        waiting = [group(f"wait for {made}"), group(f"wait for {made}")]
        metrics = scorer.score([*waiting, *[group("fine")] * 20, group(f"make {made}")])
        assert len(scorer._workers) == 3
        assert metrics.values()["reward/timeouts"] == 0
        assert all(sample.reward == 1 for waits in waiting for sample in waits.samples)
        pids = [worker._process.pid for worker in scorer._workers]
    assert not any(map(alive, pids))


def test_time_is_measured_for_each_response(verifiers):
    begin = time.monotonic()
    rewards, metrics = score(f"{verifiers}:naughty", group("power", "fine"), timeout_s=2.0)
    assert rewards == [[0.0, 1.0]]
    assert metrics["reward/timeouts"] == 1
    assert time.monotonic() - begin > 2.0


def test_no_process_is_left_behind(verifiers):
    scorer = Scorer(RewardConfig(function=f"{verifiers}:worker", timeout_s=5.0))
    asked = group("", "")
    scorer.score([asked])
    pid = int(asked.samples[0].reward)
    assert asked.samples[1].reward == pid != os.getpid()
    assert alive(pid)
    scorer.close()
    assert not alive(pid)
    scorer.close()
    with pytest.raises(AssertionError):
        scorer.score([asked])


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
    ],
)
def test_a_function_that_cannot_be_had(verifiers, tmp_path, function, parts):
    (tmp_path / "broken_of_the_user.py").write_text("def f(:")
    (tmp_path / "leaves_of_the_user.py").write_text("import os; os._exit(4)")
    with pytest.raises(UserError) as caught:
        Scorer(RewardConfig(function=function.format(verifiers)))
    assert all(part in str(caught.value) for part in ["reward.function", *parts]), caught.value
    assert "\n" not in str(caught.value)
