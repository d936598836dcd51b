"""The house: who may import whom, and how long a file may get.

A file imports from rooms strictly to the left of its own, or from its own room; no two files are
in a circle. Imports inside functions count like any other.
"""

import ast
import re
import subprocess
import sys

import pytest

from sapo_megatron.recipe.load import keys
from tests.support.gloo import run_ranks
from tests.support.tiny import ROOT

PACKAGE = ROOT / "sapo_megatron"
FLOORS = (
    ("__init__", "errors", "files", "sample", "splitmix"),
    ("launcher", "metrics"),
    ("hf",),
    ("recipe",),
    ("objective", "routing", "data"),
    ("runs",),
    ("rollout", "policy", "patches"),
    ("training",),
    ("commands",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 450
LONGEST_FUNCTION = 60
MOST_LINES = 26_744
MOST_KEYS = 140


def place_of(path):
    return path.relative_to(PACKAGE).as_posix()


def room_of(path):
    """The file or folder directly below the package that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path, tree):
    """Dotted names of everything that a file imports, anywhere in it, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_file(name):
    """The module of ours that a dotted name means: itself, or the one that holds the name."""
    while name not in MODULES and "." in name:
        name = name.rsplit(".", 1)[0]
    return name if name in MODULES else None


def violations(path, source):
    """What a file with this source text does that its place does not allow."""
    tree = ast.parse(source)
    place, room = place_of(path), room_of(path)
    if room not in FLOOR_OF:
        return [f"{room} is on no floor: give it one in FLOORS"]
    found = []
    for name in imports(path, tree):
        parts = name.split(".")
        if parts[0] == "sapo_megatron" and len(parts) > 1:
            other = parts[1] if parts[1] in FLOOR_OF else "__init__"
            if other == "__init__" and imported_file(name) != "sapo_megatron":
                found.append(f"{name}: {parts[1]} is on no floor")
            elif other not in (room, "__init__") and FLOOR_OF[other] >= FLOOR_OF[room]:
                found.append(f"{name}: not to the left")
        if parts[0] == "megatron" and room not in ("policy", "patches"):
            found.append(f"{name}: Megatron outside policy/")
        if parts[0] == "matplotlib" and room != "commands":
            found.append(f"{name}: matplotlib outside commands/")
        if "parallel_state" in parts and place != "policy/parallel.py":
            found.append(f"{name}: parallel_state outside policy/parallel.py")
    for node in ast.walk(tree):
        used = isinstance(node, ast.Attribute) and node.attr == "parallel_state"
        if used and place != "policy/parallel.py":
            found.append(f"line {node.lineno}: parallel_state outside policy/parallel.py")
    return found


PATCHES = ("policy/cpu.py", "policy/compat.py")
"""Who may change what is another project's, beside ``patches/``."""


def patched(source):
    """Attributes of imported modules and classes of others' that a file sets."""
    tree = ast.parse(source)
    origin = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origin |= {(a.asname or a.name).split(".")[0]: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            origin |= {a.asname or a.name: node.module for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            project = origin.get(getattr(owner, "id", None), "").split(".")[0]
            if project and project not in ("sapo_megatron", *sys.stdlib_module_names):
                yield ast.unparse(node)


COLLECTIVE = re.compile(
    r"\bdist\.(all_|broadcast|barrier|gather|reduce|scatter|send|recv|isend|irecv)\w*\("
)


def uncommented(source):
    """Lines of collectives without a comment close above that says over whom, and who comes."""
    lines = source.splitlines()
    for number, line in enumerate(lines):
        if COLLECTIVE.search(line) and not any(
            "#" in near for near in lines[max(number - 6, 0) : number]
        ):
            yield f"line {number + 1}: {line.strip()}"


def circle(arrows):
    """A circle among ``{name: names}``, as the list of its names; empty where there is none."""
    done = set()

    def walk(name, above):
        if name in above:
            return above[above.index(name) :]
        if name in done:
            return []
        done.add(name)
        rounds = (walk(other, [*above, name]) for other in sorted(arrows.get(name, ())))
        return next((found for found in rounds if found), [])

    return next((found for found in (walk(name, []) for name in arrows) if found), [])


def long_parts(source):
    """Functions of a file that are too long. Tables do not count: there the body is one literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_every_file_keeps_its_place(path):
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_no_file_and_no_function_is_too_long(path):
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_FILE
    assert list(long_parts(source)) == []


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_what_is_another_project_s_is_changed_in_its_place(path):
    if place_of(path) not in PATCHES and room_of(path) != "patches":
        assert list(patched(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from megatron.core import utils\nutils.torch = 1", ["utils.torch"]),
        ("import torch\ndef f():\n    torch.cuda.Stream = 2", ["torch.cuda.Stream"]),
        ("import sys\nsys.argv = []", []),
        ("import torch\nx = torch.ones(2)\nx.grad = None", []),
    ],
)
def test_who_changes_another_project(source, expected):
    assert list(patched(source)) == expected


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_each_collective_has_its_comment(path):
    assert list(uncommented(path.read_text())) == []


def test_a_collective_without_a_comment_is_found():
    bare = "x = 1\n" * 7 + "dist.all_reduce(x, group=group)\n"
    assert list(uncommented(bare)) == ["line 8: dist.all_reduce(x, group=group)"]
    assert list(uncommented(bare.replace("dist.", "# Over the world.\ndist."))) == []


def test_no_two_files_are_in_a_circle():
    arrows = {}
    for module, path in MODULES.items():
        names = imports(path, ast.parse(path.read_text()))
        found = {imported_file(name) for name in names} - {None, module}
        # A package's first page is not read for what lies in a folder below it.
        arrows[module] = {f for f in found if not module.startswith(f"{f}.")}
    assert circle(arrows) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]


def test_the_house_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= MOST_LINES
    assert len(keys()) <= MOST_KEYS


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("objective/x.py", "import sapo_megatron.policy.step"),
        ("objective/x.py", "from sapo_megatron import policy"),
        ("objective/x.py", "from ..policy import step"),
        ("objective/x.py", "def f():\n    from sapo_megatron.training import loop"),
        ("objective/x.py", "from sapo_megatron.data import batch"),
        ("objective/x.py", "import megatron.core"),
        ("routing/variance.py", "from megatron.core import tensor_parallel"),
        ("policy/x.py", "from sapo_megatron.rollout import generate"),
        ("training/loop.py", "from megatron import core"),
        ("training/loop.py", "from sapo_megatron.commands import report"),
        ("training/loop.py", "from sapo_megatron.__main__ import main"),
        ("runs/read.py", "def f():\n    import matplotlib.pyplot"),
        ("recipe/schema.py", "from sapo_megatron.data.batch import pack"),
        ("policy/model.py", "from megatron.core import parallel_state"),
        ("policy/model.py", "from megatron.core.parallel_state import get_rank"),
        ("policy/model.py", "import megatron.core as m\nm.parallel_state.get_rank()"),
        ("novelty.py", ""),
        ("novelty/x.py", ""),
    ],
)
def test_what_a_place_forbids(place, source):
    assert violations(PACKAGE / place, source)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("policy/parallel.py", "from megatron.core import parallel_state"),
        ("policy/routers.py", "from megatron.core.transformer.moe import router_replay"),
        ("policy/step.py", "from sapo_megatron import objective, errors, __version__"),
        ("training/loop.py", "from . import coldstart\nfrom ..policy import step"),
        ("commands/report/figures.py", "import matplotlib"),
    ],
)
def test_what_a_place_allows(place, source):
    assert violations(PACKAGE / place, source) == []


def run_python(program):
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_what_works_where_megatron_is_not_installed():
    without = ("policy", "training", "commands", "__main__")
    modules = [m for m, path in MODULES.items() if room_of(path) not in without]
    of_reports = [m for m in MODULES if m.startswith("sapo_megatron.commands.report")]
    assert {"sapo_megatron", "sapo_megatron.runs.read", "sapo_megatron.recipe.load"} <= {*modules}
    done = run_python(
        f"""
import importlib, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine"):
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, NotInstalled())
for name in {modules!r}:
    importlib.import_module(name)
assert "matplotlib" not in sys.modules
for name in {of_reports!r}:
    importlib.import_module(name)
"""
    )
    assert done.returncode == 0, done.stderr


def test_a_worker_that_scores_does_without_torch():
    program = "import sys, sapo_megatron.rollout.verifiers; print('torch' in sys.modules)"
    done = run_python(program)
    assert done.stdout.strip() == "False", done.stderr


def test_no_rank_has_what_draws():
    """Forked ranks have what the training loop imports, and these tests beside it."""
    assert run_ranks(1, imported) == [{"sapo_megatron.training.loop"}]


def imported():
    asked = {"sapo_megatron.training.loop", "matplotlib", "sapo_megatron.commands"}
    return asked & sys.modules.keys()
