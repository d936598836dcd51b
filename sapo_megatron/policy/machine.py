"""What this machine and its packages can run; asked before any process is started.

Nothing here imports Megatron or Transformer Engine.
"""

import importlib.util
import os
import re

import torch

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import Architecture, count_parameters
from sapo_megatron.recipe.schema import ModelConfig, ParallelConfig, Recipe

UNFUSED_LENGTH = 8192
"""Tokens up to which attention in float32, which materialises all pairs, is let pass on a GPU."""


def with_transformer_engine(model: ModelConfig) -> bool:
    """Whether the model is built of Transformer Engine's layers."""
    return model.layers == "transformer_engine" or (
        model.layers == "auto" and torch.cuda.is_available()
    )


def host_threads() -> int:
    """Threads of one rank where all ranks of this machine compute on its cores at once."""
    return max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def check_machine(recipe: Recipe) -> None:
    """Raises UserError for what the recipe asks of this machine and it has not got."""
    model, parallel = recipe.model, recipe.parallel
    check_parallel(parallel)
    on_gpu = torch.cuda.is_available()
    if with_transformer_engine(model):
        _check_transformer_engine(recipe, on_gpu=on_gpu)
    elif model.attention_backend != "auto":
        raise UserError(
            f"model.attention_backend: expected auto with torch's layers, got "
            f"{model.attention_backend}, which is Transformer Engine's to choose; remove it"
        )
    if on_gpu and model.params_dtype == "float64":
        raise UserError(
            "model.params_dtype: expected float32 or bfloat16 on a GPU, got float64; change it"
        )
    if parallel.moe_token_dispatcher_type == "flex" and not (on_gpu and _installed("deep_ep")):
        raise UserError(
            "parallel.moe_token_dispatcher_type: expected alltoall without a GPU and DeepEP (the "
            "package deep_ep), got flex; remove it or install DeepEP"
        )
    if recipe.optimizer.optimizer_offload_fraction > 0 and not on_gpu:
        raise UserError(
            f"optimizer.optimizer_offload_fraction: expected 0 without a GPU to offload from, got "
            f"{recipe.optimizer.optimizer_offload_fraction:g}; remove it"
        )


def check_servers(recipe: Recipe, arch: Architecture) -> None:
    """Raises UserError for servers that are not there, or cannot be started on these GPUs."""
    r = recipe.rollout
    if made_up := [url for url in r.servers if re.search(r"\.invalid(:\d+)?$", url)]:
        raise UserError(
            f"rollout.servers: expected the URLs of running servers, got {made_up[0]}, which "
            f"stands for one; start {len(r.servers)}, of {r.server_tensor_parallel_size} GPUs "
            f"each, and give rollout.servers=[http://node7:8000,...] (docs/launch.md)"
        )
    if not (r.vllm_python and torch.cuda.is_available()):
        return
    memory, gpus = torch.cuda.get_device_properties(0).total_memory, r.server_tensor_parallel_size
    weights = count_parameters(arch) * getattr(torch, recipe.model.params_dtype).itemsize
    if weights / gpus >= r.server_share * memory:
        raise UserError(
            f"rollout.server_tensor_parallel_size: expected GPUs that hold a server's weights, got "
            f"{gpus} with {weights / 2**30:.1f} GiB of {recipe.model.params_dtype}, "
            f"{weights / gpus / 2**30:.1f} on each, where a server has {r.server_share:g} x "
            f"{memory / 2**30:.1f} GiB; raise it (sapo-megatron plan says how far)"
        )


def check_parallel(parallel: ParallelConfig) -> None:
    """Raises UserError for a layout that this machine's kind of device cannot run."""
    size = parallel.expert_tensor_parallel_size
    if size > 1 and not torch.cuda.is_available():
        raise UserError(
            f"parallel.expert_tensor_parallel_size: expected 1 without a GPU (gloo has no uneven "
            f"all-gather), got {size}; remove it"
        )


def _check_transformer_engine(recipe: Recipe, *, on_gpu: bool) -> None:
    model, rollout = recipe.model, recipe.rollout
    if not (on_gpu and _installed("transformer_engine")):
        missing = "Transformer Engine" if on_gpu else "a GPU"
        remedy = "install it (docs/install.md)" if on_gpu else "remove it"
        raise UserError(
            f"model.layers: expected torch without {missing}, got {model.layers}; {remedy}, or set "
            f"model.layers=torch for a slow reference"
        )
    longest = rollout.max_prompt_length + rollout.max_response_length
    if model.params_dtype == "float32" and longest > UNFUSED_LENGTH:
        raise UserError(
            f"model.params_dtype: expected bfloat16 with Transformer Engine for sequences of "
            f"{longest} tokens, got float32, for which it has no attention that does without a "
            f"matrix of all pairs; change it, or shorten sequences to {UNFUSED_LENGTH}"
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
