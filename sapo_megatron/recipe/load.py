"""A recipe: YAML -> the frozen dataclasses of :mod:`sapo_megatron.recipe.schema`.

``load(path, overrides)`` merges ``base:`` recipes, the file and the command line, checks names,
types and ranges, and then the rules of :mod:`sapo_megatron.recipe.check`. User mistakes raise
:class:`UserError`, in one line.
"""

import dataclasses
import json
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic.fields import FieldInfo

from sapo_megatron.errors import UserError, nearest, one_line
from sapo_megatron.files import read_text
from sapo_megatron.recipe.check import check
from sapo_megatron.recipe.schema import LARGEST, SMALLEST, Recipe

PEER_KEYS = {
    name: key
    for line in Path(__file__).with_name("peers.txt").read_text(encoding="utf-8").splitlines()
    for key, names in [line.split(": ")]
    for name in names.split()
}
"""What other projects call keys of ours: verl, slime, miles, TRL, ms-swift, SkyRL, NeMo-RL, AReaL,
OpenRLHF and Megatron-LM."""
_PATH_KEYS = (
    "model.path",
    "model.architecture",
    "model.tokenizer",
    "data.train.path",
    "data.eval.path",
    "rollout.vllm_python",
    "train.run_dir",
)
MOST_VALUES, DEEPEST = 50_000, 30
"""Values of a recipe, and sections in one another, with all that its aliases stand for."""
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_MODEL = r"(\w[\w.-]*/[\w.-]+)(?<!\.model)"
_DATASET = r"(\w[\w.-]*/[\w.-]+)(?<!\.jsonl)(?<!\.parquet)(/.*)?"
_HUB_NAMES = {
    "model.path": _MODEL,
    "model.tokenizer": _MODEL,
    "data.train.path": _DATASET,
    "data.eval.path": _DATASET,
}
"""Keys that may name something on the Hugging Face hub, and how such a name (owner/name) looks."""


def load(path: str | Path, overrides: dict[str, str] | None = None) -> Recipe:
    """Read a recipe and check it.

    ``path`` may also be the name of a recipe that comes with the package, where there is no such
    file. ``overrides`` maps ``section.key`` (or a bare key that only one section has) to YAML text.
    Relative paths mean: beside the recipe that holds them, or, in an override, the working folder.
    Raises UserError for anything that is wrong with either.
    """
    path = _found(path)
    raw = _read(path)
    raw.setdefault("name", path.stem)
    for key, text in (overrides or {}).items():
        _override(raw, key, text)
    return from_plain(raw)


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parents[1]
    folder = package / "recipes"
    if not folder.is_dir():  # in a checkout they lie beside it
        folder = package.with_name("recipes")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _found(given: str | Path) -> Path:
    """The path, or the recipe of that name. Raises UserError for what may be a name and is none."""
    path = Path(given)
    if path.exists() or os.sep in str(given) or path.suffix in (".yaml", ".yml"):
        return path
    names = shipped()
    if path.name not in names:
        raise UserError(
            f"recipe: no such file: {path}, and no recipe of that name; there are "
            f"{', '.join(names)}"
        )
    return names[path.name]


def from_plain(raw: dict[str, Any]) -> Recipe:
    """The recipe that ``raw`` is, checked. Raises UserError."""
    try:
        recipe = _ADAPTER.validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    check(recipe)
    return recipe


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data."""
    return _ADAPTER.dump_python(recipe, mode="json")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as ``load`` reads it back."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are decimal (also 1e-6, not 010 or 1:30), without dates, tags and a key
    given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        parts = (yaml.ScalarEvent, yaml.CollectionStartEvent)
        if isinstance(event, parts) and event.tag not in (None, "!"):
            raise UserError(f"expected YAML without tags, got {event.tag[:80]}; remove it")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise UserError(f"expected at most {MOST_VALUES} values, got more by merging")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rsplit(":")[-1] in ("bool", "null", "merge")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in (
    ("int", r"[-+]?(0|[1-9][\d_]*)$"),
    ("float", r"[-+]?(\d[\d_]*\.[\d_]*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_form, re.IGNORECASE), list("-+.0123456789")
    )


def _parsed(text: str, place: str) -> Any:
    """What YAML says, in values of its own, each once. Raises MarkedYAMLError for what is no YAML,
    and UserError, naming file or key, for what may not be in a recipe."""
    try:
        value = yaml.load(text, _Loader)
    except (yaml.constructor.ConstructorError, yaml.reader.ReaderError) as error:
        raise UserError(f"{place}{_yaml_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{place}: expected at most {DEEPEST} brackets in one another") from None
    except ValueError as error:  # tags, and endless digits
        raise UserError(f"{place}: {one_line(error, 120)}") from None
    return _copied(value, place, iter(range(MOST_VALUES)))


def _copied(value: Any, place: str, left: Iterator[int]) -> Any:
    """``value`` without aliases, if it is one of a recipe. Raises UserError, naming the place."""
    if next(left, None) is None or place.count(": ") > DEEPEST:
        raise UserError(
            f"{one_line(place, 80)}: expected at most {MOST_VALUES} values, {DEEPEST} deep, got "
            f"more with what aliases stand for; write less"
        )
    if isinstance(value, str) and (bad := _NOT_TEXT.search(value)):
        raise UserError(f"{place}: expected a text without {bad[0]!a}, got one; remove it")
    if isinstance(value, list):
        return [_copied(item, f"{place}: {i}", left) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    for key in value:
        if not isinstance(key, str) or _NOT_TEXT.search(key):
            raise UserError(f"{place}: expected a text as a key, got {_show(key)}; quote it")
    return {key: _copied(item, f"{place}: {key}", left) for key, item in value.items()}


def _read(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe file with its ``base:`` merged below it and its paths made absolute."""
    place = os.path.realpath(path)
    if place in seen or len(seen) > DEEPEST:
        raise UserError(f"{path}: base: expected a recipe that is not its own base; remove it")
    try:
        raw = _parsed(read_text(path), str(path))
    except FileNotFoundError:
        of = f" (base of {seen[-1]})" if seen else ""
        raise UserError(f"recipe: no such file: {path}{of}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_yaml_problem(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {_show(raw)}")
    raw = {key: value for key, value in raw.items() if value is not None}
    for key in _PATH_KEYS:
        _absolute(raw, key, path.parent)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not (isinstance(base, str) and base.strip()):
        raise UserError(f"{path}: base: expected the path of a recipe, got {_show(base)}")
    low = _read(path.parent / expanded(base, f"{path}: base"), (*seen, place))
    low.pop("name", None)
    return _merge(low, raw)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f":{error.problem_mark.line + 1}: not YAML as recipes want it: {error.problem}"
    return f": not YAML: {one_line(error)}"


def expanded(path: str, where: str) -> str:
    """``path`` with what ``~`` and ``$NAME`` in it stand for.

    Raises UserError, saying ``where`` it is given, for what stands for nothing.
    """
    found = os.path.expanduser(os.path.expandvars(path))
    if unknown := re.search(r"^~[^/]*|\$\w+|\$\{[^}]*\}", found):
        raise UserError(
            f"{where}: expected a path, got {path}, in which {unknown[0]} stands for nothing; set "
            f"it, or write the path out"
        )
    return found


def _absolute(raw: dict[str, Any], key: str, folder: Path) -> None:
    """Make a path of the recipe absolute, unless it is a name on the hub and no folder here.

    The run's folder stays relative to the working folder, as a Python for servers is.
    """
    *sections, name = key.split(".")
    node: Any = raw
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not (isinstance(node, dict) and isinstance(node.get(name), str)):
        return
    given = node[name] = expanded(node[name], key)
    if max(len(os.fsencode(part)) for part in given.split("/")) > 255 or len(given) > 4000:
        raise UserError(
            f"{key}: expected a path with names of at most 255 bytes, got {_show(given)}; change it"
        )
    program = key == "rollout.vllm_python" and "/" not in given  # which is looked for
    if program or key == "train.run_dir" or not given.strip():
        return
    if key == "rollout.vllm_python":
        folder = Path.cwd()
    hub = re.fullmatch(_HUB_NAMES[key], given) if key in _HUB_NAMES else None
    if hub is None or (folder / hub[1]).exists():
        node[name] = os.path.abspath(folder / given)


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(raw: dict[str, Any], key: str, text: str) -> None:
    dotted = _find_key(key)
    *sections, name = dotted.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"{section}: expected a section (keys and values), got {_show(node)}")
    try:
        node[name] = _parsed(text, dotted)
    except yaml.YAMLError:
        node[name] = _copied(text, dotted, iter(range(1)))
    if dotted in _PATH_KEYS:
        _absolute(raw, dotted, Path.cwd())


def _find_key(key: str) -> str:
    """The full name of a key given on the command line. Raises UserError with the nearest key."""
    known = keys()
    key = key.replace("-", "_")
    if key in known:
        return key
    matches = [k for k in known if k.rsplit(".", 1)[-1] == key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{key}: several sections have it; say one of {', '.join(matches)}")
    raise UserError(f"{key}: no such key; {_suggest(key)}")


def _suggest(key: str) -> str:
    """What to say of a key that is none of ours."""
    known, parts = keys(), key.split(".")
    by_name = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    for part in reversed(parts):
        if part in PEER_KEYS:
            return f"here it is called {PEER_KEYS[part]}"
        if part in by_name:
            return f"the nearest is {by_name[part]}"
    if near := nearest(parts[-1], by_name, cutoff=0.7):
        return f"the nearest is {by_name[near]}"
    inside = [k.removeprefix(f"{parts[0]}.") for k in known if k.startswith(f"{parts[0]}.")]
    if inside:
        return f"{parts[0]} has {', '.join(inside)}"
    return f"there are {', '.join(_hints(Recipe))}"


def keys(cls: type = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of every value of a recipe, and of the sections that may be null."""
    names: list[str] = []
    for name, hint in _hints(cls).items():
        section = None if typing.get_origin(hint) is tuple else _section_in(hint)
        if section:
            names += keys(section, f"{prefix}{name}.")
        if section is None or type(None) in typing.get_args(hint):
            names.append(prefix + name)
    return names


def _hints(cls: type) -> dict[str, Any]:
    """The types of a section's fields, with their ranges."""
    return typing.get_type_hints(cls, include_extras=True)


def _parts(hint: Any) -> Iterator[Any]:
    """A type and everything that it is made of."""
    yield hint
    for inner in typing.get_args(hint):
        yield from _parts(inner)


def _section_in(hint: Any) -> type | None:
    """The section that a type names; None: it is that of a value."""
    parts = (part for part in _parts(hint) if isinstance(part, type))
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


def _explain(error: ValidationError) -> str:
    """The most telling problem of a validation, in one line: an unknown key before all others."""
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "unexpected_keyword_argument"]
    problem = (unknown or problems)[0]
    key, got = ".".join(str(part) for part in problem["loc"]), problem["input"]
    if unknown:
        while isinstance(got, dict) and got:
            name, got = next(iter(got.items()))
            key = f"{key}.{name}"
        return f"{key}: no such key; {_suggest(key)}"
    if problem["type"] == "missing":
        return f"{key}: missing; set it in the recipe"
    if problem["type"] in _OUT_OF_RANGE:
        wanted = _number(problem["loc"], got)
    else:
        wanted = _WANTED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
    return f"{key}: expected {wanted}, got {_show(got)}; change it"


_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text (quote it)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping (keys and values)",
    "dataclass_type": "a section (keys and values)",
    "string_pattern_mismatch": "a text that is not blank",
}
"""pydantic's error types in our words."""
_OUT_OF_RANGE = (
    "finite_number",
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
)
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _number(place: Sequence[str | int], got: float) -> str:
    """What a key takes, in words: ``a whole number > 0``, ``a finite number >= 0 and < 1``.

    Where a computer's numbers end is said to those who get there.
    """
    hint: Any = Recipe
    for name in place:
        if isinstance(name, str):  # a number counts in a list, whose type names its items'
            section = _section_in(hint)
            assert section is not None
            hint = _hints(section)[name]
    parts = list(_parts(hint))
    bounds = [bound for part in parts if isinstance(part, FieldInfo) for bound in part.metadata]
    limits = [item for bound in bounds for item in dataclasses.asdict(bound).items()]
    limits = [
        (name, 0 if limit == SMALLEST and not got > 0 else limit)
        for name, limit in limits
        if limit not in LARGEST or limit < got < float("inf")
    ]
    kind = "a whole number" if int in parts else "a finite number"
    return f"{kind} {' and '.join(f'{_SIGNS[name]} {limit}' for name, limit in limits)}"


def _show(value: Any) -> str:
    return one_line(json.dumps(value, default=str), 80)


def _sections(cls: type = Recipe) -> list[type]:
    """``cls`` and every section that its fields name, at any depth."""
    named = filter(None, map(_section_in, _hints(cls).values()))
    return [cls, *(inner for section in named for inner in _sections(section))]


for _section in _sections():
    with_config(ConfigDict(extra="forbid", allow_inf_nan=False))(_section)
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
