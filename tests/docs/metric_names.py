"""The names of all metrics that the package adds, read from its source.

What a name is made of is followed through local variables, loops over literals, constants and the
arguments of every call of the function, so that ``f"{prefix}/kl"`` becomes the names that there
are. What is only known in a run, such as the number of a layer, stands as ``*``.
"""

import ast
import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from tests.support.tiny import ROOT

ADDERS = {"add": 2, "timed": 1}
"""Methods that add a metric, and how many arguments they take: a set's add takes one."""
UNKNOWN = ast.Constant("*")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """Functions, calls and constants of some files."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.functions: defaultdict[str, list[Function]] = defaultdict(list)
        self.calls: defaultdict[str, list[tuple[ast.Call, Function | None]]] = defaultdict(list)
        self.constants: dict[str, ast.expr] = {}
        for text in texts:
            tree = ast.parse(text)
            for node in tree.body:
                self.constants |= dict(_assigned(node))
            self._enter(tree, None)

    def _enter(self, node: ast.AST, inside: Function | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                self.functions[child.name].append(child)
            if isinstance(child, ast.Call):
                self.calls[_called(child)].append((child, inside))
            self._enter(child, child if isinstance(child, Function) else inside)

    def metric_names(self) -> set[str]:
        """Every name that a metric is added under; ``*`` is one of which nothing is known."""
        return {
            name
            for adder, arguments in ADDERS.items()
            for call, inside in self.calls[adder]
            if len(call.args) == arguments and not ast.unparse(call).startswith("torch.")
            for name in self.texts(call.args[0], inside) or {"*"}
        }

    def texts(self, name: ast.expr, inside: Function | None, depth: int = 0) -> set[str]:
        """The texts that an expression of a function stands for."""
        assert depth < 9, f"{ast.unparse(name)}: no end of callers"
        found = set()
        for local in self._without_locals(name, inside):
            parameters = _names(local)
            if inside is None or not parameters:
                found.add(_as_text(local))
                continue
            for call, caller in self.calls[inside.name]:
                if caller and caller.name == inside.name:  # it hands on what it is given
                    continue
                values = {p: v for p in parameters if (v := argument(call, p, inside))}
                if len(values) == len(parameters):  # else it is another function of that name
                    found |= self.texts(_replaced(local, values), caller, depth + 1)
        return found

    def _without_locals(self, name: ast.expr, inside: Function | None) -> Iterator[ast.expr]:
        """The same with what local variables and constants stand for, parameters left in it."""
        unknown = [n for n in _names(name).values() if n.id not in _parameters(inside)]
        for value in self._values(unknown[0], inside) if unknown else ():
            yield from self._without_locals(_replaced(name, {unknown[0].id: value}), inside)
        if not unknown:
            yield name

    def _values(self, name: ast.Name, inside: Function | None) -> list[ast.expr]:
        """What a variable of a function is set to: by the loop that it is in, or anywhere."""
        if inside is None or name.id in self.constants:
            return [self.constants.get(name.id, UNKNOWN)]
        found: list[ast.expr] = []
        for node in ast.walk(inside):
            found += [value for target, value in _assigned(node) if target == name.id]
            if isinstance(node, ast.For | ast.comprehension) and _reaches(node, name):
                place = _place(node.target, name.id)
                if place is not None:
                    found += [_at(e, place) for e in self._elements(node.iter, inside)]
        return found or [UNKNOWN]

    def _elements(self, over: ast.expr, inside: Function | None) -> list[ast.expr]:
        """What a loop goes over, where that is a literal, or a dictionary with known keys."""
        if isinstance(over, ast.Tuple | ast.List):
            return over.elts
        if isinstance(over, ast.Name):
            found = [e for v in self._values(over, inside) for e in self._elements(v, inside)]
            return found + _keys_set(over.id, inside)
        if isinstance(over, ast.Dict):
            return [key for key in over.keys if key]
        if isinstance(over, ast.DictComp):
            return list(self._without_locals(over.key, inside))
        if isinstance(over, ast.Call) and _called(over) == "items":
            assert isinstance(over.func, ast.Attribute)
            keys = self._elements(over.func.value, inside)
            return [ast.Tuple([key, UNKNOWN]) for key in keys]
        if isinstance(over, ast.Call):
            return list(self._returned(over, inside))
        return [UNKNOWN]

    def _returned(self, call: ast.Call, inside: Function | None) -> Iterator[ast.expr]:
        """The elements of what a function of ours returns, in terms of the call's arguments."""
        for function in self.functions[_called(call)]:
            if function is inside:  # a method that calls a function of its name
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    for element in self._elements(node.value, function):
                        for local in self._without_locals(element, function):
                            values = {
                                n: argument(call, n, function) or UNKNOWN for n in _names(local)
                            }
                            yield _replaced(local, values)


def argument(call: ast.Call, name: str, function: Function) -> ast.expr | None:
    """What a call gives for a parameter: an argument, or the default; None where neither is."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    positional = [a.arg for a in function.args.args if a.arg not in ("self", "cls")]
    place = positional.index(name) if name in positional else len(call.args)
    return call.args[place] if place < len(call.args) else _parameters(function)[name]


def _parameters(function: Function | None) -> dict[str, ast.expr | None]:
    """Names and defaults."""
    if function is None:
        return {}
    a = function.args
    ordered = [p.arg for p in [*a.posonlyargs, *a.args]]
    found: dict[str, ast.expr | None] = dict.fromkeys(ordered)
    found |= zip(ordered[::-1], a.defaults[::-1], strict=False)
    return found | dict(zip((p.arg for p in a.kwonlyargs), a.kw_defaults, strict=True))


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Name and value of an assignment, and of each part of one of tuples."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign) and node.value:
        targets = [node.target]
    for target in targets:
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        assert node.value is not None
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for name, value in zip(target.elts, node.value.elts, strict=True):
                if isinstance(name, ast.Name):
                    yield name.id, value


def _reaches(loop: ast.For | ast.comprehension, name: ast.Name) -> bool:
    """Whether a use of a variable is in the loop, as far as lines tell."""
    if isinstance(loop, ast.comprehension):
        return True
    assert loop.end_lineno is not None
    return loop.lineno <= name.lineno <= loop.end_lineno


def _keys_set(name: str, inside: Function | None) -> list[ast.expr]:
    """What a dictionary of a function gets entries for."""
    return [
        target.slice
        for node in (ast.walk(inside) if inside else ())
        for target in (node.targets if isinstance(node, ast.Assign) else ())
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == name
    ]


def _place(target: ast.expr, name: str) -> tuple[int, ...] | None:
    """Where a loop's target binds a name: () where it is the target; None where it does not."""
    if isinstance(target, ast.Name):
        return () if target.id == name else None
    for i, part in enumerate(target.elts if isinstance(target, ast.Tuple) else ()):
        inner = _place(part, name)
        if inner is not None:
            return (i, *inner)
    return None


def _at(element: ast.expr, place: tuple[int, ...]) -> ast.expr:
    for i in place:
        if not isinstance(element, ast.Tuple):
            return UNKNOWN
        element = element.elts[i]
    return element


class _Replace(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]) -> None:
        self._values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._values.get(node.id, node)


def _replaced(name: ast.expr, values: dict[str, ast.expr]) -> ast.expr:
    return _Replace(values).visit(copy.deepcopy(name))


def _names(name: ast.expr) -> dict[str, ast.Name]:
    """The variables that a text is made of; those of other expressions are only known in a run."""
    if isinstance(name, ast.JoinedStr):
        return {n: node for part in name.values for n, node in _names(part).items()}
    if isinstance(name, ast.FormattedValue):
        return _names(name.value)
    return {name.id: name} if isinstance(name, ast.Name) else {}


def _as_text(name: ast.expr) -> str:
    if isinstance(name, ast.JoinedStr):
        return "".join(map(_as_text, name.values))
    if isinstance(name, ast.FormattedValue):
        return _as_text(name.value)
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "*"


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


@functools.cache
def metrics_of_runs() -> frozenset[str]:
    """Names of the metrics that a run may have; what patches report to their hosts is not in it."""
    package = ROOT / "sapo_megatron"
    files = [p for p in package.rglob("*.py") if p.parent.name != "patches"]
    files.remove(package / "metrics.py")  # which adds what it is given
    return frozenset(Source([path.read_text() for path in files]).metric_names())
