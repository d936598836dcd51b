"""A run whose servers, which others have started, are killed, start again, stall, and are gone."""

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tests.support.lost import PROBES, Run, groups_drawn, groups_trained, two_servers
from tests.support.tiny import read_metrics

pytestmark = pytest.mark.timeout(1800)  # that of a machine that is busy with other things


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What happened to two servers and their run, which was resumed once."""
    folder = tmp_path_factory.mktemp("lost")
    with ThreadPoolExecutor(1) as threads, two_servers(folder) as servers:
        yield told(Run(threads, folder), threads, folder, *servers)


def told(run, threads, folder, one, two):
    found = SimpleNamespace(one=one, two=two, urls=[one.url, two.url])
    run.goes_on(2)
    run.until(one.is_sampling)
    one.signal(signal.SIGKILL)
    found.killed_at = run.steps()
    run.goes_on(3)

    one.start()
    run.until(one.is_sampling)
    found.asked_first = one.asked()
    found.back_at = run.steps()
    run.goes_on(2)

    run.until(two.is_sampling)
    two.signal(signal.SIGSTOP)
    found.stalled_at, before = run.steps(), two.loads()
    run.goes_on(2)
    two.signal(signal.SIGCONT)
    run.until(lambda: two.loads() > before + 1 and two.is_sampling())
    found.awake_at = run.steps()
    run.goes_on(1)

    for server in (one, two):
        server.signal(signal.SIGSTOP)
    found.first = run.end()
    found.steps, found.saved = run.steps(), run.saved()
    for server in (one, two):
        server.signal(signal.SIGCONT)
    again = Run(threads, folder, "--resume", "auto", "rollout.min_servers=2")
    again.goes_on(2)
    one.signal(signal.SIGKILL)
    found.second = again.end()
    found.lines, found.saved_again = read_metrics(run.path), again.saved()
    return found


def test_all_that_was_trained_on_was_sampled_with_the_present_weights(story):
    """By both servers, whatever had happened to them: wrong weights differ by over 1e-3."""
    for line in story.lines:
        assert line["rollout/staleness_max"] == 0
        assert line["rollout_train/logprob_abs_diff"] < 1e-4
        assert line.get("rollout/probe_diff", 0.0) < 1e-4


def test_a_killed_server_costs_its_requests_and_not_the_run(story):
    # It is met in the middle of a request, or in the moment behind its last one.
    assert re.search(f"{story.urls[0]} is (away|left out for now): ", story.first.stderr)
    assert story.killed_at + 3 <= story.back_at


def test_a_server_that_is_back_has_the_weights_before_it_gets_work(story):
    """It is asked what it serves, loads, forgets, and answers the probe; then it works."""
    loaded = story.asked_first.index("reset_prefix_cache")
    # It is asked again where newer weights come meanwhile.
    assert story.asked_first[:loaded].count("collective_rpc") == loaded >= 2
    latest = story.asked_first[::-1].index("reset_prefix_cache")
    assert story.asked_first[-latest:].count("completions") > PROBES
    assert story.back_at < story.stalled_at


def test_a_stalled_server_is_left_out_until_it_answers_again(story):
    assert f"{story.urls[1]} is left out for now: " in story.first.stderr
    assert story.stalled_at + 2 <= story.awake_at


def test_a_run_without_servers_ends_with_a_checkpoint(story):
    assert story.first.returncode == 1
    (line,) = [line for line in story.first.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"min_servers: expected at least 1 .* got 0 of 2", line)
    assert story.first.left == []
    assert story.saved == story.steps


def test_a_resumed_run_ends_below_min_servers(story):
    assert story.second.returncode == 1
    (line,) = [line for line in story.second.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(rf"min_servers: expected at least 2 .* got 1 of 2 \({story.urls[0]}: ", line)
    assert story.second.left == []
    assert story.saved_again == len(story.lines) >= story.saved + 2
    assert [line["step"] for line in story.lines] == list(range(1, story.saved_again + 1))


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """Steps ahead, whose responses go on under new weights: a server is killed, and then the run.

    The server goes in the middle of that.
    """
    folder = tmp_path_factory.mktemp("ahead")
    changes = {
        "rollout": {"async_steps": 2, "on_new_weights": "continue"},
        "train": {"steps": 10_000, "num_mini_batches": 1},
        "checkpoint": {"every": 2, "keep": 2},
        "logging": {"dump_every": 1},
    }
    with ThreadPoolExecutor(1) as threads, two_servers(folder, **changes) as (one, _):
        run, found = Run(threads, folder), SimpleNamespace(url=one.url)
        run.goes_on(3)
        run.until(one.is_interrupted)
        one.signal(signal.SIGKILL)
        found.killed_at = run.steps()
        run.goes_on(3)
        one.start()
        run.until(one.is_sampling)
        run.goes_on(2)
        found.first = run.kill()
        found.steps, found.saved = run.steps(), run.saved()
        again = run.resumed()
        again.goes_on(4)
        found.second = again.stop()
        found.lines, found.run = read_metrics(run.path), run.path
        yield found


def test_a_server_killed_while_its_responses_are_to_go_on_costs_them_and_not_the_run(ahead):
    assert ahead.first.returncode == -signal.SIGKILL
    assert re.search(f"{ahead.url} is (away|left out for now): ", ahead.first.stderr)
    assert ahead.killed_at + 3 <= ahead.steps
    assert sum(line["rollout/continued"] for line in ahead.lines) > 0
    assert all(line["rollout/staleness_max"] <= 2 for line in ahead.lines)


def test_a_killed_run_goes_on_and_no_group_is_lost_or_trained_twice(ahead):
    assert ahead.second.returncode == 0, ahead.second.stderr
    assert ahead.second.left == []
    assert ahead.saved < ahead.steps + 4 <= len(ahead.lines)
    numbers = [line["step"] for line in ahead.lines]
    assert numbers == list(range(1, len(numbers) + 1))
    assert groups_trained(ahead.run, numbers) == groups_drawn(ahead.run, numbers)
