"""What only a GPU can be asked: memory, waits of the host, kernels that are chosen, speeds."""

import dataclasses
import gc
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapo_megatron.commands.plan.gpus import BYTES
from sapo_megatron.commands.plan.memory import GRADIENT_BYTES, OPTIMIZER_BYTES
from sapo_megatron.commands.qualify.models import make_model
from sapo_megatron.commands.qualify.policies import Result, Setting, Tiny, policy_of, recipe_for
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.objective.logprob import vocab_parallel_logprobs
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.recipe.schema import RolloutConfig
from sapo_megatron.rollout.vllm.engine import VllmEngine
from sapo_megatron.rollout.vllm.fleet import Probe
from sapo_megatron.rollout.vllm.servers import LocalServers
from sapo_megatron.sample import Sample

DENSE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""A dense model whose parts outweigh what the allocator rounds up."""
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 2,
    "vocab_size": 37984,
    "max_position_embeddings": 4096,
}
"""Two layers of Qwen3-30B-A3B, and a quarter of its vocabulary."""
LATENT = {
    **{"hidden_size": 512, "num_attention_heads": 4, "vocab_size": 32768},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "max_position_embeddings": 4096,
}
"""Latent attention with DeepSeek-V3's heads."""
SERVED = {
    **{"hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128},
}
"""A small model whose heads vLLM takes."""
PEAK_FLOPS = 989e12
"""bf16, of an H100 SXM."""


def memory(setting: Setting) -> Result:
    """Bytes that a policy and a KV cache take, each beside what the plan says of them."""
    found: Result = {}
    gc.collect()
    before = torch.cuda.memory_allocated()
    with _sized(setting, "qwen3", DENSE) as tiny:
        numbers = sum(w.numel() for c in tiny.policy.model.chunks for w in c.parameters())
        sizes = (BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES)
        found["policy planned"] = numbers * sum(size["bfloat16"] for size in sizes)
        found["policy"] = torch.cuda.memory_allocated() - before
        batch, length = 64, 2048
        config, decoder = tiny.policy.model.config, MegatronDecoder(tiny.policy.model)
        with torch.no_grad(), decoder.generating():
            tokens = torch.ones(batch, 1, dtype=torch.long, device=decoder.device)
            decoder.start(batch, 1)
            decoder.logits(tokens)  # libraries take their workspaces at the first product
            decoder.start(batch, length)
            before = torch.cuda.memory_allocated()
            decoder.logits(tokens)
            found["cache"] = torch.cuda.memory_allocated() - before
        width = 2 * config.num_query_groups * config.kv_channels * config.num_layers
        found["cache planned"] = batch * length * width * BYTES["bfloat16"]
    return found


def waits(setting: Setting) -> Result:
    """Times that the host waited for the GPU in one update, as torch can tell."""
    model = setting.folder / "waits"
    make_model("qwen3-moe", model, torch.bfloat16)
    with policy_of(recipe_for(setting, model, "bfloat16")) as tiny:
        samples = tiny.samples(given=False)
        tiny.step(samples)
        batches = tiny.batches(samples)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            tiny.step(samples)
            torch.cuda.set_sync_debug_mode("default")
        layers = tiny.policy.model.config.num_layers
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    # Counted in a simulation: in training 25 a layer and 9, for each micro-batch.
    return {"waits": count, "at most": len(batches) * (25 * layers + 9)}


def speeds(setting: Setting) -> Result:
    """Two layers of Qwen3-30B-A3B: share of the peak in an update, decoding, exporting, loading."""
    found: Result = {}
    with _sized(setting, "qwen3-moe", LARGE, tokens=8192) as tiny:
        samples = [_long(i, 2048) for i in range(4)]
        tiny.step(samples)
        seconds = _seconds(lambda: tiny.step(samples))
        active = _active(tiny)
        found["tokens/s"] = 8192 / seconds
        found["share of peak"] = 6 * active * 8192 / seconds / PEAK_FLOPS
        found["decode ms/layer"] = 1e3 * _decode_s(tiny) / 2
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            out = Path(folder) / "out"
            weights = tiny.policy.model.weights
            written = _seconds(lambda: weights.save(out))
            size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            found["export GB/s"] = size / written / 1e9
            found["load GB/s"] = size / _seconds(weights.load) / 1e9
    return found


def attention(setting: Setting) -> Result:
    """Which of Transformer Engine's attentions runs, by kind of model and what is fed."""
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

    def ran() -> str:
        kinds = ("flash", "fused", "unfused")
        return next(kind for kind in kinds if _attention_backends[f"use_{kind}_attention"])

    found: Result = {}
    for family, sizes in (("qwen3", DENSE), ("moonlight", LATENT)):
        with _sized(setting, family, sizes) as tiny:
            tiny.step([_long(0, 1024), _long(1, 512)])
            found[f"{family} update"] = ran()
            decoder = MegatronDecoder(tiny.policy.model)
            with torch.no_grad(), decoder.generating():
                decoder.start(8, 17)
                for what, length in (("prompt", 16), ("token", 1)):
                    decoder.logits(torch.ones(8, length, dtype=torch.long, device=decoder.device))
                    found[f"{family} {what}"] = ran()
    return found


def decoding_twice(setting: Setting) -> Result:
    """How long a pass of 256 tokens takes the first time, in times of the second.

    An attention that plans for every length it meets does so in the first.
    """
    steps = 256 if setting.full else 4
    with _sized(setting, "qwen3", DENSE) as tiny:
        decoder = MegatronDecoder(tiny.policy.model)

        def decode(batch: int) -> float:
            token = torch.ones(batch, 1, dtype=torch.long, device=decoder.device)
            decoder.start(batch, steps)
            return _seconds(lambda: [decoder.logits(token) for _ in range(steps)])

        with torch.no_grad(), decoder.generating():
            decode(1)  # what all sizes need once
            first, second = decode(64), decode(64)
    return {"first pass": first / second, "ms a token": 1e3 * second / steps}


def servers(setting: Setting) -> Result:
    """A vLLM server on this GPU that sleeps between two loads, with an update in between.

    After each load the probe's difference, nats per token; after each sleep, what the server keeps
    of the memory that it had taken. Raises ModuleNotFoundError where there is no vLLM.
    """
    python = sys.executable if find_spec("vllm") else "venvs/vllm/bin/python"
    if shutil.which(python) is None:
        raise ModuleNotFoundError(f"no vLLM, and no {python}", name="vllm")
    rollout = RolloutConfig(
        engine="vllm", vllm_python=python, num_servers=1, colocate=True,
        max_prompt_length=64, max_response_length=64, server_timeout_s=240.0,
    )  # fmt: skip
    found: Result = {}
    with _sized(setting, "qwen3-moe", SERVED) as tiny:
        free, model = torch.cuda.mem_get_info()[0], Path(tiny.recipe.model.path)
        recipe, out = dataclasses.replace(tiny.recipe, rollout=rollout), model.parent / "out"
        samples = tiny.samples(given=False)
        with ExitStack() as stack:
            local = stack.enter_context(LocalServers(recipe, model, model.parent / "servers", out))
            engine = VllmEngine(local.urls, rollout, read_architecture(model), exited=local.exited)
            stack.callback(engine.close)
            engine.check()
            taken = free - torch.cuda.mem_get_info()[0]
            for version, number in enumerate(("first", "second")):
                tiny.policy.model.weights.save(out)
                logprobs = tuple(tiny.logprobs(samples).tolist())
                probe = Probe(samples=samples, logprobs=logprobs, tolerance=0.05)
                found[f"{number} probe"] = max(engine.load(out, probe, version).values())
                engine.sleep()
                found[f"{number} sleep"] = (free - torch.cuda.mem_get_info()[0]) / taken
                tiny.step(samples)
    return found


def logprob_speed(setting: Setting) -> Result:
    """Milliseconds of log-probs and entropies there and back, 20480 x 37984 in bf16."""
    targets = torch.zeros(20480, dtype=torch.long, device="cuda")

    def both_ways(x: Tensor) -> None:
        logprob, entropy = vocab_parallel_logprobs(x, targets, with_entropy=True)
        assert entropy is not None
        (logprob.sum() + entropy.sum()).backward()

    def once() -> float:
        x = torch.randn(20480, 37984, device="cuda", dtype=torch.bfloat16).requires_grad_()
        return 1e3 * _seconds(lambda: both_ways(x))

    return {"ms": min(once() for _ in range(4))}


def host_adam(setting: Setting) -> Result:
    """Billions of parameters a second of torch's Adam on the host, by its threads."""
    weight = torch.nn.Parameter(torch.zeros(50_000_000))
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.AdamW([weight])
    adam.step()
    before, found = torch.get_num_threads(), {}
    for threads in (1, 4, 12):
        if threads <= (os.cpu_count() or 1):
            torch.set_num_threads(threads)
            found[f"{threads} threads"] = 0.05 / _seconds(adam.step)
    torch.set_num_threads(before)
    return found


@contextmanager
def _sized(
    setting: Setting, family: str, sizes: dict[str, Any], *, tokens: int = 4096
) -> Iterator[Tiny]:
    """A bf16 policy of a model of these sizes, while the block lasts."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        model = Path(folder) / "model"
        make_model(family, model, torch.bfloat16, shard="4GB", **sizes)
        recipe = recipe_for(setting, model, "bfloat16")
        train = dataclasses.replace(recipe.train, max_tokens_per_gpu=tokens)
        with policy_of(dataclasses.replace(recipe, train=train)) as tiny:
            yield tiny


def _long(uid: int, fed: int) -> Sample:
    """A sequence of which ``fed`` tokens are fed, most of them a response."""
    response = fed - 15
    return Sample(
        uid=uid,
        prompt_tokens=tuple(range(16)),
        response_tokens=[(uid + 7 * i) % 30000 for i in range(response)],
        rollout_logprobs=[-10.0] * response,
        truncated=True,
        advantage=(1.0, -0.7)[uid % 2],
    )


def _active(tiny: Tiny) -> float:
    """Parameters that one token passes, without the embedding."""
    config = tiny.policy.model.config
    share = config.moe_router_topk / config.num_moe_experts
    return sum(
        weight.numel() * (share if ".experts." in name else 1.0)
        for chunk in tiny.policy.model.chunks
        for name, weight in chunk.named_parameters()
        if "word_embeddings" not in name
    )


def _decode_s(tiny: Tiny, batch: int = 64, steps: int = 32) -> float:
    """Seconds of one token step at this batch size."""
    decoder = MegatronDecoder(tiny.policy.model)
    token = torch.ones(batch, 1, dtype=torch.long, device=decoder.device)
    with torch.no_grad(), decoder.generating():
        decoder.start(batch, 2 * steps)
        for _ in range(steps):
            decoder.logits(token)
        return _seconds(lambda: [decoder.logits(token) for _ in range(steps)]) / steps


def _seconds(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began
