"""Settings that go together do so with rollouts from a vLLM server, too."""

import pytest

from tests.support.gloo import run_ranks
from tests.support.tiny import read_metrics, write_recipe
from tests.support.together import cells, check_trained, chosen, runs
from tests.vllm.conftest import ARCH


def on_servers(folder):
    """The cells that need no routes, which vLLM returns on GPUs only."""
    every = cells(write_recipe(folder))
    return [cell for cell in every if cell["routing.router_replay"] != "R3"]


@pytest.fixture(scope="module", params=["pairs", pytest.param("cells", marks=pytest.mark.slow)])
def done(request, servers, tmp_path_factory):
    """[(cell, its metrics by step)] of runs that have every pair of settings, or are every cell."""
    folder = tmp_path_factory.mktemp("together")
    found = on_servers(folder)
    if request.param == "pairs":
        found = chosen(found)
    rollout = {"engine": "vllm", "servers": list(servers.urls), "server_timeout_s": 200.0}
    # Who has no routes must say so with the engine's log-probs.
    blind = {"routing.observe": "false"}
    asked = [cell | (blind if cell["algorithm.old_policy"] == "rollout" else {}) for cell in found]
    sections = {"rollout": rollout, "arch": ARCH}
    run_ranks(1, of_servers, folder, asked, sections)
    return [(cell, read_metrics(folder / str(number))) for number, cell in enumerate(found)]


def of_servers(folder, asked, sections):
    runs(folder, asked, **sections)


def test_every_pair_of_settings_has_run(done, tmp_path):
    every = on_servers(tmp_path)
    check_trained(every, done)


def test_ratios_begin_where_the_old_policy_says(done):
    for cell, lines in done:
        stale = cell["rollout.async_steps"] == "2"
        if cell["algorithm.old_policy"] == "recompute":
            assert all(line["ratio/min"] == line["ratio/max"] == 1 for line in lines), cell
            assert (lines[1]["rollout_train/logprob_abs_diff"] > 1e-3) == stale, cell
        else:
            assert lines[0]["ratio/log_var"] < 1e-6, cell
            assert (lines[1]["ratio/log_var"] > 1e-5) == stale, cell
