"""Random weights; all tensors of a model, one after the other, on the first rank or each node."""

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


def on_nodes(weights, groups, local, out):
    """What is written where ``local`` is this rank's place on its node, and this rank's node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(local))
        nodes = parallel.nodes(groups)
        return weights.save_on_nodes(out / f"{len(nodes.firsts)}-{nodes.number}", nodes)


def streamed(cases):
    """What a rank got of two streams, what was listed before, and what it wrote for nodes.

    The model is saved as well, and written again where one thing in it has changed.
    """
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
        weights, rank = policy.model.weights, dist.get_rank()
        written = [on_nodes(weights, groups, local, out) for local in (rank, 0, 0)]
        first = {name: tensor.clone() for name, tensor in policy.model.weights.stream()}
        with torch.no_grad():
            for weight in policy.model.chunks[0].parameters():
                weight.mul_(2)
        written += [on_nodes(weights, groups, 0, out)]
        found.append((listed, first, list(policy.model.weights.stream()), written))
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
    out, (listed, got, *_), (same, nothing, *_) = results[place]
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
    _, (listed, before, after, _), _ = results[place]
    assert [name for name, _ in after] == [name for name, _, _ in listed]
    changed = {name for name, tensor in after if not torch.equal(tensor, before[name])}
    assert "model.embed_tokens.weight" in changed


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_every_node_has_the_whole_model(results, place):
    """Ranks of one node share the work, those of two bring each other what they have."""
    out, (_, before, after, one), (*_, two) = results[place]
    size = sum(tensor.nbytes for tensor in before.values())
    for first, second, again, changed in (one, two):
        assert first.bytes == second.bytes == size
        assert (first.changed, second.changed, again.changed) == (size, size, 0)
        differ = sum(int((before[n] != t).sum()) * t.itemsize for n, t in after)
        assert changed.changed == differ > 0
    for folder, expected in (("1-0", before), ("2-0", dict(after)), ("2-1", dict(after))):
        index = json.loads((out / folder / "model.safetensors.index.json").read_text())
        assert (out / folder / "config.json").exists()
        assert index["weight_map"].keys() == expected.keys()
        for file in set(index["weight_map"].values()):
            for name, tensor in load_file(out / folder / file).items():
                assert index["weight_map"][name] == file
                assert torch.equal(tensor, expected[name]), name


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
