"""What ``test_generate`` runs on ranks: the real model as a decoder."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sapo_megatron.data.batch import pack
from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.policy import parallel, weights
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.model import Model
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.collect import Collector
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.generate import InProcess, generate
from sapo_megatron.sample import Prompt, Sample
from tests.support.tiny import write_recipe

LENGTHS = (3, 1, 9, 5, 2, 7)
PROMPTS = [tuple((7 * i + 5 * n) % 100 + 3 for i in range(n)) for n in LENGTHS]


def build(folder: Path, layout: dict[str, int], temperature: float = 1.0) -> tuple[Recipe, Any]:
    """The recipe and its model, the same random weights each time."""
    settings = {"temperature": temperature, "generation_batch_size": 3}
    if dist.get_rank() == 0:
        write_recipe(folder, rollout=settings, parallel=layout)
    dist.barrier()
    recipe = load(folder / "recipe.yaml")
    groups = parallel.setup(recipe.parallel, seed=1)
    if dist.get_rank() == 0:
        weights.save_random(
            read_architecture(recipe.model.path), recipe.model, folder / "weights", seed=3
        )
    dist.barrier()
    arch = read_architecture(recipe.model.path)
    return recipe, Model(recipe, arch, groups, folder / "weights")


def params(temperature: float = 1.0, top_p: float = 1.0) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, top_p=top_p, max_new_tokens=20, stop_ids=(1,), seed=11
    )


def check_one_rank(folder: Path) -> dict[str, float]:
    """Largest errors of decoding against the whole model at once."""
    errors = {}
    recipe, policy = build(folder, {})
    decoder = MegatronDecoder(policy)
    with decoder.generating():
        errors["incremental"] = _incremental_error(decoder)
    for temperature, name in ((1.0, "logprob"), (0.7, "logprob at 0.7")):
        parallel.teardown()
        recipe, policy = build(folder, {}, temperature)
        errors[name] = _logprob_error(policy, params(recipe.rollout.temperature, 0.8))
    errors["other temperature"] = _logprob_error(policy, params(1.0))
    return errors


def check_layouts(folder: Path, layouts: list[dict[str, int]]) -> list[list[Sample]]:
    """The samples of the same prompts on each layout."""
    results = []
    for layout in layouts:
        recipe, policy = build(folder, layout)
        groups = policy.groups
        decoder = MegatronDecoder(policy)
        collector = Collector(
            engine=InProcess(decoder, batch_size=3),
            tokenizer=load_tokenizer(recipe.model.tokenizer, 104),
            stop_ids=(1,),
            scorer=Half() if groups.is_leader else None,
            part=groups.dp_cp.rank(),
            parts=groups.dp_cp.size(),
            world=groups.world,
        )
        prompts = [Prompt(uid=i, text="", answer="", tokens=t) for i, t in enumerate(PROMPTS)]
        # 15 responses: where two ranks share them, one has a filler.
        found = collector.respond(prompts[:5], 3, params(), version=0).groups
        results.append([s for g in found for s in g.samples])
        parallel.teardown()
        dist.barrier()
    return results


class Half:
    """A scorer."""

    def begin(self, prompt: Any, sample: Any) -> Any:
        from sapo_megatron.rollout.reward import Scoring

        sample.reward = 0.5
        return Scoring(prompt, sample, None)

    def finish(self, begun: Any) -> Any:
        from sapo_megatron.metrics import Metrics

        return Metrics()


@torch.no_grad()
def _incremental_error(decoder: MegatronDecoder) -> float:
    """Of logits after every token, fed in pieces and ragged as generation does."""
    (model,) = decoder.chunks
    tokens = torch.randint(3, 104, (4, 17), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(17).expand(4, -1)
    future = torch.ones(17, 17, dtype=torch.bool).triu(1)[None, None]
    whole = model(tokens, positions, future, runtime_gather_output=True)[..., :104]
    decoder.start(4, 17)
    error, fed = 0.0, 0
    for piece in (5, *[1] * 12):
        logits = decoder.logits(tokens[:, fed : fed + piece])
        fed += piece
        error = max(error, (logits - whole[:, fed - 1]).abs().max().item())
    return error


def _logprob_error(policy: Model, p: SamplingParams) -> float:
    """Between the log-probs that generation records and those of the training engine."""
    decoder = MegatronDecoder(policy)
    requests = [Request(uid=i, prompt_tokens=t) for i, t in enumerate(PROMPTS)]
    with decoder.generating():
        samples = generate(decoder, requests, p, batch_size=4)
    batch = pack(samples)
    (forward,) = policy.forward([batch])
    return (forward.logprob - batch.rollout_logprob)[batch.mask].abs().max().item()
