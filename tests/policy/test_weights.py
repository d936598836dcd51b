"""Random weights; and all tensors of a model, one after the other, on the first rank."""

import json

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file

from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.policy import parallel
from sapo_megatron.policy.step import Policy
from sapo_megatron.policy.weights import save_random
from sapo_megatron.recipe.load import load
from tests.support.families import Place, make_model
from tests.support.gloo import run_ranks
from tests.support.tiny import ROOT

PLACES = [
    Place(family="qwen3-moe", world=2, tp=2, ep=2),
    Place(family="moonlight", world=2, tp=2, ep=2, dtype="bfloat16"),  # with biases in float32
    Place(family="glm-4.5", world=2, pp=2),
    Place(family="qwen3", world=2, pp=2),  # whose embedding both stages have
    Place(family="qwen3-moe", world=2),
]


def streamed(cases):
    """What a rank got of two streams, and what was listed before; the model is saved as well."""
    found = []
    for place, source, out in cases:
        groups = parallel.setup(place.recipe.parallel, seed=1)
        policy = Policy(
            place.recipe,
            read_architecture(source),
            groups,
            source,
            optimizer=place.recipe.optimizer,
            total_updates=1,
        )
        listed = policy.model.weights.listing()
        policy.model.weights.save(out)
        first = {name: tensor.clone() for name, tensor in policy.model.weights.stream()}
        with torch.no_grad():
            for weight in policy.model.chunks[0].parameters():
                weight.mul_(2)
        found.append((listed, first, list(policy.model.weights.stream())))
        policy.close()
        parallel.teardown()
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    cases = []
    for place in PLACES:
        make_model(place.family, folder / place.name, getattr(torch, place.dtype))
        cases.append((place, folder / place.name, folder / f"out-{place.name}"))
    first, second = run_ranks(2, streamed, cases)
    return {case[0]: (case[2], *found) for case, *found in zip(cases, first, second, strict=True)}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_the_stream_is_what_is_saved(results, place):
    out, (listed, got, _), (same, nothing, _) = results[place]
    expected = {}
    for file in out.glob("*.safetensors"):
        expected |= load_file(file)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert listed == same == [(name, t.dtype, t.shape) for name, t in got.items()]
    assert nothing == {}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_a_second_stream_has_the_weights_of_then(results, place):
    _, (listed, before, after), _ = results[place]
    assert [name for name, _ in after] == [name for name, _, _ in listed]
    changed = {name for name, tensor in after if not torch.equal(tensor, before[name])}
    assert "model.embed_tokens.weight" in changed


def test_the_gradient_of_every_id_of_random_weights_is_of_the_usual_size(tmp_path):
    """Also of the id that pads: transformers leaves its embedding at zero, which norms amplify."""
    recipe = load(ROOT / "recipes" / "tiny-moe-cpu.yaml")
    arch = read_architecture(recipe.model.path)
    assert arch.config["pad_token_id"] == 0
    save_random(arch, recipe.model, tmp_path / "model", seed=1)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(arch.vocab_size)
    rows = model.get_input_embeddings().weight.detach().clone().requires_grad_()
    logprobs = model(inputs_embeds=rows[:, None]).logits[:, 0].log_softmax(-1)
    logprobs[ids, (ids + 1) % arch.vocab_size].sum().backward()
    sizes = rows.grad.norm(dim=-1)
    assert sizes.min() > 0
    assert sizes.max() < 10 * sizes.median()
