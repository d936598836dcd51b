"""Says which release of megatron-core is tested, and stops where another one was asked for.

Beside that, what tests of several rooms share."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch.distributed as dist

# Other projects' pipelines have an environment of their own, which make test-hosts runs with the
# Python of, and without this file; real vLLM servers have one that make test-vllm names.
collect_ignore = ["hosts/test_verl.py", "hosts/test_ms_swift.py"] + (
    [] if "SAPO_VLLM_PYTHON" in os.environ else ["vllm"]
)


ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """This process as the only rank of a world over gloo."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_configure() -> None:
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # First of all for whatever tests start: this package, not one that is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([ROOT, *inherited]))
    asked, found = os.environ.get("MEGATRON_CORE_VERSION"), version("megatron-core")
    if asked not in (None, found):
        raise pytest.UsageError(f"megatron-core: expected {asked}, got {found}; see the Makefile")


def pytest_collection() -> None:
    import sapo_megatron.policy  # noqa: F401  before a test names Megatron; seconds, if it is new


def pytest_report_header() -> str:
    return f"megatron-core: {version('megatron-core')}"
