"""New weights in models that vLLM packs, or cuts, in other ways than that of test_servers.py."""

import json
import os
import shutil
from contextlib import closing

import pytest

from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.vllm.servers import LocalServers
from tests.support.families import make_model
from tests.support.fp8 import quantise
from tests.support.tiny import write_recipe
from tests.vllm.test_servers import (
    changed,
    make_engine,
    params,
    probe_of,
    requests,
    sampled,
    worst,
)


@pytest.mark.parametrize(
    ("family", "fp8", "workers"),
    [("qwen3", False, 1), ("glm-4.5", False, 1), ("qwen3", True, 1), ("qwen3-moe", False, 2)],
    ids=["tied embeddings", "shared experts, biases", "servers start from fp8", "two workers"],
)
def test_weights_are_right_after_every_load(family, fp8, workers, tmp_path):
    """Of two workers each has a half of every layer, packed: the log-probs need both."""
    sizes = {"head_dim": 32, "hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 104}
    sizes["max_position_embeddings"] = 256
    first = make_model(family, tmp_path / "0", **sizes)
    models = [first, changed(first, tmp_path / "1", seed=1)]
    start = tmp_path / "0"
    if fp8:
        start = shutil.copytree(start, tmp_path / "fp8")
        quantise(start, json.loads((start / "config.json").read_text()))
    rollout = {
        "engine": "vllm",
        "vllm_python": os.environ["SAPO_VLLM_PYTHON"],
        "max_prompt_length": 192,
        "max_response_length": 64,
        "server_timeout_s": 600.0,
        "server_tensor_parallel_size": workers,
    }
    recipe = load(write_recipe(tmp_path, rollout=rollout, train={"max_tokens_per_gpu": 256}))
    with LocalServers(recipe, start, tmp_path / "servers", tmp_path / "gone") as servers:
        with closing(make_engine(recipe, start, servers)) as engine:
            engine.check()
            for number in (0, 1, 0):
                found = engine.load(tmp_path / str(number), probe_of(models[number]), number)
                assert max(found.values()) < 1e-5
            samples = sampled(engine, requests(4), params(1.0))
        assert worst(models[0], samples, 1.0) < 1e-4
