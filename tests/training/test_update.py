"""Advantages of groups from which what could not be scored is left out."""

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.load import load
from sapo_megatron.sample import Group, Prompt, Sample
from sapo_megatron.training.inputs import preflight
from sapo_megatron.training.update import set_advantages
from tests.support.tiny import write_recipe


def group(*rewards):
    def sample(reward):
        tokens = {"prompt_tokens": (5,), "response_tokens": [7], "rollout_logprobs": [0.0]}
        return Sample(uid=0, truncated=False, reward=reward, **tokens)

    prompt = Prompt(uid=0, text="", answer="", tokens=(5,))
    return Group(prompt=prompt, samples=[sample(reward) for reward in rewards])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", [[1 / 2**0.5, -1 / 2**0.5], [-1, 0, 1], [0], [], [0, 0]]),
        ("dr_grpo", [[1, -1], [-1, 0, 1], [0], [], [0, 0]]),
        ("rloo", [[2, -2], [-1.5, 0, 1.5], [0], [], [0, 0]]),
    ],
)
def test_groups_of_several_sizes(estimator, expected):
    groups = [group(1, -1), group(0, 1, 2), group(3), group(), group(5, 5)]
    groups[2].samples[0].advantage = 7.0
    set_advantages(groups, estimator)
    for made, row in zip(groups, expected, strict=True):
        assert [s.advantage for s in made.samples] == pytest.approx(row)


def test_the_reward_function_is_tried_on_a_row_before_a_run(tmp_path):
    recipe = write_recipe(tmp_path, reward={"function": "tests.support.tiny:breaks"})
    with pytest.raises(UserError) as caught:
        preflight(load(recipe), 1)
    assert "tests.support.tiny:breaks, problem " in str(caught.value)
    assert "RuntimeError: the judge is down; expected a number for" in str(caught.value)
