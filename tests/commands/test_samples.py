"""``sapo-megatron samples``: what is printed, also of what would steer a terminal."""

import pytest

from sapo_megatron.commands.samples import readable, show_samples
from sapo_megatron.errors import UserError
from sapo_megatron.runs.samples import LONGEST
from sapo_megatron.runs.trackers import SamplesTracker
from tests.support.shown import HOSTILE, SEEN, shown


@pytest.fixture
def run(tmp_path):
    """Steps 1 to 3 and 7, of two groups each."""
    tracker = SamplesTracker(tmp_path)
    for step in (1, 2, 3, 7):
        best = shown(step, "best", ("3", 1.0), ("2\n+1", 0.5))
        tracker.show(step, [best, shown(step, "worst", (f"none {step}", 0.25))])
    return tmp_path


def test_the_last_step_is_shown(run):
    assert (
        show_samples(run, None, worst=False)
        == f"""step 7 of {run / "samples.jsonl"}

best group of the step: 2 responses, mean reward 0.75, task 'sums'
prompt
    Calculate 1 + 2.
answer
    3
response 1: reward 1, advantage +0.5, 3 tokens, ended by '</s>', staleness 0
    3
response 2: reward 0.5, advantage +0.5, 3 tokens, ended by '</s>', staleness 0
    2
    +1

worst group of the step: 1 responses, mean reward 0.25, task 'sums'
prompt
    Calculate 1 + 2.
answer
    3
response 1: reward 0.25, advantage +0.5, 3 tokens, ended by '</s>', staleness 0
    none 7
"""
    )


def test_the_worst_of_a_step(run):
    text = show_samples(run, 2, worst=True)
    assert "none 2" in text
    assert "best" not in text
    SamplesTracker(run, resume_step=8).show(8, [shown(8, "random", ("any", 1.0))])
    assert "random group: 1 responses" in show_samples(run, None, worst=True)


def test_what_there_is_not_is_told(run, tmp_path):
    with pytest.raises(UserError, match=r"^--step: .*samples\.jsonl has, 1 to 3, 7, got 5$"):
        show_samples(run, 5, worst=False)
    with pytest.raises(UserError, match=r"^samples: expected a run folder, got .*/none: no such"):
        show_samples(tmp_path / "none", None, worst=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"samples\.jsonl: .* got none; .*samples_per_step above 0"):
        show_samples(tmp_path / "empty", None, worst=False)


def test_nothing_steers_the_terminal_or_looks_like_a_headline(tmp_path):
    claim = "fine\nbest group of the step: 9 responses, mean reward 1"
    hostile = {"prompt": HOSTILE, "answer": claim, "task": f"{HOSTILE}\n"}
    group = shown(1, "worst", (HOSTILE, 0.0), (claim, 0.0), **hostile)
    responses = tuple(
        response.model_copy(update={"stop_token": f"\x1b[2J\n{claim}", "staleness_max": 2})
        for response in group.responses
    )
    SamplesTracker(tmp_path).show(1, [group.model_copy(update={"responses": responses})])
    text = show_samples(tmp_path, None, worst=False)
    assert all(c.isprintable() or c == "\n" for c in text)
    heads = [line.split()[0] for line in text.splitlines()[2:] if line and line[0] != " "]
    assert heads == ["worst", "prompt", "answer", "response", "response"]
    assert r"ended by '\x1b[2J\nfine\nbest group" in text
    assert text.count("staleness 0 (at most 2)") == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\n\u4e2d \U0001f600 \xe9", "a\tb\n\u4e2d \U0001f600 \xe9"),
        (HOSTILE, SEEN),
        ("\u2028\x7f\ud800\U000e0041", r"\u2028\x7f\ud800\U000e0041"),
        ("\x1b" * LONGEST * 2, None),
    ],
)
def test_what_is_no_sign_is_escaped(text, expected):
    if expected is None:
        assert "4,000 characters left out" in readable(text)
        assert len(readable(text)) < 4 * LONGEST + 100
    else:
        assert readable(text) == expected
