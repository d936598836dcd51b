"""The writers of a run's metrics, against the real clients where there is one."""

import json
import logging
import math
import resource
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from sapo_megatron.errors import RunFailed
from sapo_megatron.metrics import Histogram, Mean, Metrics, Points, Sum
from sapo_megatron.recipe.schema import LoggingConfig
from sapo_megatron.runs import trackers
from sapo_megatron.runs.samples import LONGEST
from sapo_megatron.runs.trackers import Progress, RunTrackers, duration
from tests.support.shown import HOSTILE, shown


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trackers, "WANDB_REACH_S", 1.0)


def _metrics(value: float) -> Metrics:
    metrics = Metrics()
    metrics.add("reward/mean", Mean(value, 1.0))
    metrics.add("reward/std", Mean(math.nan, 1.0))
    edges = (0.0, 0.5, 1.0, 1.5)
    metrics.add("ratio/hist_pos", Histogram.of(torch.tensor([0.1, 0.7, 0.8, 9.0]), edges))
    bounds = torch.tensor([1 / 3, 0.25]), torch.tensor([1e-9, math.inf])
    metrics.add("sapo/bound_points", Points.of(*bounds))
    return metrics


def _log(run_dir: Path, steps: range, *, resume_step: int | None = None, **config: bool) -> None:
    logging_config = LoggingConfig(**config)
    with RunTrackers(run_dir, logging_config, {"a": 1}, resume_step=resume_step) as t:
        for step in steps:
            t.log(step, _metrics(step / 10))


def _lines(run_dir: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"not JSON: {constant}")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_jsonl_holds_valid_json_with_null_for_nan_and_six_digits(tmp_path):
    _log(tmp_path, range(1, 3))
    assert _lines(tmp_path)[1] == {
        "step": 2,
        "reward/mean": 0.2,
        "reward/std": None,
        "ratio/hist_pos": {"hist": {"edges": [0.0, 0.5, 1.0, 1.5], "counts": [1, 2, 1]}},
        "sapo/bound_points": {"points": [[0.333333, 1e-9]]},
    }


def test_jsonl_is_whole_after_every_step(tmp_path):
    with RunTrackers(tmp_path, LoggingConfig(), {}) as t:
        t.log(1, _metrics(0.5))
        assert len(_lines(tmp_path)) == 1


def test_resume_drops_what_will_be_logged_again_and_a_line_cut_off(tmp_path, caplog):
    _log(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rewa')
    _log(tmp_path, range(4, 7), resume_step=4)
    assert [r["step"] for r in _lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "metrics.jsonl:6" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "timeline.json"]


def test_a_line_that_does_not_fit_ends_the_run_and_leaves_no_part_of_it(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunTrackers(tmp_path, LoggingConfig(), {}) as t:
        t.log(1, _metrics(0.5))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
        try:
            with pytest.raises(RunFailed, match=r"metrics.jsonl: the line of step 2 could not be"):
                t.log(2, _metrics(0.5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_samples_that_do_not_fit_are_left_out_and_the_run_goes_on(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunTrackers(tmp_path, LoggingConfig(), {}) as t:
        t.show(1, [shown(1, "best", ("x", 1.0))])
        before = (tmp_path / "samples.jsonl").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            for step in (1, 2, 3):
                t.show(step, [shown(step, "best", ("x" * 5000, 1.0))])
                t.log(step, _metrics(0.5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert len(_lines(tmp_path)) == 3
    assert (tmp_path / "timeline.json").exists()
    assert caplog.text.count("samples failed at step 1 and is dropped: OSError: [Errno 28]") == 1


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    _log(tmp_path, range(1, 6))
    _log(tmp_path, range(1, 3))
    assert [r["step"] for r in _lines(tmp_path)] == [1, 2]


def test_tensorboard_reads_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _log(tmp_path, range(1, 4), tensorboard=True)
    _log(tmp_path, range(3, 5), tensorboard=True, resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("reward/mean")
    assert [e.step for e in scalars] == [1, 2, 3, 4]
    assert scalars[-1].value == pytest.approx(0.4)
    histogram = events.Histograms("ratio/hist_pos")[-1].histogram_value
    assert histogram.num == 4
    assert list(histogram.bucket) == [1, 2, 1]


def test_wandb_without_a_key_writes_an_offline_run(tmp_path):
    _log(tmp_path, range(1, 4), wandb=True)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    (record,) = run.glob("*.wandb")
    assert record.name == f"run-{run_id}.wandb"
    # W&B's service flushes the file a moment after finish() has returned.
    deadline = time.monotonic() + 60
    logged = (b"reward/mean", b"ratio/hist_pos", b"sapo/bound_points")
    while not all(name in record.read_bytes() for name in logged):
        assert time.monotonic() < deadline, "the offline run does not hold the metrics"
        time.sleep(0.05)


def test_wandb_has_a_table_of_samples(tmp_path):
    with RunTrackers(tmp_path, LoggingConfig(wandb=True), {}) as t:
        for step in (1, 2):
            texts = [(HOSTILE, 1.0), ("x" * (LONGEST + 1), 0.0)]
            t.show(step, [shown(step, "best", *texts), shown(step, "worst", ("", 0.0))])
            t.log(step, _metrics(0.5))
    tables = (tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_*.json")
    first, second = sorted(json.loads(path.read_text())["data"] for path in tables)
    assert first == second
    (best, cut, worst) = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in first]
    assert best["text"] == HOSTILE
    assert "1 characters left out" in cut["text"]
    assert (worst["picked"], worst["text"], worst["reward"]) == ("worst", "", 0.0)
    assert best["prompt"] == "Calculate 1 + 2."


SAMPLE_COLUMNS = (
    *("picked", "prompt", "answer", "text", "reward", "advantage", "tokens"),
    *("truncated", "stop_token", "staleness_mean", "staleness_max"),
)


def test_wandb_with_a_key_but_no_server_goes_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    _log(tmp_path, range(1, 2), wandb=True)
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert "W&B goes offline: no answer from http://127.0.0.1:9" in caplog.text


def _fake_wandb(monkeypatch, run: object) -> None:
    def init(**arguments: object) -> object:
        if isinstance(run, Exception):
            raise run
        return run

    fake = types.SimpleNamespace(
        init=init,
        Settings=dict,
        Histogram=dict,
        Table=dict,
        plot=types.SimpleNamespace(scatter=lambda *_, **__: None),
        teardown=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)


def test_a_wandb_client_that_fails_at_start_is_left_out(tmp_path, monkeypatch, caplog):
    _fake_wandb(monkeypatch, RuntimeError("no service\nsecond line"))
    _log(tmp_path, range(1, 4), wandb=True)
    assert len(_lines(tmp_path)) == 3
    assert caplog.text.count("W&B did not start") == 1
    assert "RuntimeError: no service second line" in caplog.text


def test_a_wandb_client_that_fails_later_is_dropped_and_logged_once(tmp_path, monkeypatch, caplog):
    calls = []

    class Run:
        dir = str(tmp_path / "files")

        def log(self, record: dict, step: int) -> None:
            calls.append(step)
            if step == 2:
                raise ConnectionError("gone")

        def finish(self, exit_code: int) -> None:
            calls.append("finish")

    _fake_wandb(monkeypatch, Run())
    _log(tmp_path, range(1, 5), wandb=True)
    assert calls == [1, 2]
    assert len(_lines(tmp_path)) == 4
    assert caplog.text.count("gone") == 1


def test_a_failed_run_is_marked_failed_and_its_error_passes(tmp_path, monkeypatch):
    codes = []
    run = types.SimpleNamespace(dir=str(tmp_path), finish=lambda exit_code: codes.append(exit_code))
    _fake_wandb(monkeypatch, run)
    with (
        pytest.raises(ZeroDivisionError),
        RunTrackers(tmp_path, LoggingConfig(wandb=True), {}),
    ):
        raise ZeroDivisionError
    assert codes == [1]


def test_wandb_keeps_its_id_on_resume(tmp_path):
    path = tmp_path / "wandb" / "run_id"
    first = trackers._wandb_id(path, resuming=False)
    assert trackers._wandb_id(path, resuming=True) == first
    assert trackers._wandb_id(path, resuming=False) != first


def test_progress_tells_the_time_left_by_the_median_step(caplog):
    # Steps of 60 s (the first), 2, 2, 50 (an evaluation) and 2 seconds.
    clock = iter([0.0, 60.0, 62.0, 64.0, 114.0, 116.0])
    progress = Progress(100, clock=lambda: next(clock))
    with caplog.at_level(logging.INFO):
        for step in range(1, 6):
            progress.log(step, _metrics(0.25))
    assert len(caplog.messages) == 5
    assert caplog.messages[-1] == "step   5/100 | reward 0.250 | left 3m10s"


@pytest.mark.parametrize(
    ("errors", "timeouts", "shown"),
    [(0, 0, None), (2, 0, "reward errors 2"), (0, 1, "reward errors 1"), (3, 1, "reward errors 4")],
)
def test_progress_shows_what_could_not_be_scored(caplog, errors, timeouts, shown):
    metrics = _metrics(0.25)
    metrics.add("reward/groups_left", Sum(2.0))
    metrics.add("reward/errors", Sum(float(errors)))
    metrics.add("reward/timeouts", Sum(float(timeouts)))
    with caplog.at_level(logging.INFO):
        Progress(1, clock=lambda: 0.0).log(1, metrics)
    _, reward, groups, *trouble, _ = caplog.messages[-1].split(" | ")
    assert (reward, groups, trouble) == ("reward 0.250", "groups 2", [shown] if shown else [])


def test_durations():
    assert [duration(s) for s in (0, 59.4, 192, 7500, 273600)] == [
        "0s",
        "59s",
        "3m12s",
        "2h05m",
        "3d04h",
    ]
