"""Runs that go on with another recipe, from another place, or from weights that are ruined."""

import pytest

from tests.support.gloo import run_ranks
from tests.support.resumed_runs import everything


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(1, everything, tmp_path_factory.mktemp("resumed"))[0]


def test_what_has_changed_takes_effect_or_is_said_to_be_kept(found):
    told, (now, before) = found["changed"]["told"], found["changed"]["recipes"]
    assert told == [
        "changed: reward.num_workers: 1 -> 2",
        "changed: optimizer.lr: 0.01 -> 1e-05",
        "changed: train.steps: 2 -> 3",
        f"changed: train.run_dir: {now['train']['run_dir']} is kept, not None (the run stays in "
        "its folder)",
        "changed: cold_start.steps: 1 is kept, not 7 (it is over)",
        "changed: checkpoint.every: 1 -> 0",
        "changed: checkpoint.keep: 9 -> 2",
    ]
    assert now["train"]["run_dir"].endswith("/changed")
    assert found["changed"]["lr"] == pytest.approx([1e-2, 1e-2, 1e-5])
    assert (now["optimizer"]["lr"], now["train"]["steps"], now["cold_start"]["steps"]) == (
        1e-5,
        3,
        1,
    )
    assert (before["optimizer"]["lr"], before["train"]["steps"]) == (1e-2, 2)


def test_other_problems_are_refused_unless_they_are_asked_for(found):
    data = found["data"]
    assert data["refused"].startswith("data.train: expected the problems that ")
    assert "--new-data" in data["refused"]
    assert data["untouched"] == ["config.yaml"]
    assert data["went on"] >= data["place"] + 4


def test_a_run_is_found_wherever_it_is_with_what_it_needs(found):
    moved = found["moved"]
    assert moved["steps"] == [1, 2, 3]
    assert moved["run_dir"].endswith("/deep/er/run")
    assert ".safetensors" in moved["exported"]
    assert "expected a checkpoint of a run" in moved["apart"]


def test_weights_that_are_not_finite_are_not_kept(found):
    weights = found["weights"]
    assert (
        "step-000003: not written, as the weights have become NaN or infinite (output_layer"
        in (weights["saved"])
    )
    assert weights["left"] == ["step-000001", "step-000002"]
    for name in ("infinite", "too large"):
        assert "cold start: expected finite log-probs" in weights[name]
        assert weights[f"{name} left"] == [], name


def test_updates_that_are_skipped_in_a_row_end_the_run(found):
    message = found["skipped"]["ended"]
    assert message.startswith("step 2, mini-batch 2 of 2: ")
    assert "as in the 3 updates before" in message
