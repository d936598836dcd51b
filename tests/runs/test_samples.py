"""The samples of a run: what is written, and what is read of it."""

import json

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.runs.samples import LONGEST, excerpt, places_of, read_groups
from sapo_megatron.runs.trackers import SamplesTracker
from tests.support.shown import HOSTILE, shown


def written(folder, *groups, **options):
    tracker = SamplesTracker(folder, **options)
    for step in sorted({group.step for group in groups}):
        tracker.show(step, [group for group in groups if group.step == step])
    return folder / "samples.jsonl"


def test_what_is_written_is_read(tmp_path):
    groups = [shown(1, "best", ("\u4e2d\n", 1.0), (HOSTILE, 0.0)), shown(1, "worst", ("b", 0.0))]
    groups += [shown(12, "random", ("", 0.25), prompt=HOSTILE)]
    path = written(tmp_path, *groups)
    assert path.read_bytes().isascii()
    assert len(path.read_text().splitlines()) == 3, "no text breaks a line"
    places = places_of(path)
    assert sorted(places) == [1, 12]
    assert read_groups(path, places[1]) == groups[:2]
    assert read_groups(path, places[12]) == groups[2:]
    assert groups[0].reward == 0.5


def test_the_line_of_a_group(tmp_path):
    line = written(tmp_path, shown(3, "best", ("4", 0.0))).read_text()
    assert json.loads(line) == {
        "step": 3,
        "picked": "best",
        "prompt": "Calculate 1 + 2.",
        "answer": "3",
        "task": "sums",
        "responses": [
            {
                "text": "4",
                "reward": 0.0,
                "advantage": 0.5,
                "tokens": 3,
                "truncated": False,
                "stop_token": "</s>",
                "staleness_mean": 0.0,
                "staleness_max": 0,
            }
        ],
    }


def test_a_resumed_run_has_every_group_once(tmp_path, caplog):
    steps = [shown(step, why, ("x", 1.0)) for step in range(1, 6) for why in ("best", "worst")]
    path = written(tmp_path, *steps)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole[:70])  # a process that was killed
    assert written(tmp_path, *steps[6:], resume_step=4).read_bytes() == whole
    assert "samples.jsonl:11: not a whole line" in caplog.text
    SamplesTracker(tmp_path)
    assert path.read_bytes() == b"", "another run, in a folder that had samples only"


def test_without_samples_there_is_no_file(tmp_path):
    SamplesTracker(tmp_path).close(failed=False)
    assert list(tmp_path.iterdir()) == []
    assert places_of(tmp_path / "samples.jsonl") == {}


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = written(tmp_path, shown(1, "best", ("x", 1.0)), shown(2, "best", ("y", 1.0)))
    path.write_bytes(path.read_bytes()[:-1])
    assert list(places_of(path)) == [1]


@pytest.mark.parametrize("line", ["[1]", "null", '{"picked": "best", "step": 1}', "", "\x1b[2J"])
def test_a_line_that_is_none_is_named(tmp_path, line):
    path = written(tmp_path, shown(1, "best", ("x", 1.0)))
    path.write_text(f"{path.read_text()}{line}\n{path.read_text()}")
    with pytest.raises(UserError, match=r"samples\.jsonl:2: expected a JSON object") as caught:
        places_of(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-1],
        lambda line: line.replace('"reward": 1.0', '"reward": "1"'),
        lambda line: line.replace('"answer": "3", ', ""),
        lambda line: line.replace('"best"', '"last"'),
        lambda line: json.dumps({**json.loads(line), "responses": []}),
    ],
)
def test_a_damaged_group_is_told(tmp_path, damage):
    path = written(tmp_path, shown(1, "best", ("x", 1.0)))
    path.write_text(damage(path.read_text().strip()) + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl: expected groups .* at byte 0 .*remove"):
        read_groups(path, places_of(path)[1])


def test_an_excerpt_has_both_ends():
    assert excerpt("x" * LONGEST) == "x" * LONGEST
    text = "begin" + "x" * LONGEST + "end"
    cut = excerpt(text)
    first, note, last = cut.split("\n")
    assert first.startswith("begin")
    assert last.endswith("end")
    assert len(first) == len(last) == LONGEST // 2
    assert note == "[... 8 characters left out, samples.jsonl has them ...]"
