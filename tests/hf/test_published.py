"""The reader of architectures on configurations as they were published."""

import json

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import LatentAttention, parse_architecture
from sapo_megatron.hf.config import in_both_spellings
from sapo_megatron.hf.folder import end_tokens
from tests.support.tiny import ROOT

FILES = {
    path.parent.name: path
    for folder in (ROOT / "recipes" / "models", ROOT / "tests" / "data" / "configs")
    for path in sorted(folder.glob("*/config.json"))
}
REFUSED = {
    "kimi-k2.5": ["quantization_config", "compressed-tensors"],
    "qwen3-vl-235b-a22b": ["'qwen3_vl_moe_text'", "one tensor on disk", "qwen3_moe"],
}
"""By what is said of them."""


def read(name, **changes):
    path = FILES[name]
    return parse_architecture(json.loads(path.read_text()) | changes, path)


@pytest.mark.parametrize("name", [name for name in FILES if name not in REFUSED])
def test_it_is_one_of_ours_also_as_it_is_exported(name):
    arch = read(name)
    again = parse_architecture(in_both_spellings(arch.config))
    assert {**vars(again), "config": None} == {**vars(arch), "config": None}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name):
    with pytest.raises(UserError) as caught:
        read(name)
    assert all(part in str(caught.value) for part in REFUSED[name]), caught.value


def test_what_is_special_of_each():
    flash, minimax, kimi = map(
        read, ("glm-4.7-flash-30b-a3b", "minimax-m2-230b-a10b", "kimi-k2-1026b-a32b")
    )
    assert isinstance(flash.attention, LatentAttention)
    assert flash.experts.layers == tuple(range(1, 47))
    assert (minimax.rope.fraction, minimax.attention.joint_norm) == (0.5, True)
    assert minimax.experts.layers == tuple(range(62))
    assert (kimi.rope.yarn.factor, kimi.rope.yarn.beta_fast, kimi.experts.groups) == (32.0, 1.0, 1)
    assert read("qwen3-coder-30b-a3b").rope.theta == 1e7


def test_what_is_special_of_gated_delta_net():
    for name, layers, heads in (
        ("qwen3.5-35b-a3b", 40, 32),
        ("qwen3.5-122b-a10b", 48, 64),
        ("qwen3.5-397b-a17b", 60, 64),
        ("qwen3-next-80b-a3b", 48, 32),
    ):
        arch = read(name)
        delta_net = arch.delta_net
        assert set(range(layers)) - set(delta_net.layers) == set(range(3, layers, 4))
        assert (delta_net.num_key_heads, delta_net.num_value_heads) == (16, heads)
        assert (arch.rope.theta, arch.rope.fraction) == (1e7, 0.25)
        assert "vision_config" not in arch.config


def test_the_text_of_a_model_that_also_sees():
    arch = read("qwen3-vl-8b")
    assert (arch.model_type, arch.num_layers, arch.rope.theta) == ("qwen3", 36, 5e6)
    assert arch.config["architectures"] == ["Qwen3ForCausalLM"]
    assert "vision_config" not in arch.config
    exported = in_both_spellings(arch.config)
    assert exported["rope_scaling"] is None
    assert exported["rope_parameters"].keys() == {"rope_type", "rope_theta"}
    assert read("qwen3-vl-8b", tie_word_embeddings=True).tied_embeddings


def test_layers_and_rotary_positions_have_both_names_in_an_export():
    flash = in_both_spellings(read("glm-4.7-flash-30b-a3b").config)
    assert flash["mlp_layer_types"] == ["dense"] + ["sparse"] * 46
    assert flash["first_k_dense_replace"] == 1
    del flash["first_k_dense_replace"]
    assert in_both_spellings(flash)["first_k_dense_replace"] == 1
    minimax = in_both_spellings(read("minimax-m2-230b-a10b").config)
    assert minimax["rope_parameters"]["partial_rotary_factor"] == 0.5
    del minimax["rotary_dim"]
    assert in_both_spellings(minimax)["rotary_dim"] == 64


@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        ("qwen3-30b-a3b", "qwen3-30b-a3b", {151643, 151645}),
        ("glm-4.7", "glm-4.7-355b-a32b", {151329, 151336, 151338}),
    ],
)
def test_every_token_that_ends_a_response(name, model, expected):
    assert {*end_tokens(ROOT / "tests" / "data" / "configs" / name, read(model))} == expected
