"""Reads names, signatures and uses of a package from its source; nothing is imported or run."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Found = tuple[str, ast.AST | None]
"""The module that holds a name, and its definition; no definition where it is a module, an
assignment, or another package's."""
Names = dict[str, ast.AST | tuple[str, str] | None]
"""Name -> its definition, or ``(module, name)`` where it is imported; None for an assignment."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.Try, ast.With)


class Source:
    """The packages that lie in a folder, such as an unpacked wheel."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, Names] = {}

    def file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        choices = (path / "__init__.py", path.with_suffix(".py"))
        return next((choice for choice in choices if choice.exists()), None)

    def find(self, module: str, name: str) -> Found | None:
        """Where ``module.name`` is defined, through any imports; None where there is no such."""
        if self.file(f"{module}.{name}"):
            return f"{module}.{name}", None
        found = self._names(module).get(name)
        if isinstance(found, tuple):
            other, inner = found
            return self.find(other, inner) if self.file(other) else (other, None)
        return None if name not in self._names(module) else (module, found)

    def _names(self, module: str) -> Names:
        """Those of a module, read once."""
        if module not in self._read:
            self._read[module] = {}  # in a circle of imports, the one that closes it finds nothing
            self._read[module] = self._names_in(module)
        return self._read[module]

    def _names_in(self, module: str) -> Names:
        file = self.file(module)
        if file is None:
            return {}
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        names: Names = {}
        for node in _statements(ast.parse(file.read_text()).body):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                names[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(node, package)
                for alias in node.names:
                    if alias.name == "*":
                        names |= {n: (base, n) for n in self._names(base) if n[0] != "_"}
                    else:
                        names[alias.asname or alias.name] = base, alias.name
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                walked = (part for target in targets for part in ast.walk(target))
                names |= {part.id: None for part in walked if isinstance(part, ast.Name)}
        return names

    def classes(self, found: Found) -> Iterator[ast.ClassDef]:
        """A class and those it inherits from, as far as they are in the folder."""
        module, node = found
        if not isinstance(node, ast.ClassDef):
            return
        yield node
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            other = self.find(module, name.id) if isinstance(name, ast.Name) else None
            if other:
                yield from self.classes(other)

    def members(self, found: Found) -> dict[str, str]:
        """Members of a class -> parameters of those that are methods, without self.

        Fields and what is assigned to self have none; of a function there is ``call`` alone.
        """
        if isinstance(found[1], FUNCTIONS):
            return {"call": parameters(found[1])}
        members: dict[str, str] = {}
        for node in self.classes(found):
            for part in ast.walk(node):
                stored = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                if stored and ast.unparse(part.value) == "self":
                    members.setdefault(part.attr, "")
            for part in node.body:
                if isinstance(part, FUNCTIONS):
                    members.setdefault(part.name, parameters(part).partition(" ")[2])
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    members.setdefault(part.target.id, "")
        return members


def parameters(node: ast.AST) -> str:
    """Names in their order, between blanks; ``**`` where any other keyword is taken."""
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return " ".join(names + ["**"] * (a.kwarg is not None))


def uses(folder: Path, package: str) -> dict[str, dict[str, set[str]]]:
    """What the files of ``folder`` take from ``package``.

    Qualified name -> method (``call`` for a name that is called itself) -> keyword arguments.
    """
    taken: dict[str, dict[str, set[str]]] = {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(errors="replace")
        if package in text:
            _Uses(package, taken).visit(ast.parse(text))
    return taken


class _Uses(ast.NodeVisitor):
    """Collects into ``taken``. Imports stand above what uses them, also in functions."""

    def __init__(self, package: str, taken: dict[str, dict[str, set[str]]]) -> None:
        self._package = package
        self._taken = taken
        self._local: dict[str, str] = {}
        self._base: str | None = None

    def _take(self, qualified: str) -> dict[str, set[str]]:
        return self._taken.setdefault(qualified, defaultdict(set))

    def _qualified(self, node: ast.AST) -> str | None:
        """What a name or a dotted name of the file means, where it is the package's."""
        parts = ast.unparse(node).split(".")
        known = self._local.get(parts[0])
        return ".".join([known, *parts[1:]]) if known else None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == self._package:
                self._local[alias.asname or self._package] = (
                    alias.name if alias.asname else self._package
                )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level and node.module.split(".")[0] == self._package:
            for alias in node.names:
                qualified = f"{node.module}.{alias.name}"
                self._local[alias.asname or alias.name] = qualified
                self._take(qualified)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if qualified := self._qualified(node):
            self._take(qualified)
        else:
            self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self._base
        self._base = next(filter(None, map(self._qualified, node.bases)), None)
        self.generic_visit(node)
        self._base = before

    def visit_Call(self, node: ast.Call) -> None:
        keywords = {k.arg for k in node.keywords if k.arg}
        called = ast.unparse(node.func)
        if self._base and called.startswith("super()."):
            self._take(self._base)[called.removeprefix("super().")] |= keywords
        elif qualified := self._qualified(node.func):
            self._take(qualified)["call"] |= keywords
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # How megatron-core's layers gather what a release of the package may not know.
        gathered = ast.unparse(node.value) == "extra_kwargs"
        if self._base and gathered and isinstance(node.slice, ast.Constant):
            self._take(self._base)["__init__"].add(node.slice.value)
        self.generic_visit(node)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, also in its branches."""
    for node in body:
        yield node
        if isinstance(node, BRANCHES):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    parts = package.split(".")
    above = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])
