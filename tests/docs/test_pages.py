"""The pages say what the code does: keys, metrics, links, commands."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from sapo_megatron.recipe.load import keys
from sapo_megatron.recipe.schema import Count, RolloutConfig
from tests.docs import recipe_page
from tests.docs.meanings import MEANINGS

SCHEMA = [
    (key, recipe_page.docstrings(cls))
    for section, cls in recipe_page.sections()
    for key in recipe_page.keys_of(section, cls)
    if not section.startswith("data.eval")  # as data.train
]


def test_the_page_of_keys_is_current():
    assert recipe_page.PAGE.read_text() == recipe_page.page(), "write it again: make docs"
    assert set(keys()) <= recipe_page.names()


def test_every_key_has_one_meaning():
    assert [key.name for key, _ in SCHEMA if not key.meaning] == []
    documented = {key.name for key, told in SCHEMA if key.name.rpartition(".")[2] in told}
    assert MEANINGS.keys() & documented == set()
    assert MEANINGS.keys() - {key.name for key, _ in SCHEMA} == set()


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (Count, "whole number > 0"),
        (Count | None, "whole number > 0, `null`"),
        (Annotated[float, Field(gt=1, le=2)], "number > 1 and <= 2"),
        (Literal["a", "b"], "`a`, `b`"),
        (tuple[str, ...], "list of: text"),
        (dict[str, int], "mapping"),
        (RolloutConfig | None, "section, `null`"),
    ],
)
def test_types_in_words(hint, expected):
    assert recipe_page.kind_of(hint) == expected
