"""Which samples an evaluation asks for, and what it makes of their rewards."""

import math
from types import SimpleNamespace

import pytest

from sapo_megatron.errors import RunFailed
from sapo_megatron.metrics import Metrics, Spans
from sapo_megatron.recipe.load import load
from sapo_megatron.sample import Group, Prompt, Sample
from sapo_megatron.training.evaluate import evaluate
from sapo_megatron.training.session import Session
from tests.support.tiny import write_recipe

PROBLEMS = [Prompt(uid=i, text="", answer="", tokens=(5,)) for i in range(3)]
NONE = math.nan
SCORES = {4: [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0.5]], 1: [[1], [0], [1]]}


class Scored:
    """A collector whose responses have the rewards above, by how many there are a problem."""

    stop_ids = (1, 7)

    def __init__(self, given=SCORES):
        self.asked = []
        self.given = given

    def respond(self, prompts, num_generations, params, *, version):
        assert prompts == PROBLEMS
        self.asked.append((num_generations, params))
        scores = self.given[num_generations]
        groups = [group(*pair) for pair in zip(prompts, scores, strict=True)]
        return SimpleNamespace(groups=groups, problem="it broke")


def group(prompt, rewards):
    def sample(reward):
        tokens = {"prompt_tokens": (5,), "response_tokens": [7], "rollout_logprobs": [0.0]}
        return Sample(uid=0, truncated=False, reward=reward, **tokens)

    return Group(prompt=prompt, samples=[sample(reward) for reward in rewards])


@pytest.fixture
def recipe(tmp_path):
    drawn = {"k": 4, "temperature": 0.6, "top_p": 0.95}
    return load(write_recipe(tmp_path, eval=drawn, train={"seed": 7}))


def test_scores_are_means_over_problems(recipe):
    assert evaluate(Scored(), PROBLEMS, recipe, version=0) == {
        "avg@4": pytest.approx(4.5 / 12),
        "pass@1": pytest.approx(2 / 3),
    }


class Timed(Scored):
    """One whose servers have worked for as many seconds as they were asked requests."""

    def spent(self, name):
        self.spans = [*getattr(self, "spans", []), (name, len(self.asked))]
        metrics = Metrics()
        metrics.add(name, Spans((("server", 0.0, float(len(self.asked))),)))
        return metrics


def test_the_time_it_takes_servers_is_its_own_and_no_rollout_s(recipe):
    """Also where there is no step to have it, before the first one."""
    collector, metrics = Timed(), Metrics()
    inputs = SimpleNamespace(problems=PROBLEMS)
    session = SimpleNamespace(collector=collector, inputs=inputs, recipe=recipe)
    Session.evaluate(session, 0)
    assert collector.spans == [("time/eval", 2)], "once both requests are answered"
    assert Session.evaluate(session, 3, metrics)["pass@1"] == pytest.approx(2 / 3)
    assert metrics.values() == {"time/eval": 4.0}


def test_what_cannot_be_scored_is_in_no_mean_and_told(recipe, caplog):
    lost = {4: [[1, -1, NONE, NONE], [NONE] * 4, [-1, NONE, NONE, NONE]], 1: [[NONE], [1], [1]]}
    assert evaluate(Scored(lost), PROBLEMS, recipe, version=0) == {
        "avg@4": pytest.approx(-1 / 3),
        "pass@1": 1.0,
    }
    assert "9 of 12 responses could not be scored and do not count: it broke" in caplog.text
    with pytest.raises(RunFailed, match="3 of 3 responses could not be scored: it broke"):
        evaluate(Scored(lost | {1: [[NONE]] * 3}), PROBLEMS, recipe, version=0)


def test_k_samples_as_the_recipe_says_and_a_greedy_one(recipe):
    collector = Scored()
    evaluate(collector, PROBLEMS, recipe, version=0)
    (k, drawn), (one, greedy) = collector.asked
    assert (k, drawn.temperature, drawn.top_p) == (4, 0.6, 0.95)
    assert (one, greedy.temperature, greedy.top_p) == (1, 0.0, 1.0)
    for params in (drawn, greedy):
        assert params.max_new_tokens == recipe.rollout.max_response_length
        assert params.stop_ids == (1, 7)


def test_the_noise_is_not_that_of_training_and_the_same_every_time(recipe):
    collector = Scored()
    for _ in range(2):
        evaluate(collector, PROBLEMS, recipe, version=0)
    seeds = {params.seed for _, params in collector.asked}
    assert len(seeds) == 1
    assert recipe.train.seed not in seeds
