"""A server that the runs of a file share."""

import os

import pytest

from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.vllm.servers import LocalServers
from tests.support.tiny import write_recipe

ARCH = {"head_dim": 32}
"""vLLM's attention on CPUs takes no smaller heads."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A server that no run has started."""
    folder = tmp_path_factory.mktemp("servers")
    rollout = {"engine": "vllm", "vllm_python": os.environ["SAPO_VLLM_PYTHON"]}
    recipe = load(write_recipe(folder, arch=ARCH, rollout={**rollout, "max_response_length": 96}))
    with LocalServers(recipe, folder / "model", folder / "servers", folder / "weights") as local:
        yield local
