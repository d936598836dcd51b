"""The pages say what the code does: keys, metrics, links, commands."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from sapo_megatron.recipe.load import keys
from sapo_megatron.recipe.schema import Count, RolloutConfig
from tests.docs import metrics_page, recipe_page
from tests.docs.meanings import MEANINGS
from tests.docs.metric_names import Source, metrics_of_runs

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


def test_the_page_of_metrics_has_what_the_code_has():
    metrics = metrics_of_runs()
    assert len(metrics) > 150
    assert [name for name in metrics if name.startswith("*")] == [], "make it tell the name"
    assert sorted(name for name in metrics if not metrics_page.has(name)) == []
    means = metrics_page.means
    assert [n for n in metrics_page.names() if not any(means(n, m) for m in metrics)] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('metrics.add("a/b", Sum(1.0))', {"a/b"}),
        ('seen.add("a/b")', set()),
        ('with metrics.timed("a/b"):\n    pass', {"a/b"}),
        ('NAME = "a/b"\ndef f():\n    metrics.add(NAME, x)', {"a/b"}),
        ('def f():\n    for n in ("b", "c"):\n        metrics.add(f"a/{n}", x)', {"a/b", "a/c"}),
        ('def f():\n    for n, x in (("b", 1),):\n        metrics.add(f"a/{n}", x)', {"a/b"}),
        ('def f():\n    d = {"b": 1}\n    for n, x in d.items():\n        m.add(n, x)', {"b"}),
        ('def f(*, p="a"):\n    m.add(f"{p}/b", x)\nf()\nf(p="c")', {"a/b", "c/b"}),
        ('def f(p):\n    m.add(f"{p}/b", x)\ndef g(q):\n    f(f"{q}/c")\ng("a")', {"a/c/b"}),
        (
            'def g(q):\n    return {f"{q}/{i}": i for i in h()}\n'
            'def f():\n    for n, x in g("a").items():\n        m.add(n, x)',
            {"a/*"},
        ),
        ("def f():\n    m.add(name(), x)", {"*"}),
    ],
)
def test_names_are_followed_to_where_they_come_from(source, expected):
    assert Source([source]).metric_names() == expected


def test_what_a_name_of_the_page_stands_for():
    assert metrics_page.means("a/by/{layers}", "a/by/3-4")
    assert metrics_page.means("a/{name}_low", "a/*_low")
    assert not metrics_page.means("a/{name}", "a/b/c")
    assert not metrics_page.means("a/b", "a/bc")
