"""Which samples an evaluation asks for, and what it makes of their rewards."""

from types import SimpleNamespace

import pytest

from sapo_megatron.recipe.load import load
from sapo_megatron.sample import Group, Prompt, Sample
from sapo_megatron.training.evaluate import evaluate
from tests.support.tiny import write_recipe

PROBLEMS = [Prompt(uid=i, text="", answer="", tokens=(5,)) for i in range(3)]
SCORES = {4: [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0.5]], 1: [[1], [0], [1]]}


class Scored:
    """A collector whose responses have the rewards above, by how many there are a problem."""

    stop_ids = (1, 7)

    def __init__(self):
        self.asked = []

    def respond(self, prompts, num_generations, params):
        assert prompts == PROBLEMS
        self.asked.append((num_generations, params))
        scores = SCORES[num_generations]
        return SimpleNamespace(groups=[group(*pair) for pair in zip(prompts, scores, strict=True)])


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
    assert evaluate(Scored(), PROBLEMS, recipe) == {
        "avg@4": pytest.approx(4.5 / 12),
        "pass@1": pytest.approx(2 / 3),
    }


def test_k_samples_as_the_recipe_says_and_a_greedy_one(recipe):
    collector = Scored()
    evaluate(collector, PROBLEMS, recipe)
    (k, drawn), (one, greedy) = collector.asked
    assert (k, drawn.temperature, drawn.top_p) == (4, 0.6, 0.95)
    assert (one, greedy.temperature, greedy.top_p) == (1, 0.0, 1.0)
    for params in (drawn, greedy):
        assert params.max_new_tokens == recipe.rollout.max_response_length
        assert params.stop_ids == (1, 7)


def test_the_noise_is_not_that_of_training_and_the_same_every_time(recipe):
    collector = Scored()
    for _ in range(2):
        evaluate(collector, PROBLEMS, recipe)
    seeds = {params.seed for _, params in collector.asked}
    assert len(seeds) == 1
    assert recipe.train.seed not in seeds
