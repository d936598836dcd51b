"""The same weights in two engines: what rounding does to log-probs, and what replay takes away.

    python -m benchmarks.studies.router_law.engines [MODEL ...]

A rollout in fp32, in bf16, or in bf16 with weights in block-scaled fp8 samples responses to
held-out text through the project's own decoder, with routes; a trainer in fp32 or bf16 reads them
with its own experts, with the rollout's (R3), and with those that its scores bear out
(``routing.replay_threshold``). Writes ``results/engines-*.json``.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.studies.router_law import CACHE, RESULTS
from benchmarks.studies.router_law.changes import is_in_fp8, quantised
from benchmarks.studies.router_law.measure import Read, by_layer, point, read, summed
from benchmarks.studies.router_law.models import Dtype, folder_of, opened, recipe_of
from benchmarks.studies.router_law.text import sequences, stdlib
from sapo_megatron.data.batch import micro_batches
from sapo_megatron.files import whole_folder, write_whole
from sapo_megatron.hf import fp8
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.model import Model
from sapo_megatron.policy.routers import ModelRouters
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.generate import generate
from sapo_megatron.sample import PackedBatch, Sample

logger = logging.getLogger(__name__)

ROLLOUTS: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
TRAINERS: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}
THRESHOLDS = (0.5, 0.8, 0.95)
PROMPTS, PROMPT, RESPONSE = 128, 32, 96
"""Responses, and tokens of a prompt and a response."""


def in_fp8(folder: Path, cache: Path = CACHE) -> Path:
    """The model with its matrices in fp8, as such models are published."""
    target = cache / f"{folder.name}-fp8"
    if target.exists():
        return target
    with whole_folder(target) as temporary:
        for path in folder.iterdir():
            if path.suffix != ".safetensors":
                (temporary / path.name).write_bytes(path.read_bytes())
                continue
            tensors = load_file(path)
            for name, tensor in list(tensors.items()):
                if is_in_fp8(name, tensor):
                    tensors[name], tensors[f"{name}{fp8.SCALE}"] = quantised(tensor)
            save_file(tensors, temporary / path.name, metadata={"format": "pt"})
        for index in temporary.glob("*.index.json"):
            index.unlink()  # one file has them all
        config = json.loads((temporary / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "fp8",
            "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
        }
        (temporary / "config.json").write_text(json.dumps(config))
    return target


def sampled(folder: Path, dtype: Dtype) -> list[Sample]:
    """Responses with log-probs and routes of the engine that made them."""
    prompts = sequences(stdlib(held_out=True), PROMPTS, PROMPT - 1, seed=77)
    requests = [
        Request(uid=s.uid, prompt_tokens=(*s.prompt_tokens, *s.response_tokens)) for s in prompts
    ]
    params = SamplingParams(
        temperature=1.0, top_p=1.0, max_new_tokens=RESPONSE, stop_ids=(0,), seed=9
    )
    with opened(folder, router="own", recipe=recipe_of(folder, dtype=dtype)) as policy:
        decoder = MegatronDecoder(policy.model)
        with decoder.generating(record=True):
            return generate(decoder, requests, params, batch_size=PROMPTS)


def compared(folder: Path, dtype: Dtype, samples: Sequence[Sample]) -> dict[str, Any]:
    """A trainer that reads what a rollout has sampled."""
    recipe = recipe_of(folder, dtype=dtype)
    with opened(folder, router="own", recipe=recipe) as policy:
        model = policy.model
        batches = micro_batches(samples, policy.groups.micro_batching(recipe))
        rollout = as_read(model, batches)
        free, held = read(model, batches), read(model, batches, held=rollout)
        found = point(summed(model, batches, rollout, held, free))
        found["router_flip_by_layer"] = by_layer(batches, rollout, free)
        layers = model.routers.moe_layers
        for threshold in THRESHOLDS if layers else ():
            model.routers = ModelRouters(model.chunks, model.config, layers, threshold=threshold)
            held = read(model, batches, held=rollout)
            numbers = point(summed(model, batches, rollout, held, held))
            found.setdefault("graded", {})[f"{threshold:g}"] = {
                name: numbers[name] for name in ("var_a", "kl_held", "k3_held", "extreme_held")
            }
    return found


def as_read(model: Model, batches: Sequence[PackedBatch]) -> Read:
    """The rollout's own pass."""
    experts = [
        model.view.rollout_routes(batch).experts if model.routers.layers else None
        for batch in batches
    ]
    return Read([batch.rollout_logprob for batch in batches], experts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    names = parser.parse_args().names or ["base", "dense", "sigmoid, biased"]
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    for name in names:
        path = RESULTS / f"engines-{name.replace(', ', '-').replace(' ', '-')}.json"
        folder = folder_of(name)
        found = json.loads(path.read_text())["pairs"] if path.exists() else {}
        for rollout, dtype in ROLLOUTS.items():
            pairs = {f"{rollout} rollout, {trainer} trainer": t for trainer, t in TRAINERS.items()}
            if pairs.keys() <= found.keys():
                continue
            samples = sampled(in_fp8(folder) if rollout == "fp8" else folder, dtype)
            found |= {pair: compared(folder, trainer, samples) for pair, trainer in pairs.items()}
            write_whole(path, json.dumps({"model": name, "pairs": found}, indent=1) + "\n")
            logger.info("%s: %s rollout", name, rollout)


if __name__ == "__main__":
    main()
