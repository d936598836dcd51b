"""Which answer a response gives, and which answers of datasets can be compared with one."""

import pytest

from sapo_megatron.rollout.final_answer import given_answer, unverifiable
from sapo_megatron.rollout.verifiers import math_verify
from sapo_megatron.sample import Prompt
from tests.support.math_answers import ANSWERS, UNVERIFIABLE


@pytest.mark.parametrize("shape", ANSWERS)
def test_math_verify_on_the_shapes_of_public_sets(shape):
    for answer, right, wrong in ANSWERS[shape]:
        prompt = Prompt(uid=0, text="", answer=answer, tokens=(1,))
        assert {text: math_verify(prompt, text) for text in right} == dict.fromkeys(right, 1.0)
        assert {text: math_verify(prompt, text) for text in wrong} == dict.fromkeys(wrong, 0.0)


def test_the_table_is_long_enough():
    assert sum(map(len, ANSWERS.values())) >= 60


@pytest.mark.parametrize("answer", [a for cases in ANSWERS.values() for a, *_ in cases])
def test_an_answer_is_worth_1_against_itself(answer):
    assert unverifiable(answer) == ""
    prompt = Prompt(uid=0, text="", answer=answer, tokens=(1,))
    assert math_verify(prompt, f"\\boxed{{{given_answer(answer)}}}") == 1


@pytest.mark.parametrize("answer", UNVERIFIABLE)
def test_answers_that_nothing_can_be_compared_with(answer):
    assert unverifiable(answer) == UNVERIFIABLE[answer]
    prompt = Prompt(uid=0, text="", answer=answer, tokens=(1,))
    with pytest.raises(ValueError, match="answer"):
        math_verify(prompt, "34")


def test_a_thought_that_the_prompt_began():
    prompt = Prompt(uid=0, text="", answer="34", tokens=(1,), thinking=True)
    worth = {"it is \\boxed{34}": 0, "34</think>": 0, "35</think>34": 1, "\\boxed{34}</think>35": 0}
    assert {text: math_verify(prompt, text) for text in worth} == worth
