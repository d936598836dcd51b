"""Every key of a recipe on resume: it takes effect, is refused, or a line says what is kept."""

import dataclasses
import json
import logging
import types
import typing
from pathlib import Path

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.recipe import resume
from sapo_megatron.recipe.load import keys, load, to_plain
from sapo_megatron.recipe.schema import Recipe, SourceConfig, TaskConfig
from tests.support.tiny import write_recipe

CHECKPOINT = Path("run/checkpoints/step-000004")
OTHERS = {
    "data.train.tasks": (TaskConfig(name="chain_sum", options={"max_terms": 2}),),
    "data.eval.tasks": (TaskConfig(name="chain_sum"),),
    "data.chat_template_kwargs": {"enable_thinking": False},
    "parallel.recompute_modules": ("moe",),
    "rollout.servers": ("http://node7:8000",),
    "rollout.stop_token_ids": (7,),
}
"""Values of other types than the test makes by itself."""
LEAVES = [key for key in keys() if not any(k.startswith(f"{key}.") for k in keys())]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return load(write_recipe(tmp_path_factory.mktemp("recipe")))


def another(key, section, name):
    """A value that the key does not have."""
    if key in OTHERS:
        return OTHERS[key]
    value = getattr(section, name)
    hint = typing.get_type_hints(type(section))[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for kind in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(kind) is typing.Literal:
            return next(choice for choice in typing.get_args(kind) if choice != value)
        if kind is bool:
            return not value
        if kind in (int, float):
            return 2 if value is None else value + 1
        if kind is str:
            return f"another-{value}"
    raise AssertionError(f"{key}: no other value is known")


def with_another(recipe, key):
    """``recipe`` with another value of the key."""
    *parents, name = key.split(".")
    nodes = [recipe]
    for parent in parents:
        nodes.append(getattr(nodes[-1], parent) or SourceConfig(path="/problems.jsonl"))
    changed = dataclasses.replace(nodes[-1], **{name: another(key, nodes[-1], name)})
    for node, parent in zip(reversed(nodes[:-1]), reversed(parents), strict=True):
        changed = dataclasses.replace(node, **{parent: changed})
    assert isinstance(changed, Recipe)
    return changed


def saved(recipe):
    """The recipe as a checkpoint has it."""
    return json.loads(json.dumps(to_plain(recipe)))


@pytest.mark.parametrize("key", LEAVES)
def test_every_key(recipe, key, caplog):
    caplog.set_level(logging.INFO)
    before, changed = saved(recipe), with_another(recipe, key)
    differs = {name: values for name, *values in resume.changed(before, to_plain(changed))}
    was, now = differs[key]
    if key in resume.BOUND:
        with pytest.raises(UserError) as refused:
            resume.check_bound(before, changed, CHECKPOINT, ahead=False)
        expected = f"{key}: expected {was}, with which {CHECKPOINT} was written, got {now}; "
        assert str(refused.value).startswith(expected)
        return
    resume.check_bound(before, changed, CHECKPOINT, ahead=False)
    going_on = resume.going_on(before, changed)
    (line,) = [m for m in caplog.messages if m.startswith(f"changed: {key}: ")]
    if {key, key.rpartition(".")[0]} & set(resume.KEPT):
        assert line.startswith(f"changed: {key}: {was} is kept, not {now} (")
        assert going_on == recipe
    else:
        assert line.startswith(f"changed: {key}: {was} -> {now}")
        assert going_on == changed


@pytest.mark.parametrize("key", resume.BOUND_AHEAD)
def test_what_responses_that_were_generated_ahead_are_bound_to(recipe, key):
    before, changed = saved(recipe), with_another(recipe, key)
    with pytest.raises(UserError, match=f"^{key}: expected .* generated ahead .*; set it back$"):
        resume.check_bound(before, changed, CHECKPOINT, ahead=True)


def test_tables_name_keys():
    sections = {key.rpartition(".")[0] for key in LEAVES}
    assert {*resume.BOUND, *resume.BOUND_AHEAD} <= set(LEAVES)
    assert {*resume.NOTES, *resume.KEPT} <= {*LEAVES, *sections}
    assert not set(resume.BOUND) & set(resume.KEPT)


def test_the_same_recipe_says_nothing(recipe, caplog):
    caplog.set_level(logging.INFO)
    resume.check_bound(saved(recipe), recipe, CHECKPOINT, ahead=True)
    assert resume.going_on(saved(recipe), recipe) is recipe
    assert caplog.messages == []
