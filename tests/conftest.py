"""Says which release of megatron-core is tested, and stops where another one was asked for."""

import os
from importlib.metadata import version

import pytest

import sapo_megatron.policy  # noqa: F401  before a test names Megatron

# Real vLLM servers, which make test-vllm has an environment for.
collect_ignore = [] if "SAPO_VLLM_PYTHON" in os.environ else ["on_vllm"]


def pytest_configure() -> None:
    asked, found = os.environ.get("MEGATRON_CORE_VERSION"), version("megatron-core")
    if asked not in (None, found):
        raise pytest.UsageError(f"megatron-core: expected {asked}, got {found}; see the Makefile")


def pytest_report_header() -> str:
    return f"megatron-core: {version('megatron-core')}"
