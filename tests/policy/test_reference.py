"""The reference that every layout is compared with, itself compared with transformers."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import reference
from tests.support.layouts import Layout
from tests.support.minibatches import MODELS, make_reference, random_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, arch in MODELS.items():
        random_weights(arch, folder / name)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(folders, model):
    folder = folders / model
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    arch = json.loads((folder / "config.json").read_text())
    for length in (1, 17):
        ids = torch.arange(length) * 7 % 61
        with torch.no_grad():
            expected = theirs(ids[None]).logits[0]
            got, routers = reference.forward(weights, arch, ids)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
        assert len(routers) == sum(f"model.layers.{i}.mlp.gate.weight" in weights for i in range(4))


def test_no_route_is_close_to_a_tie(folders):
    """fp32 and fp64 choose the same experts, so their gradients can be compared."""
    for model in MODELS:
        for batch in ("ragged", "same"):
            outcome = make_reference(Layout(model=model, batch=batch), folders / model)
            assert outcome.route_margin > 1e-4


def test_sapo_loss_by_hand():
    """f(1) = 2 / tau with slope 1; f' has halved at |r - 1| = 1.7627 (tau 1.0), 1.6788 (1.05)."""
    objective = reference.Objective()
    for advantage, tau, half in ((2.0, 1.0, 2.7627), (-2.0, 1.05, 2.6788)):
        log_ratio = torch.tensor([0.0, math.log(half)], dtype=torch.float64, requires_grad=True)
        losses = reference._token_loss(log_ratio, advantage, objective)
        assert losses[0].item() == pytest.approx(-2 / tau * advantage)
        (gradient,) = torch.autograd.grad(losses.sum(), log_ratio)
        assert gradient[0].item() == pytest.approx(-advantage)
        assert gradient[1].item() == pytest.approx(-0.5 * half * advantage, rel=1e-4)


def test_mean_over_sequences_and_over_tokens():
    """Token losses 1, 3 and 5: (2 + 5) / 2 over sequences, 9 / 3 over tokens."""
    losses = [torch.tensor([1.0, 3.0]), torch.tensor([5.0])]
    assert reference._mean(losses, reference.Objective()).item() == 3.5
    assert reference._mean(losses, reference.Objective(aggregation="tokens")).item() == 3.0
