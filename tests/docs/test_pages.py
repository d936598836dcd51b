"""The pages say what the code does: keys, metrics, links, commands."""

import argparse
import re
from typing import Annotated, Literal

import pytest
from pydantic import Field

from sapo_megatron.__main__ import _parser
from sapo_megatron.recipe.load import keys
from sapo_megatron.recipe.schema import Count, RolloutConfig
from tests.docs import metrics_page, pages, recipe_page
from tests.docs.follow import new_files
from tests.docs.meanings import MEANINGS
from tests.docs.metric_names import Source, metrics_of_runs
from tests.support.tiny import ROOT

SCHEMA = [
    (key, recipe_page.docstrings(cls))
    for section, cls in recipe_page.sections()
    for key in recipe_page.keys_of(section, cls)
    if not section.startswith("data.eval")  # as data.train
]

COMMANDS = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
OF_OTHERS = {
    "docs/about/performance-summary.md",
    "algorithm.rollout_correction.bypass_mode",
    "model.language_model",
}
"""What pages name of other projects, and what looks like ours."""
each_page = pytest.mark.parametrize(
    "page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


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
        (
            'def f():\n    d = {"b": 1}\n    d["c"] = 2\n    for n in d:\n        m.add(n, x)',
            {"b", "c"},
        ),
        ('def f(*, p="a"):\n    m.add(f"{p}/b", x)\nf()\nf(p="c")', {"a/b", "c/b"}),
        ('def f(p):\n    m.add(f"{p}/b", x)\ndef g(q):\n    f(f"{q}/c")\ng("a")', {"a/c/b"}),
        (
            'def g(q):\n    return {f"{q}/{i}": i for i in h()}\n'
            'def f():\n    for n, x in g("a").items():\n        m.add(n, x)',
            {"a/*"},
        ),
        ("def f():\n    m.add(name(), x)", {"*"}),
        ('def f(p):\n    m.add(f"{p}/b", x)', {"*"}),
    ],
)
def test_names_are_followed_to_where_they_come_from(source, expected):
    assert Source([source]).metric_names() == expected


def test_what_a_name_of_the_page_stands_for():
    assert metrics_page.means("a/by/{layers}", "a/by/3-4")
    assert metrics_page.means("a/{name}_low", "a/*_low")
    assert not metrics_page.means("a/{name}", "a/b/c")
    assert not metrics_page.means("a/b", "a/bc")


@each_page
def test_links_lead_somewhere(page):
    assert [target for target in pages.links(page) if pages.broken(page, target)] == []


def test_the_index_has_every_page():
    indices = [*(ROOT / "docs").rglob("README.md")]
    found = [(i.parent / t.partition("#")[0]).resolve() for i in indices for t in pages.links(i)]
    assert {*(ROOT / "docs").rglob("*.md")} <= {*found, ROOT / "docs" / "README.md"}
    assert "docs/README.md" in pages.links(ROOT / "README.md")


@each_page
def test_commands_exist(page):
    of_recipes = {key.rpartition(".")[2] for key in keys()}
    for name, flags in pages.commands(page):
        assert name in COMMANDS
        known = {o.lstrip("-") for a in COMMANDS[name]._actions for o in a.option_strings}
        if "RECIPE" in (COMMANDS[name].usage or ""):
            known |= of_recipes
        assert set(flags) <= known, name
    assert set(pages.targets(page)) <= pages.made()


@each_page
def test_files_exist(page):
    for name in set(pages.files(page)) - OF_OTHERS - new_files(page):
        assert (ROOT / name).exists() or (ROOT / "sapo_megatron" / name).exists(), name


@each_page
def test_keys_exist(page):
    sections = {name.split(".")[0] for name in recipe_page.names()}
    assert set(pages.dotted(page, sections)) <= recipe_page.names() | OF_OTHERS
    for recipe in pages.recipes(page):
        assert set(pages.flat(recipe)) <= recipe_page.names()


@pytest.mark.parametrize(
    "page",
    # Those have metrics of hosts, and one that is added there.
    [p for p in pages.PAGES if p.parent.name != "patches" and p.name != "metric.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_metrics_exist(page):
    metrics = metrics_of_runs()
    groups = {name.split("/")[0] for name in metrics}
    for name in pages.slashed(page, groups):
        form = re.sub(r"\\\{\w+\\\}|\\\*", ".+", re.escape(name))
        assert any(re.fullmatch(form, m) for m in metrics) or metrics_page.has(name), name


def test_what_is_found_on_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Two `words`, and more\n\n## Twice\n\n## Twice\n\n"
        "[a](#two-words-and-more) [b](#twice-1) [c](#once) [d](gone.md) [e](https://a.b)\n\n"
        'Make it `make test ARGS="-k x"`, then `train.steps=3`; `ratio/ess`, `time/*`.\n\n'
        "    sapo-megatron train recipes/x.yaml \\\n"
        "        --resume auto   # --none\n"
        "    A=1 make lint docs\n\n"
        "    train:\n      steps: 3\n\n"
        "```sh\n# Once\nmake \\\n    bench\n```\n\n```text\nmake none\n```\n"
    )
    assert [t for t in pages.links(page) if pages.broken(page, t)] == ["#once", "gone.md"]
    assert list(pages.commands(page)) == [("train", ["resume"])]
    assert list(pages.targets(page)) == ["test", "lint", "docs", "bench"]
    assert pages.files(page) == ["recipes/x.yaml"]
    assert list(pages.dotted(page, {"train"})) == ["train.steps"]
    assert list(pages.slashed(page, {"ratio", "time"})) == ["ratio/ess", "time/*"]
    assert [list(pages.flat(recipe)) for recipe in pages.recipes(page)] == [
        ["train", "train.steps"]
    ]
    assert {"lint", "docs", "venvs/vllm/.installed"} <= pages.made()
