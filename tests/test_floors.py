"""The floors of the house: a file imports from its own floor and those below, never from above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sapo_megatron"
FLOORS = [
    {"__init__", "config", "architecture", "check", "sample", "metrics", "trackers", "dump"},
    {"objective", "rollout", "batch", "pretrained"},
    {"routing", "patches"},
    {"policy"},
    {
        "train",
        "engine",
        "watch",
        "coldstart",
        "evaluate",
        "report",
        "gates",
        "runs",
        "plan",
        "doctor",
    },
    {"__main__"},
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def unit_of(path):
    """The file or folder directly below the package that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def violations(path, source):
    """What a file with this source text does that its place does not allow."""
    tree = ast.parse(source)
    place, unit = path.relative_to(PACKAGE).as_posix(), unit_of(path)
    if unit not in FLOOR_OF:
        return [f"{unit} is on no floor: give it one in FLOORS"]
    found = []
    for name in imports(path, tree):
        parts = name.split(".")
        if parts[0] == "sapo_megatron" and len(parts) > 1:
            other = parts[1] if parts[1] in FLOOR_OF else "__init__"
            is_module = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()
            if is_module and parts[1] not in FLOOR_OF:
                found.append(f"{name}: {parts[1]} is on no floor")
            elif FLOOR_OF[other] > FLOOR_OF[unit]:
                found.append(f"{name}: a floor above")
        at_home = unit in ("policy", "patches") or place == "routing/replay.py"
        if parts[0] == "megatron" and not at_home:
            found.append(f"{name}: Megatron outside policy/")
        if "parallel_state" in parts and place != "policy/parallel.py":
            found.append(f"{name}: parallel_state outside policy/parallel.py")
    for node in ast.walk(tree):
        used = isinstance(node, ast.Attribute) and node.attr == "parallel_state"
        if used and place != "policy/parallel.py":
            found.append(f"line {node.lineno}: parallel_state outside policy/parallel.py")
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_floors(path):
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("objective/x.py", "import sapo_megatron.policy.step"),
        ("objective/x.py", "from sapo_megatron import policy"),
        ("objective/x.py", "from ..policy import step"),
        ("objective/x.py", "def f():\n    from sapo_megatron.train import train"),
        ("objective/x.py", "import megatron.core"),
        ("routing/variance.py", "from megatron.core import tensor_parallel"),
        ("train.py", "from megatron import core"),
        ("train.py", "from sapo_megatron.__main__ import main"),
        ("config.py", "from sapo_megatron.batch import pack"),
        ("policy/model.py", "from megatron.core import parallel_state"),
        ("policy/model.py", "from megatron.core.parallel_state import get_rank"),
        ("policy/model.py", "import megatron.core as m\nm.parallel_state.get_rank()"),
        ("novelty.py", ""),
        ("novelty/x.py", ""),
    ],
)
def test_what_the_floors_forbid(place, source):
    assert violations(PACKAGE / place, source)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("policy/parallel.py", "from megatron.core import parallel_state"),
        ("routing/replay.py", "from megatron.core.transformer.moe import router_replay"),
        ("policy/step.py", "from sapo_megatron import objective, config, __version__"),
        ("train.py", "from . import coldstart\nfrom .policy import step"),
    ],
)
def test_what_the_floors_allow(place, source):
    assert violations(PACKAGE / place, source) == []


def test_the_lower_floors_work_where_megatron_is_not_installed():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if FLOOR_OF.get(unit_of(path), 9) <= FLOOR_OF["objective"]
        or path.relative_to(PACKAGE).as_posix() in ("routing/divergence.py", "routing/variance.py")
        or unit_of(path) == "patches"
    ]
    assert "sapo_megatron" in modules
    assert "sapo_megatron.config" in modules
    program = f"""
import importlib, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine"):
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, NotInstalled())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_reward_workers_do_without_torch():
    program = "import sys, sapo_megatron.rollout.verifiers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
