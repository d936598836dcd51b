"""Either generation's names of the keys of a ``config.json``."""

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.hf.config import in_both_spellings, tokenizer_for_both
from tests.support.families import FAMILIES

YARN = FAMILIES["deepseek-v3"]["rope_scaling"]


def renamed(family, *, without, **names):
    return {k: v for k, v in FAMILIES[family].items() if k not in without} | names


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3-moe", renamed("qwen3-moe", without=["num_experts"], num_local_experts=8)),
        ("moonlight", renamed("moonlight", without=["n_routed_experts"], num_local_experts=8)),
        (
            "qwen3",
            renamed("qwen3", without=["rope_theta"], rope_parameters={"rope_theta": 10000.0}),
        ),
        (
            "glm-4.5",
            renamed(
                "glm-4.5",
                without=["rope_theta", "partial_rotary_factor"],
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
            ),
        ),
        (
            "deepseek-v3",
            renamed(
                "deepseek-v3",
                without=["rope_theta", "rope_scaling"],
                rope_parameters={k: v for k, v in YARN.items() if k != "type"}
                | {"rope_type": "yarn", "rope_theta": 10000.0},
            ),
        ),
        ("qwen3-moe", FAMILIES["qwen3-moe"] | {"num_local_experts": 8}),
        ("qwen3", FAMILIES["qwen3"] | {"rope_parameters": {"rope_theta": 10000}}),
    ],
)
def test_either_name_says_the_same(family, config):
    expected, got = parse_architecture(FAMILIES[family]), parse_architecture(config)
    assert {**vars(got), "config": None} == {**vars(expected), "config": None}
    again = parse_architecture(in_both_spellings(config))
    assert {**vars(again), "config": None} == {**vars(expected), "config": None}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_local_experts": 16}, ["num_local_experts", "16", "num_experts", "8"]),
        ({"rope_parameters": {"rope_theta": 5e5}}, ["rope_parameters.rope_theta", "500000"]),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn"}},
            ["rope_parameters.rope_type", "yarn", "default"],
        ),
        ({"num_experts": None, "num_local_experts": "8"}, ["num_local_experts", "'8'"]),
        ({"num_experts": None}, ["num_experts: missing"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "object"]),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 0}}, ["rope_theta", "> 0"]),
    ],
)
def test_names_that_contradict_each_other(changes, parts):
    with pytest.raises(UserError) as caught:
        parse_architecture(FAMILIES["qwen3-moe"] | changes, "here/config.json")
    assert "\n" not in str(caught.value)
    for part in ["here/config.json", *parts]:
        assert part in str(caught.value)


def test_both_names_are_written():
    both = in_both_spellings(
        renamed("qwen3-moe", without=["num_experts", "rope_theta"], num_local_experts=8)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "dtype": "bfloat16"}
    )
    assert (both["num_experts"], both["num_local_experts"]) == (8, 8)
    assert (both["dtype"], both["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert (both["rope_theta"], both["rope_scaling"]) == (7.0, None)
    assert both["rope_parameters"] == {"rope_type": "default", "rope_theta": 7.0}


def test_a_tokenizer_for_both():
    written = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<think>"]}
    assert tokenizer_for_both(written) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<think>"],
        "clean_up_tokenization_spaces": False,
    }
    older = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"a": "<a>"}}
    assert tokenizer_for_both(older) == older


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("glm-4.7-flash", {"mlp_layer_types": [["dense"]] * 4}, "mlp_layer_types: expected dense"),
        ("glm-4.7-flash", {"mlp_layer_types": [None] * 4}, "mlp_layer_types: expected dense"),
        (
            "glm-4.7-flash",
            {"first_k_dense_replace": "1"},
            "first_k_dense_replace: expected a whole",
        ),
        ("glm-4.7-flash", {"first_k_dense_replace": 2}, "mlp_layer_types: expected 2"),
        ("minimax-m2", {"rotary_dim": 99}, "partial_rotary_factor: expected a share"),
        ("glm-4.5", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected a share"),
        ("qwen3", {"text_config": {"model_type": ["qwen3"]}}, "model_type: expected qwen3"),
        ("qwen3", {"text_config": {"model_type": {}}}, "model_type: expected qwen3"),
    ],
)
def test_values_of_the_wrong_kind(family, changes, part):
    with pytest.raises(UserError) as caught:
        parse_architecture(FAMILIES[family] | changes, "here/config.json")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("qwen3", {"use_cache": "yes"}, "use_cache: expected bool, got 'yes'"),
        ("qwen3", {"architectures": "Qwen3"}, "architectures: expected list"),
        (
            "qwen3",
            {"attention_dropout": "0"},
            "attention_dropout: expected a number >= 0 and <= 1000",
        ),
        ("qwen3", {"bos_token_id": 1.5}, "bos_token_id: expected a whole number >= -1"),
        ("qwen3", {"eos_token_id": ["</s>"]}, "eos_token_id: expected a whole number, or a list"),
        ("qwen3", {"use_qk_norm": "x"}, "use_qk_norm: expected bool, got 'x'"),
        ("qwen3", {"hidden_act": []}, "hidden_act: expected"),
        ("qwen3", {"initializer_range": float("inf")}, "initializer_range: expected a number"),
        ("deepseek-v3", {"num_key_value_heads": "x"}, "num_key_value_heads: expected a whole"),
        ("qwen3", {"vision_config": 3}, "vision_config: expected object"),
        ("qwen3", {"attention_bias": 0}, "attention_bias: expected false"),
        ("minimax-m2", {"shared_intermediate_size": False}, "shared_intermediate_size: expected 0"),
        ("qwen3", {"num_hidden_layers": 10**9}, "num_hidden_layers: expected a whole number >= 1"),
        ("qwen3", {"vocab_size": 10**30}, "vocab_size: expected a whole number >= 1 and <= 16777"),
        ("qwen3", {"rms_norm_eps": 2.0}, "rms_norm_eps: expected a finite number > 0 and <= 0.1"),
        ("qwen3", {"rope_theta": 1e300}, "rope_theta: expected a finite number > 0 and <= 1e+12"),
        ("qwen3", {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of"),
        ("qwen3", {"head_dim": 15}, "head_dim: expected an even number"),
        ("qwen3-moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers: expected numbers of layers"),
        ("qwen3-moe", {"mlp_only_layers": [99]}, "mlp_only_layers: expected numbers of layers"),
        ("deepseek-v3", {"n_group": 3}, "n_group: expected a divisor of"),
        ("deepseek-v3", {"topk_group": 99}, "topk_group: expected at most"),
        (
            "qwen3",
            {"num_hidden_layers": 60000, "hidden_size": 2**23, "intermediate_size": 2**23},
            "hidden_size: expected a model of fewer than 1e14 weights",
        ),
    ],
)
def test_values_that_cannot_be_meant(family, changes, part):
    with pytest.raises(UserError) as caught:
        parse_architecture(FAMILIES[family] | changes, "here/config.json")
    assert f"here/config.json: {part}" in str(caught.value)
