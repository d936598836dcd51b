"""What a config.json says, and what is said about one that this package does not compute."""

import dataclasses

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import (
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    parse_architecture,
    read_architecture,
)
from tests.support.families import FAMILIES


def parsed(family, **changes):
    return parse_architecture(FAMILIES[family] | changes)


def test_the_attention_of_each_family():
    grouped = {"num_heads": 8, "head_dim": 8}
    assert {f: parsed(f).attention for f in ("qwen3", "qwen3-moe", "glm-4.5", "minimax-m2")} == {
        "qwen3": GroupedQueryAttention(num_kv_heads=4, qkv_bias=False, qk_norm=True, **grouped),
        "qwen3-moe": GroupedQueryAttention(num_kv_heads=2, qkv_bias=False, qk_norm=True, **grouped),
        "glm-4.5": GroupedQueryAttention(num_kv_heads=4, qkv_bias=True, qk_norm=False, **grouped),
        "minimax-m2": GroupedQueryAttention(
            num_kv_heads=2, qkv_bias=False, qk_norm=True, joint_norm=True, **grouped
        ),
    }
    latent = {"num_heads": 4, "kv_lora_rank": 12}
    latent |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    assert {f: parsed(f).attention for f in ("moonlight", "deepseek-v3")} == {
        "moonlight": LatentAttention(q_lora_rank=None, **latent),
        "deepseek-v3": LatentAttention(q_lora_rank=16, **latent),
    }


def test_the_width_of_a_head_follows_where_it_is_not_given():
    config = {k: v for k, v in FAMILIES["qwen3"].items() if k != "head_dim"}
    assert parse_architecture(config).attention.head_dim == 32 // 8


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("qwen3-moe", {}, (0, 1, 2, 3)),
        ("qwen3-moe", {"decoder_sparse_step": 2}, (1, 3)),
        ("qwen3-moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3,)),
        ("qwen3-moe", {"mlp_only_layers": None}, (0, 1, 2, 3)),
        ("moonlight", {}, (1, 2, 3)),
        ("moonlight", {"first_k_dense_replace": 0}, (0, 1, 2, 3)),
        ("glm-4.5", {"first_k_dense_replace": 3}, (3,)),
        ("glm-4.7-flash", {}, (1, 2, 3)),
        ("glm-4.7-flash", {"mlp_layer_types": None, "first_k_dense_replace": 2}, (2, 3)),
        (
            "glm-4.7-flash",
            {"mlp_layer_types": ["sparse", "dense"] * 2, "first_k_dense_replace": None},
            (0, 2),
        ),
        ("minimax-m2", {}, (0, 1, 2, 3)),
    ],
)
def test_which_layers_have_experts(family, changes, layers):
    assert parsed(family, **changes).experts.layers == layers


def test_the_router_of_each_family():
    assert parsed("qwen3").experts is None
    qwen = parsed("qwen3-moe").experts
    assert (qwen.number, qwen.topk, qwen.hidden_size, qwen.shared_hidden_size) == (8, 2, 16, 0)
    assert (qwen.score_function, qwen.normalised, qwen.bias) == ("softmax", True, False)
    deepseek = parsed("deepseek-v3", n_shared_experts=2).experts
    assert (deepseek.number, deepseek.topk, deepseek.shared_hidden_size) == (16, 4, 32)
    assert (deepseek.score_function, deepseek.normalised, deepseek.bias) == ("sigmoid", True, True)
    assert (deepseek.groups, deepseek.group_topk, deepseek.scaling_factor) == (4, 2, 2.446)
    minimax = parsed("minimax-m2").experts
    assert (minimax.number, minimax.topk, minimax.hidden_size) == (8, 2, 16)
    assert (minimax.score_function, minimax.normalised, minimax.bias) == ("sigmoid", True, True)
    assert (minimax.groups, minimax.scaling_factor, minimax.shared_hidden_size) == (1, 1.0, 0)


def test_layers_of_gated_delta_net():
    for family in ("qwen3-next", "qwen3.5-moe"):
        arch = parsed(family)
        assert arch.delta_net == GatedDeltaNet(
            num_key_heads=4,
            num_value_heads=8,
            key_head_dim=6,
            value_head_dim=10,
            conv_size=4,
            layers=(0, 1, 2),
        )
        assert (arch.attention.output_gate, arch.zero_centered_norm) == (True, True)
        assert (arch.experts.shared_hidden_size, arch.experts.shared_gate) == (24, True)
        assert (arch.experts.score_function, arch.experts.normalised) == ("softmax", True)
        assert arch.rope.fraction == 0.25
        assert parsed(family, partial_rotary_factor=None).rope.fraction == 0.25
        assert arch.attends(range(4)) == 1
    listed = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    assert parsed("qwen3-next", layer_types=listed).delta_net.layers == (0, 2)
    assert parsed("qwen3-next", full_attention_interval=2).delta_net.layers == (0, 2)
    assert parsed("qwen3-next", mlp_only_layers=[1]).experts.layers == (0, 2, 3)
    assert parsed("qwen3-moe").attends(range(1, 4)) == 3


def test_kimi_k2_is_deepseek_v3_under_another_name():
    kimi = FAMILIES["kimi-k2"] | {"model_type": "kimi_k2"}
    arch = parse_architecture(kimi)
    assert arch == dataclasses.replace(parsed("kimi-k2"), model_type="kimi_k2", config=kimi)


def test_rotary_positions():
    assert parsed("glm-4.5").rope.fraction == 0.5
    assert parsed("minimax-m2").rope.fraction == 0.5
    assert parsed("minimax-m2", rotary_dim=None).rope.fraction == 1.0
    assert parsed("moonlight").rope.yarn is None
    scaling = {k: v for k, v in FAMILIES["deepseek-v3"]["rope_scaling"].items() if "beta" not in k}
    yarn = parsed("deepseek-v3", rope_scaling=scaling).rope.yarn
    assert (yarn.factor, yarn.original_max_position_embeddings) == (4.0, 16)
    assert (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0)  # as transformers has it


@pytest.mark.parametrize(
    ("family", "change", "parts"),
    [
        ("qwen3", {"model_type": "gpt2"}, ["model_type", "qwen3 or qwen3_moe", "'gpt2'"]),
        (
            "qwen3",
            {"model_type": "qwen3_5_text"},
            ["none of its layers", "nearest of which is qwen3_5_moe_text"],
        ),
        ("qwen3", {"model_type": "glm_moe_dsa"}, ["sparse", "glm4_moe_lite"]),
        ("qwen3", {"model_type": "deepseek_v2"}, ["softmax", "nearest of which is deepseek_v3"]),
        (
            "qwen3",
            {"model_type": "minimax_m3"},
            ["'minimax_m3'; ", "nearest of which is minimax_m2"],
        ),
        ("qwen3", {"num_hidden_layers": None}, ["num_hidden_layers: missing"]),
        ("qwen3", {"num_hidden_layers": "x"}, ["num_hidden_layers", "'x'"]),
        ("qwen3", {"hidden_act": "gelu"}, ["hidden_act", '"silu"', '"gelu"']),
        ("qwen3", {"attention_bias": True}, ["attention_bias", "false", "true"]),
        ("qwen3", {"use_sliding_window": True}, ["use_sliding_window"]),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn"]),
        ("qwen3-moe", {"num_experts_per_tok": 9}, ["num_experts_per_tok", "experts 8", "9"]),
        ("qwen3-moe", {"norm_topk_prob": "yes"}, ["norm_topk_prob", "true or false", "'yes'"]),
        ("moonlight", {"scoring_func": "softmax"}, ["scoring_func", '"sigmoid"', '"softmax"']),
        ("moonlight", {"topk_method": "greedy"}, ["topk_method", '"noaux_tc"']),
        ("moonlight", {"norm_topk_prob": False}, ["norm_topk_prob"]),
        ("moonlight", {"kv_lora_rank": None}, ["kv_lora_rank: missing", "deepseek_v3"]),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ("qwen3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "1.0", "0.5"]),
        ("moonlight", {"index_topk": 2048}, ["index_topk", "null", "2048"]),
        (
            "deepseek-v3",
            {"rope_scaling": FAMILIES["deepseek-v3"]["rope_scaling"] | {"truncate": False}},
            ["truncate", "true", "false"],
        ),
        ("glm-4.7-flash", {"first_k_dense_replace": 2}, ["mlp_layer_types", "first_k_dense_repl"]),
        ("glm-4.7-flash", {"mlp_layer_types": ["sparse"]}, ["mlp_layer_types", "4 layers"]),
        ("glm-4.7-flash", {"mlp_layer_types": ["moe"] * 4}, ["mlp_layer_types", '"moe"']),
        ("minimax-m2", {"attn_type_list": [1, 0, 1, 1]}, ["attn_type_list", "1", "got 0"]),
        ("minimax-m2", {"qk_norm_type": "per_head"}, ["qk_norm_type", '"per_head"']),
        ("minimax-m2", {"scoring_func": "softmax"}, ["scoring_func", '"softmax"']),
        ("minimax-m2", {"use_routing_bias": False}, ["use_routing_bias"]),
        ("minimax-m2", {"shared_intermediate_size": 8}, ["shared_intermediate_size"]),
        ("minimax-m2", {"partial_rotary_factor": 0.25}, ["rotary_dim / head_dim", "0.25", "0.5"]),
        ("qwen3-next", {"layer_types": ["full_attention"] * 3}, ["layer_types", "each of the 4"]),
        ("qwen3-next", {"layer_types": ["mamba"] * 4}, ["layer_types", '"mamba"']),
        ("qwen3-next", {"full_attention_interval": None}, ["full_attention_interval: missing"]),
        ("qwen3-next", {"linear_num_value_heads": 6}, ["linear_num_value_heads", "4 key heads"]),
        ("qwen3-next", {"linear_conv_kernel_dim": 1}, ["linear_conv_kernel_dim", ">= 2"]),
        ("qwen3.5-moe", {"attn_output_gate": False}, ["attn_output_gate", "true", "false"]),
        ("qwen3.5-moe", {"norm_topk_prob": False}, ["norm_topk_prob", "true", "false"]),
        ("qwen3.5-moe", {"model_type": "qwen3_5_moe"}, ["no text_config", "qwen3_5_moe_text"]),
        ("glm-4.5", {"n_routed_experts": 0}, ["n_routed_experts", ">= 1", "0"]),
        ("qwen3", {"model_type": ["qwen3"]}, ["model_type", "got ['qwen3']"]),
        ("qwen3", {"num_hidden_layers": True}, ["num_hidden_layers", "got True"]),
        ("qwen3", {"num_hidden_layers": 4.0}, ["num_hidden_layers", "got 4.0"]),
        ("qwen3", {"rms_norm_eps": float("inf")}, ["rms_norm_eps", "finite", "got inf"]),
        ("qwen3", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "finite", "got nan"]),
        ("qwen3", {"rope_scaling": "yarn"}, ["rope_scaling", "an object", "got 'yarn'"]),
        ("qwen3", {"quantization_config": "fp8"}, ["quantization_config", "an object", "'fp8'"]),
        ("qwen3-moe", {"mlp_only_layers": 3}, ["mlp_only_layers", "a list", "got 3"]),
    ],
)
def test_a_config_json_that_is_not_supported(family, change, parts):
    with pytest.raises(UserError) as caught:
        parse_architecture(FAMILIES[family] | change, "there/config.json")
    message = str(caught.value)
    assert all(part in message for part in ["there/config.json", *parts]), message


def test_a_config_json_that_cannot_be_read(tmp_path):
    for text, part in [(None, "config.json"), ("{", ":1: not JSON"), ("[]", "a JSON object")]:
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=part):
            read_architecture(tmp_path)


def test_rope_as_transformers_5_writes_it():
    moved = {k: v for k, v in FAMILIES["qwen3"].items() if k != "rope_theta"}
    arch = parse_architecture(
        moved | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    )
    assert arch.rope.theta == 7.0
