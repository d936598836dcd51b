"""What users see: one line, with the name that was probably meant."""

import pytest
from pydantic import TypeAdapter, ValidationError

from sapo_megatron.errors import first_problem, nearest, one_line, with_type


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a text", "a text"),
        (" two\n  lines,\tand a tab ", "two lines, and a tab"),
        ("", ""),
        (ValueError("what\nwhy"), "what why"),
        (KeyError("weight"), "'weight'"),
        (AssertionError(), "AssertionError"),
        (AssertionError(" \n"), "AssertionError"),
    ],
)
def test_one_line(message, line):
    assert one_line(message) == line


def test_the_longest_line():
    assert one_line("x" * 20, 20) == "x" * 20
    assert one_line("x" * 21, 20) == "x" * 16 + " ..."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("weight"), "KeyError: 'weight'"),
        (OSError("what\n  why"), "OSError: what why"),
        (SystemExit(), "SystemExit"),
    ],
)
def test_with_type(error, line):
    assert with_type(error) == line
    assert len(with_type(error, 8)) <= 8


def test_the_nearest_name():
    names = ["tau_pos", "tau_neg", "lr"]
    assert nearest("tau_pso", names) == "tau_pos"
    assert nearest("zzz", names) is None
    assert nearest("tau_pso", []) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": [1, "x"]}', "a.1: Input should be a valid integer, got 'x'"),
        ('{"a": 3}', "a: Input should be a valid array, got 3"),
        ("[]", "Input should be an object, got []"),
    ],
)
def test_the_first_problem(text, said):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, list[int]]).validate_json(text, strict=True)
    assert first_problem(caught.value) == said
