import json
import math

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.metrics import Mean, Metrics, Spans, now
from sapo_megatron.runs import timeline
from sapo_megatron.runs.timeline import Event, TimelineTracker, idle_shares, read_timeline

SERVER = "http://127.0.0.1:8000 (rank 0)"


def step(began, **stages):
    """Metrics of a step of 10 s with spans ``(where, begin, seconds)``, begins from ``began``."""
    metrics = Metrics()
    metrics.add("perf/step_s", Spans((("rank 0", began, 10.0), ("rank 1", began + 1, 8.0))))
    metrics.add("reward/mean", Mean(1.0, 2.0))
    for stage, spans in stages.items():
        metrics.add(f"time/{stage}", Spans(tuple((w, began + b, s) for w, b, s in spans)))
    return metrics


def test_seconds_are_those_of_where_it_took_most():
    spans = Spans((("rank 0", 5.0, 1.0), ("rank 1", 5.0, 2.0))).merge(
        Spans((("rank 0", 7.0, 1.5), ("rank 1", 7.0, 0.25)))
    )
    assert spans.value() == 2.5
    assert Spans().value() == 0.0


def test_time_is_taken_unless_the_block_fails():
    metrics, began = Metrics(), now()
    with metrics.timed("time/update"):
        pass
    with pytest.raises(ValueError, match="x"), metrics.timed("time/update"):
        raise ValueError("x")
    ((where, at, seconds),) = metrics["time/update"].spans
    assert where == "rank 0"
    assert began <= at <= at + seconds <= now()


def test_what_is_written_is_read(tmp_path):
    tracker = TimelineTracker(tmp_path)
    start = tracker._began
    first = step(start, update=[("rank 0", 2, 3), ("rank 1", 2, 4)], rollout=[(SERVER, 0, 2.5)])
    tracker.log(1, first)
    tracker.log(2, step(start + 10, update=[("rank 1", 1, 1)], sync=[(SERVER, 0, 0.0)]))
    events = read_timeline(tmp_path / "timeline.json")
    assert Event(step=1, stage="rollout", where=SERVER, begin=0.0, seconds=2.5) in events
    assert Event(step=2, stage="update", where="rank 1", begin=11.0, seconds=1.0) in events
    assert {(e.step, e.stage) for e in events} == {
        *((1, stage) for stage in ("step", "update", "rollout")),
        *((2, stage) for stage in ("step", "update")),  # what took no time is no event
    }
    raw = json.loads((tmp_path / "timeline.json").read_text())
    names = {e["args"]["name"] for e in raw if e["name"] == "process_name"}
    assert names == {"ranks", "servers"}
    assert [e["args"]["name"] for e in raw if e["name"] == "thread_name"] == [
        "rank 0",
        "rank 1",
        SERVER,
    ]


def test_the_file_holds_the_last_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "STEPS", 3)
    tracker = TimelineTracker(tmp_path)
    for number in range(1, 6):
        tracker.log(number, step(now()))
    assert {e.step for e in read_timeline(tmp_path / "timeline.json")} == {3, 4, 5}


ROW = '{"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "rank 0"}}'


def event(**changes):
    made = {"name": "update", "ph": "X", "ts": 0, "dur": 1, "pid": 0, "tid": 0, "args": {"step": 1}}
    return f"[{ROW}, {json.dumps(made | changes)}]"


def test_an_event(tmp_path):
    path = tmp_path / "timeline.json"
    path.write_text(event())
    assert len(read_timeline(path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "{}", "[1]", '[{"name": "a", "ph": "X"}]', "null", "[" * 100_000, "\0"),
        *(event(ts=math.inf), event(dur=math.nan), event(dur="1"), event(ts=None)),
        *(event(args={"step": "1"}), event(args={"step": True}), event(args=None), event(tid=1)),
        event(name=3),
    ],
)
def test_a_damaged_file_is_told(tmp_path, text):
    path = tmp_path / "timeline.json"
    path.write_text(text)
    told = r"timeline\.json: expected the events of a run's steps, got .*; remove the file$"
    with pytest.raises(UserError, match=told) as caught:
        read_timeline(path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_its_place_is_told(tmp_path):
    with pytest.raises(UserError, match=r"got IsADirectoryError: .*; remove the file$"):
        read_timeline(tmp_path)


def test_without_a_file_there_are_no_events(tmp_path):
    assert read_timeline(tmp_path / "timeline.json") == []


@pytest.mark.parametrize(
    ("stages", "rollout", "train"),
    [
        ({}, 1.0, 1.0),
        # Two servers, 5 s of 10 and 2 s of 10; two ranks, 2 s and 4 s.
        (
            {
                "rollout": [(SERVER, 0, 5), ("other", 3, 2)],
                "logprob": [("rank 0", 5, 1), ("rank 1", 5, 1)],
                "update": [("rank 0", 6, 1), ("rank 1", 6, 3)],
            },
            0.65,
            0.7,
        ),
        # One did nothing, and what is outside of the step does not count.
        ({"rollout": [(SERVER, -3, 8), (SERVER, 9, 4), ("other", 2, 0)]}, 0.7, 1.0),
    ],
)
def test_idle_shares(stages, rollout, train):
    found = idle_shares(step(100.0, **stages))
    assert found["perf/rollout_idle"] == pytest.approx(rollout)
    assert found["perf/train_idle"] == pytest.approx(train)
