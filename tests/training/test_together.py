"""Settings that go together do so in whole runs, and the docs have the table of those."""

from typing import get_args

import pytest

from sapo_megatron.recipe.schema import LossType
from tests.support.gloo import run_ranks
from tests.support.tiny import ROOT, read_metrics, write_recipe
from tests.support.together import cells, check_trained, chosen, runs, table


@pytest.fixture(scope="module", params=["pairs", pytest.param("cells", marks=pytest.mark.slow)])
def done(request, tmp_path_factory):
    """[(cell, its metrics by step)] of runs that have every pair of settings, or are every cell."""
    folder = tmp_path_factory.mktemp("together")
    found = cells(write_recipe(folder))
    if request.param == "pairs":
        found = chosen(found)
    run_ranks(1, runs, folder, found)
    return [(cell, read_metrics(folder / str(number))) for number, cell in enumerate(found)]


def of(done, **settings):
    found = [
        (cell, lines)
        for cell, lines in done
        if all(cell[key.replace("__", ".")] == value for key, value in settings.items())
    ]
    assert found
    return found


def test_every_pair_of_settings_that_is_not_refused_has_run(done, tmp_path):
    every = cells(write_recipe(tmp_path))
    # K, and replay, correction and loss, but not both of two corrections and vespo.
    losses = len(get_args(LossType))
    assert len(every) == 2 * (3 * (4 * losses - 2) + 2 * losses)
    check_trained(every, done)


def test_recomputed_ratios_start_at_one_however_old_the_responses_are(done):
    for cell, lines in of(done, algorithm__old_policy="recompute"):
        for line in lines:
            assert line["ratio/min"] == line["ratio/max"] == 1, cell
            assert line["routing/slot_flip"] == 0, cell
        assert lines[0]["rollout_train/logprob_abs_diff"] < 1e-5
        stale = cell["rollout.async_steps"] == "2"
        assert (lines[1]["rollout_train/logprob_abs_diff"] > 1e-3) == stale, cell


def test_ratios_to_the_engine_that_sampled_see_how_old_the_responses_are(done):
    for cell, lines in of(done, algorithm__old_policy="rollout"):
        stale = cell["rollout.async_steps"] == "2"
        assert lines[0]["ratio/log_var"] < 1e-9
        assert (lines[1]["ratio/log_var"] > 1e-5) == stale, cell
        assert not [name for line in lines for name in line if name.startswith("rollout_train/")]
        assert (lines[1]["routing/slot_flip"] > 0) == stale, cell
        # The split is of the very ratio that the loss sees: at the rollout's experts under R3.
        seen = "weights" if cell["routing.router_replay"] == "R3" else "total"
        found, ratio = lines[1][f"variance/{seen}"], lines[1]["ratio/log_var"]
        assert found == pytest.approx(ratio, rel=1e-3, abs=1e-9), cell


def test_the_docs_have_the_table(tmp_path):
    assert table(write_recipe(tmp_path)) in (ROOT / "docs" / "rollout.md").read_text(), (
        "put what tests.support.together.table returns there"
    )
