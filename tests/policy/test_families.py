"""Every family against transformers: logits, gradients, and weights that come out as they went in.

The models are tiny ones that transformers initialises and saves; the reference for gradients is
transformers' own backward pass, in fp32 as well.
"""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.families import FAMILIES, Place, make_model, measure, sequences
from tests.support.gloo import run_worlds

LAYOUTS = (
    ({"world": 4, "tp": 2, "pp": 2, "ep": 2}, [*FAMILIES]),
    (
        {"world": 2, "tp": 2, "dtype": "bfloat16"},  # in which some have weights that stay fp32
        ["qwen3", "deepseek-v3", "glm-4.5", "minimax-m2", "qwen3.5-moe"],
    ),
    ({"world": 4, "tp": 4}, ["qwen3-moe", "minimax-m2", "qwen3.5-moe"]),  # fewer heads of keys
    ({"world": 2, "pp": 2, "vpp": 2}, ["qwen3"]),  # whose embedding both ends have
    ({"world": 2, "cp": 2, "ep": 2}, ["moonlight", "qwen3-next"]),
    ({"world": 2, "tp": 2, "packing": False}, ["deepseek-v3", "minimax-m2"]),
    ({}, ["glm-4.5", "kimi-k2"]),
)
"""Each with the families that an ordinary run has there; make test-all has all of them."""
DENSE = {"qwen3"}


def places(*, dtype=None):
    """Every family under every layout, as parameters of a test."""
    found = []
    for layout, usual in LAYOUTS:
        for family in FAMILIES:
            ep = 1 if family in DENSE else layout.get("ep", 1)
            place = Place(family=family, **{**layout, "ep": ep})
            marks = () if family in usual else pytest.mark.slow
            if dtype in (None, place.dtype):
                found.append(pytest.param(place, id=place.name, marks=marks))
    return found


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """By place: the folder it wrote to, what its leader found (or a traceback), and its model."""
    chosen = {
        item.callspec.params["place"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    folder = tmp_path_factory.mktemp("families")
    models, cases = {}, []
    for i, place in enumerate(sorted(chosen, key=lambda place: place.name)):
        source = folder / f"{place.family}-{place.dtype}"
        if source not in models:
            models[source] = make_model(place.family, source, getattr(torch, place.dtype))
        out = folder / f"out{i}"
        out.mkdir()
        cases.append((place, source, out))
    jobs = [(case[0].world, case) for case in cases]
    found = {}
    for (place, source, out), ranks in zip(cases, run_worlds(measure, jobs), strict=True):
        leader = ranks
        if not isinstance(ranks, str):
            leader = next(x for x in ranks if x and x["logits"] is not None)
        found[place] = (out, leader, source, models[source])
    return found


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("place", places())
def test_logits(results, place):
    _, leader, _, model = results[place]
    assert not isinstance(leader, str), leader
    sample = sequences()[1]
    ids = torch.tensor([[*sample.prompt_tokens, *sample.response_tokens]])
    with torch.no_grad():
        expected = model(ids).logits[0, len(sample.prompt_tokens) - 1 :]
    got = torch.from_numpy(leader["logits"]).float()
    if place.dtype == "float32":
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    else:  # bf16 rounds the residual stream to 8 bits; of a router's near tie little remains
        assert (got - expected.float()).abs().median() < 0.05 * expected.float().std()


@pytest.mark.parametrize("place", places())
def test_what_comes_out_is_what_went_in(results, place):
    out, leader, source, model = results[place]
    assert not isinstance(leader, str), leader
    before, after = tensors(source), tensors(out / "weights")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        exact = tensor.float() if name.endswith("correction_bias") else tensor
        assert after[name].dtype == exact.dtype, name
        assert torch.equal(after[name], exact), name
    index = json.loads((out / "weights" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    again = transformers.AutoModelForCausalLM.from_pretrained(out / "weights")
    assert type(again) is type(model)


@pytest.mark.parametrize("place", places(dtype="float32"))
def test_gradients(results, place):
    out, leader, source, _ = results[place]
    assert not isinstance(leader, str), leader
    reference = transformers.AutoModelForCausalLM.from_pretrained(source)
    for sample in sequences():
        ids = torch.tensor([[*sample.prompt_tokens, *sample.response_tokens]])
        start = len(sample.prompt_tokens)
        logprobs = reference(ids).logits[0, start - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, start:, None])
        (-chosen.mean() / len(sequences())).backward()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    reference.save_pretrained(out / "expected")  # under the names that weights have on disk
    got, worst, sizes = tensors(out / "gradients"), 0.0, []
    for name, expected in tensors(out / "expected").items():
        if name.endswith("correction_bias"):
            continue  # no weight
        size = expected.norm()
        sizes.append(float(size))
        error = (got[name] - expected).norm() / size if size else got[name].norm()
        worst = max(worst, float(error))
    assert worst < 1e-5
    norms = leader["grad_norms"]
    assert len(norms) == 2 * place.world
    assert norms == pytest.approx([math.hypot(*sizes)] * len(norms), rel=1e-5)
