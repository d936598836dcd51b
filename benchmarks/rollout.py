"""Tokens a second of a rollout, in process and on vLLM, and what handing weights over does.

    python -m benchmarks.rollout --vllm-python venvs/vllm/bin/python

One process with the model of recipes/tiny-moe-vllm-cpu.yaml, random weights, and one server, in
turns. Then the weights are changed: how far the server's log-probs of a probe are from the training
engine's before it gets the new weights, and behind that.
"""

import asyncio
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import measure
from sapo_megatron.policy import parallel, weights
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.engine import Engine, Request, SamplingParams
from sapo_megatron.rollout.generate import InProcess
from sapo_megatron.rollout.vllm.client import Server
from sapo_megatron.rollout.vllm.fleet import Probe, probe_difference
from sapo_megatron.training.engine import Following, open_engine
from sapo_megatron.training.inputs import read_inputs

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-moe-vllm-cpu.yaml"
REQUESTS, NEW_TOKENS = 256, 64


def make_recipe(vllm_python: str) -> Recipe:
    settings = {
        "rollout.vllm_python": vllm_python,
        "rollout.max_response_length": str(NEW_TOKENS),
        "parallel.tensor_model_parallel_size": "1",
        "parallel.expert_model_parallel_size": "1",
        "cold_start.steps": "0",
        "eval.num_problems": "8",
    }
    return load(RECIPE, settings)


def tokens_per_second(engine: Engine, requests: list[Request], params: SamplingParams) -> float:
    with engine.serving(version=0, record=False):
        began = time.perf_counter()
        lengths: list[int] = []
        engine.generate(requests, params, lambda s: lengths.append(len(s.response_tokens))).result()
        seconds = time.perf_counter() - began
    return sum(lengths) / seconds


async def difference_at(url: str, probe: Probe) -> float:
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as http:
        return await probe_difference(Server(url, http), probe)


def difference(policy: Policy, engine: Following) -> float:
    """Mean absolute difference of the probe's log-probs, training engine and server."""
    ours = policy.logprobs(engine._probe, engine._cut)
    probe = Probe(samples=engine._probe, logprobs=ours, tolerance=engine._tolerance)
    assert engine._servers is not None
    (url,) = (state.server.url for state in engine._servers._fleet._states)
    return asyncio.run(difference_at(url, probe))


def measured(recipe: Recipe, folder: Path, rounds: int) -> list[dict[str, Any]]:
    inputs = read_inputs(recipe, 1)
    groups = parallel.setup(recipe.parallel, seed=1)
    start = folder / "weights"
    weights.save_random(inputs.arch, recipe.model, start, seed=1)
    policy = Policy(recipe, inputs.arch, groups, start, optimizer=recipe.optimizer, total_updates=1)
    requests = [
        Request(uid=i, prompt_tokens=inputs.problems[i % 8].tokens) for i in range(REQUESTS)
    ]
    params = SamplingParams(
        temperature=1.0, top_p=1.0, max_new_tokens=NEW_TOKENS, stop_ids=(1,), seed=3
    )
    nodes = parallel.nodes(groups)
    with open_engine(recipe, inputs, policy, folder, nodes) as servers:
        assert isinstance(servers, Following)
        engines: dict[str, Engine] = {
            "in process": InProcess(MegatronDecoder(policy.model), batch_size=REQUESTS),
            "vLLM": servers,
        }
        speeds = [
            {name: tokens_per_second(engine, requests, params) for name, engine in engines.items()}
            for _ in range(rounds + 1)
        ][1:]
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in policy.model.chunks[0].parameters():
                weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator))
        before = difference(policy, servers)
        with servers.serving(version=1, record=False) as metrics:
            after = difference(policy, servers)
        handed = metrics.values()["time/sync"]
    rows: list[dict[str, Any]] = [
        {"engine": name, "tokens_per_s": statistics.median(s[name] for s in speeds)}
        for name in engines
    ]
    return [*rows, {"before": before, "after": after, "sync_s": handed}]


def main() -> None:
    parser = measure.parser(__doc__, rounds=5)
    parser.add_argument("--vllm-python", default=os.environ.get("SAPO_VLLM_PYTHON"), required=False)
    args = parser.parse_args()
    if args.vllm_python is None:
        parser.error("--vllm-python: expected a Python with vLLM; make venvs/vllm/.installed")
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(os.path.abspath(args.vllm_python))
        rows = measured(recipe, Path(folder), args.rounds)
    for row in rows[:-1]:
        print(f"{row['engine']:12}{row['tokens_per_s']:10.0f} tokens/s")
    last = rows[-1]
    print(
        f"new weights: {last['before']:.2g} nats a token before they are handed over, "
        f"{last['after']:.2g} behind it, {last['sync_s']:.2f} s"
    )
    measure.write(args, rows)


if __name__ == "__main__":
    main()
