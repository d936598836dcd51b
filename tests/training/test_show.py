"""Which groups of a step are shown, and what is said of them."""

import random

import pytest
import torch

from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.sample import Group, Prompt, Sample
from sapo_megatron.training.show import shown_groups
from tests.support.tiny import TOKENIZER

TINY = load_tokenizer(str(TOKENIZER), 104)


def group(number, *rewards, **changes):
    tokens = tuple(TINY.encode(f"Calculate {number}."))
    prompt = Prompt(uid=number, text=str(number), answer=f"answer {number}", tokens=tokens)
    values = {"response_tokens": [5, 6], "rollout_logprobs": [0.0, 0.0], "versions": [0, 0]}
    values |= {"truncated": True, "text": "said", **changes}
    samples = [
        Sample(uid=number * len(rewards) + k, prompt_tokens=tokens, reward=reward, **values)
        for k, reward in enumerate(rewards)
    ]
    return Group(prompt=prompt, samples=samples)


GROUPS = [group(i, 0.2 + 0.01 * (7 * i % 50), 0.5) for i in range(50)]
"""Of different mean rewards: the worst is 0, the best 7."""


def picks(groups, step, most):
    return [(found.picked, found.answer) for found in shown_groups(groups, step, most, TINY)]


def test_the_best_and_the_worst_come_first_and_others_at_random():
    found = picks(GROUPS, 1, 6)
    assert found[:2] == [("best", "answer 7"), ("worst", "answer 0")]
    assert [why for why, _ in found[2:]] == ["random"] * 4
    assert len({answer for _, answer in found}) == 6
    assert picks(GROUPS, 1, 3) == found[:3]


def test_a_single_one_is_any():
    answers = {picks(GROUPS, step, 1)[0] for step in range(1, 40)}
    assert {why for why, _ in answers} == {"random"}
    assert len(answers) > 20


def test_the_choice_is_the_step_s_alone():
    first = [picks(GROUPS, step, 4) for step in (1, 2)]
    assert first[0] != first[1]
    before = torch.get_rng_state(), random.getstate()
    torch.manual_seed(torch.randint(99, ()).item())
    assert [picks(GROUPS, step, 4) for step in (1, 2)] == first
    torch.set_rng_state(before[0])
    picks(GROUPS, 1, 4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_no_group_twice_where_there_are_few():
    assert picks(GROUPS[:1], 3, 4) == [("worst", "answer 0")]
    assert sorted(picks(GROUPS[:3], 3, 9)) == [
        ("best", "answer 2"),
        ("random", "answer 1"),
        ("worst", "answer 0"),
    ]
    same = [group(i, 1.0) for i in range(5)]
    assert len({answer for _, answer in picks(same, 3, 4)}) == 4


def test_all_groups_are_shown_about_as_often():
    """20 of 1000 draws each; by chance, one in a thousand such tables is beyond 5 to 45."""
    counts = dict.fromkeys(range(50), 0)
    same = [group(i, 1.0) for i in range(50)]
    for step in range(1, 1001):
        for _, answer in picks(same, step, 1):
            counts[int(answer.split()[1])] += 1
    assert min(counts.values()) >= 5
    assert max(counts.values()) <= 45


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"truncated": True}, (True, None)),
        ({"truncated": False, "response_tokens": [5, TINY.eos_id]}, (False, "</s>")),
        ({"truncated": False, "response_tokens": [5, 103]}, (False, "token 103")),
        ({"truncated": False, "response_tokens": [5, TINY.encode("7")[0]]}, (False, "7")),
    ],
)
def test_how_a_response_ended(changes, expected):
    (found,) = shown_groups([group(1, 1.0, **changes)], 1, 1, TINY)
    assert (found.responses[0].truncated, found.responses[0].stop_token) == expected


def test_what_is_told_of_a_response():
    of = group(3, 0.25, 0.75, versions=[4, 7], text="half \ud83d of it")
    of.samples[1].advantage = 1.5
    (found,) = shown_groups([of], 9, 4, TINY)
    assert (found.step, found.prompt, found.answer) == (9, "Calculate 3.", "answer 3")
    first, second = found.responses
    assert first.text == "half \\ud83d of it"
    assert (first.tokens, first.staleness_mean, first.staleness_max) == (2, 2.5, 4)
    assert (first.reward, first.advantage, second.reward, second.advantage) == (0.25, 0, 0.75, 1.5)
