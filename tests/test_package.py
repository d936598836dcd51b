"""The package as it is installed: what it asks for, what it imports, and what travels with it."""

import ast
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sapo_megatron import errors
from sapo_megatron.__main__ import main
from tests.support.tiny import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [*map(Requirement, of)] for name, of in PROJECT["optional-dependencies"].items()}
EVERYTHING = EXTRAS.pop("all")
CORE = [*map(Requirement, PROJECT["dependencies"])]
ASKED = [*CORE, *chain(*EXTRAS.values())]
OF_OTHERS = {"fla", "miles", "nemo_rl", "slime", "swift", "transformer_engine", "verl", "vllm"}
"""What is imported where it is there: hosts, servers, and what needs CUDA."""


def distributions(modules):
    """The distributions, by their canonical names, that modules at the top belong to."""
    found = packages_distributions() | {"megatron": ["megatron-core"]}
    return {canonicalize_name(name) for module in modules for name in found[module]}


def imported(path):
    """Names at the top of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def run(program, *words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


# What it asks for


def test_all_asks_for_every_extra():
    assert [(r.name, r.extras) for r in EVERYTHING] == [(PROJECT["name"], set(EXTRAS))]


def test_requirements_pin_what_the_package_asks_for():
    lines = (line.partition("#")[0] for line in (ROOT / "requirements.txt").read_text().split("\n"))
    pins = {canonicalize_name(r.name): r for r in map(Requirement, filter(str.strip, lines))}
    for asked in ASKED:
        ((operator, version),) = [(s.operator, s.version) for s in pins[asked.name].specifier]
        assert operator == "=="
        assert version in asked.specifier, asked


def test_what_is_imported_is_asked_for():
    files = (ROOT / "sapo_megatron").rglob("*.py")
    names = {name for path in files for name in imported(path)} - sys.stdlib_module_names
    names -= {"sapo_megatron"} | OF_OTHERS
    asked = {canonicalize_name(r.name) for r in ASKED}
    assert distributions(names) <= asked


def test_the_extra_that_brings_a_module():
    core = {r.name for r in CORE}
    for extra, asked in EXTRAS.items():
        modules = errors.EXTRAS[extra].split()
        assert distributions(modules) == {canonicalize_name(r.name) for r in asked} - core


WITHOUT = """
import importlib, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError("No module named " + name, name=name)

missing = sys.argv.pop(1).split()
sys.meta_path.insert(0, NotInstalled())
"""


def test_a_host_needs_the_core_alone():
    rooms = [ROOT / "sapo_megatron" / room for room in ("objective", "routing", "patches")]
    files = [path for room in rooms for path in sorted(room.glob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    program = f"{WITHOUT}\nfor name in {names!r}: importlib.import_module(name)\n"
    program += "from sapo_megatron.patches.__main__ import main\nfrom sapo_megatron.__main__ import"
    program += " main as ours\nours(['doctor', '--host', 'slime'])\nsys.exit(main(sys.argv[1:]))"
    done = run(program, " ".join(errors.EXTRAS.values()), "ms_swift", "qwen3-30b-a3b-8gpu")
    assert done.returncode == 0, done.stderr
    assert "--loss_type sapo" in done.stdout
    assert "slime" in done.stdout


def test_reports_need_their_extra_alone():
    program = (
        f"{WITHOUT}\nimport sapo_megatron.commands.report, sapo_megatron.commands.gates.figure"
    )
    others = " ".join(modules for extra, modules in errors.EXTRAS.items() if extra != "report")
    missing = {*others.split()} - {*errors.EXTRAS["report"].split()}
    assert "megatron" in missing
    done = run(program, " ".join(missing))
    assert done.returncode == 0, done.stderr


def test_a_run_imports_what_it_uses():
    others = ["matplotlib", "math_verify", "reasoning_gym", "sapo_megatron.rollout.vllm.fleet"]
    program = "import sys, sapo_megatron.training.loop\n"
    done = run(f"{program}print({{*{[*others, 'wandb']!r}}} & {{*sys.modules}})")
    assert done.stdout == "set()\n", done.stderr


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("sapo_megatron.commands.report")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: matplotlib: ")
    assert said.endswith("pip install 'sapo-megatron[report]'\n")
    assert errors.not_installed(ModuleNotFoundError(name="of_the_user.own")) is None


# What a command imports


def test_help_imports_nothing_that_takes_long():
    program = """
import contextlib, sys
from sapo_megatron.__main__ import main
with contextlib.suppress(SystemExit):
    main(["--help"])
assert not {"numpy", "pydantic", "torch", "yaml"} & {*sys.modules}
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert "usage: sapo-megatron" in done.stdout


def test_plan_imports_no_compiler_and_no_tracker():
    program = """
import sys
from sapo_megatron.__main__ import main
main(["plan", "qwen3-30b-a3b-8gpu"])
assert not {"torch._inductor.compile_fx", "transformers", "wandb"} & {*sys.modules}
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("qwen3-30b-a3b-8gpu\n")


# As a wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel in it, and by name alone what these tests run with."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("sapo_megatron", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(environment)
    install = ["--python", str(environment / "bin/python"), "install", *offline, str(wheel)]
    subprocess.run([*pip, *install], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    beside = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    (packages / "beside.pth").write_text("\n".join(beside))
    return environment


def data(folder):
    """What a folder has in it, but for programs."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py")
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.slow
def test_the_wheel_runs_outside_of_a_checkout(installed, tmp_path):
    def command(*words):
        done = subprocess.run(
            [installed / "bin/sapo-megatron", *words],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    (package,) = installed.glob("lib/*/site-packages/sapo_megatron")
    before = {path: path.stat().st_mtime_ns for path in package.rglob("*")}
    assert data(package / "recipes") == data(ROOT / "recipes")

    status, text, said = command("--help")
    assert (status, said) == (0, "")
    assert "usage: sapo-megatron" in text
    status, text, said = command("plan", "qwen3-30b-a3b-8gpu")
    assert (status, said) == (0, "")
    assert "parameters" in text
    status, _, said = command("train", "tiny-moe")
    assert status == 2
    assert "tiny-moe-cpu" in said
    assert not [*tmp_path.iterdir()]

    words = ["cold_start.steps=0", "train.steps=2", "rollout.rollout_batch_size=8"]
    words += ["train.num_mini_batches=2", "eval.num_problems=4", "eval.k=2"]
    status, _, said = command("train", "tiny-moe-cpu", *words)
    assert status == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [*tmp_path.glob("runs/tiny-moe-cpu/*/report/index.html")]
    assert {path: path.stat().st_mtime_ns for path in package.rglob("*")} == before
