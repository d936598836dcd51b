"""``docs/recipe.md``: the keys of a recipe, from the schema and what a resume does with them."""

import ast
import dataclasses
import functools
import inspect
import json
import re
import typing
from collections import defaultdict
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple

from pydantic.fields import FieldInfo

from sapo_megatron.recipe.resume import BOUND, BOUND_AHEAD, KEPT, NOTES
from sapo_megatron.recipe.schema import LARGEST, SMALLEST, Recipe
from tests.docs.meanings import MEANINGS
from tests.support.tiny import ROOT

PAGE = ROOT / "docs" / "recipe.md"
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
KINDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    dict: "mapping",
}


class Key(NamedTuple):
    """One value of a recipe, or the section that stands for several."""

    name: str
    """Dotted."""
    kind: str
    default: str
    meaning: str


def docstrings(cls: type) -> dict[str, str]:
    """What stands under the fields of a section, in one line each."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def sections(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted name and class of the recipe and of every section in it."""
    yield prefix.removesuffix("."), cls
    for name, hint in _hints(cls).items():
        if inner := section_in(hint):
            yield from sections(inner, f"{prefix}{name}.")


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def keys_of(section: str, cls: type) -> list[Key]:
    """The keys that a section itself has: not those of sections in it, whose tables follow."""
    hints, told, found = _hints(cls), docstrings(cls), []
    for field in dataclasses.fields(cls):
        name, hint = f"{section}.{field.name}".removeprefix("."), hints[field.name]
        if section_in(hint) and section == "":
            continue
        default = "the file's stem" if name == "name" else default_of(field)
        meaning = told.get(field.name) or MEANINGS.get(name, "")
        found.append(Key(name, kind_of(hint), default, in_yaml_words(meaning)))
    return found


def section_in(hint: Any) -> type | None:
    """The section that a type names, be it in a list or beside None."""
    return next((p for p in _parts(hint) if dataclasses.is_dataclass(p)), None)


def kind_of(hint: Any) -> str:
    """Type and range in words; where a computer's numbers end is left out."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return ", ".join(kind_of(part) for part in arguments if part is not NoneType) + ", `null`"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of: {kind_of(arguments[0])}"
    if section_in(hint):
        return "section"
    limits = [
        f"{SIGNS[name]} {limit if limit != SMALLEST else 0:g}"
        for part in _parts(hint)
        if isinstance(part, FieldInfo)
        for bound in part.metadata
        if dataclasses.is_dataclass(bound)  # no pattern of a text
        for name, limit in dataclasses.asdict(bound).items()
        if name in SIGNS and limit not in LARGEST
    ]
    plain = arguments[0] if origin is typing.Annotated else origin or hint
    return " ".join([KINDS[typing.get_origin(plain) or plain], " and ".join(limits)]).strip()


def _parts(hint: Any) -> Iterator[Any]:
    """A type, all that it is made of, and the ranges among that."""
    yield hint
    for inner in typing.get_args(hint):
        yield from _parts(inner)


def default_of(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    if field.default is dataclasses.MISSING:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return f"`{re.sub(r'e-0(?=.)', 'e-', text.strip(chr(34)))}`"


def in_yaml_words(meaning: str) -> str:
    """A docstring as Markdown, with YAML's names for Python's constants."""
    meaning = meaning.replace("``", "`").replace("|", "\\|")
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        meaning = re.sub(rf"\b{python}\b", f"`{yaml}`", meaning)
    return meaning


def resumed(name: str) -> str:
    """What a resumed run does with a change of this key."""
    section = name.rpartition(".")[0]
    if name in BOUND:
        return "refused"
    if why := KEPT.get(name, KEPT.get(section)):
        return f"stays as it was: {why}"
    if name in BOUND_AHEAD:
        return "refused while responses wait"
    if f"{name}.".startswith("data.train."):
        return "refused without `--new-data`"
    return NOTES.get(name, NOTES.get(section, ""))


def page() -> str:
    """The whole page."""
    parts, places = [HEAD], defaultdict(list)
    for section, cls in sections():
        places[cls].append(section)
    for cls, (section, *others) in places.items():
        rows = [
            f"| `{key.name.rpartition('.')[2]}` | {key.kind} | {key.default} | {key.meaning} | "
            f"{resumed(key.name)} |"
            for key in keys_of(section, cls)
        ]
        about = in_yaml_words(inspect.cleandoc(cls.__doc__ or ""))
        title = ", ".join(f"`{name}`" for name in (section, *others)) if section else "At the top"
        parts.append("\n".join([f"## {title}\n", about, *TABLE, *rows, ""]))
    return "\n".join(parts)


@functools.cache
def names() -> frozenset[str]:
    """Dotted names of all keys and sections."""
    of_sections = {section for section, _ in sections() if section}
    return frozenset(of_sections | {k.name for s, cls in sections() for k in keys_of(s, cls)})


TABLE = (
    "",
    "| key | type and range | default | meaning | changed in a resumed run |",
    "| --- | --- | --- | --- | --- |",
)
HEAD = """\
# Every key of a recipe

Written by `make docs` from `sapo_megatron/recipe/schema.py`; a test fails where it is not current.

- In a recipe a key stands in its section; on the command line it is `section.key=value`, or
  `--key value` where only one section has it. `base: other.yaml` at the top of a recipe takes all
  of another one first. An unknown key, a wrong type or a value out of range ends with one line and
  status 2.
- What keys ask of one another is checked before anything is started: [what goes
  together](rollout.md#what-goes-together) is a table, the rest is said by the message.
- In a [resumed run](launch.md#going-on-with-another-recipe) a changed key takes effect from the
  next step on, unless the last column says otherwise. *refused*: a checkpoint's tensors are bound
  to it. *refused while responses wait*: those that were generated ahead (`rollout.async_steps`) are
  bound to it.
- *refused without `--new-data`*: it changes the training problems or their order, and the place in
  them would mean another problem. Of `data.eval` all may change.
"""


def write() -> None:
    PAGE.write_text(page())
