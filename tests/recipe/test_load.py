"""A recipe: what it means, and what is said about a wrong one."""

import dataclasses
import logging
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.hf.folder import find_architecture
from sapo_megatron.recipe.check import check_architecture, check_world
from sapo_megatron.recipe.load import PEER_KEYS, keys, load, to_yaml
from sapo_megatron.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = """
model: {path: tiny}
data: {train: {tasks: [{name: chain_sum}]}}
"""
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 48,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
SERVERS = {"rollout.engine": "vllm", "rollout.servers": "[http://a]", "old_policy": "rollout"}
DENSE = {"model_type": "qwen3"}
HYBRID = {
    "model_type": "qwen3_next",
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "shared_expert_intermediate_size": 512,
}
MOONLIGHT = {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "vocab_size": 163840,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "routed_scaling_factor": 2.446,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.fixture
def write(tmp_path):
    def write(text=MINIMAL, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def refusal(path, overrides=None):
    """The message that ``load`` refuses with; one line, as every such message must be."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_are_the_papers(write):
    recipe = load(write())
    assert recipe.name == "recipe"
    assert recipe.algorithm.loss_type == "sapo"
    assert (recipe.algorithm.tau_pos, recipe.algorithm.tau_neg) == (1.0, 1.05)
    assert recipe.algorithm.loss_agg_mode == "seq-mean-token-mean"
    assert recipe.train.num_mini_batches == 4


def test_a_recipe_of_the_package_is_found_by_its_name(write, monkeypatch, tmp_path):
    """Where there is no file of that name, which wins."""
    monkeypatch.chdir(tmp_path)
    assert load("tiny-moe-cpu").cold_start.steps == 500
    write(MINIMAL + "train: {steps: 3}\n", name="tiny-moe-cpu")
    assert (load("tiny-moe-cpu").train.steps, load("tiny-moe-cpu").cold_start.steps) == (3, 0)
    assert "no such file: tiny-moe-cpu.yaml" in refusal("tiny-moe-cpu.yaml")
    assert refusal("./qwen3-30b-a3b-8gpu").endswith("no such file: qwen3-30b-a3b-8gpu")
    assert "there are deepseek-v3-671b-128gpu, " in refusal("qwen3")


def test_a_recipe_is_frozen(write):
    recipe = load(write())
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.algorithm.tau_pos = 2.0


def test_the_resolved_recipe_loads_as_itself(write, tmp_path):
    overrides = {
        "parallel.recompute_granularity": "selective",
        "recompute_modules": "[moe, mlp]",
        "data.eval": "{tasks: [{name: basic_arithmetic, options: {operators: ['+']}}], seed: 5}",
        "data.template": '"Q: {prompt}\\nA:"',
        "data.apply_chat_template": "true",
        "data.chat_template_kwargs": "{enable_thinking: false}",
        "rollout.stop_token_ids": "[3]",
        "optimizer.lr": "1e-6",
        "train.run_dir": "here",
    }
    recipe = load(write(), overrides)
    assert recipe.data.eval.seed == 5
    assert load(write(to_yaml(recipe), "resolved.yaml")) == recipe


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_project_load(recipe):
    loaded = load(recipe)
    assert loaded.name == recipe.stem
    check_architecture(loaded, find_architecture(loaded.model.path, loaded.model.architecture))


def test_paths_with_a_home_or_a_variable_in_them(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    data = "data: {train: {path: '${DISK}/a.jsonl'}}"
    recipe = load(write(f"model: {{path: ~/model}}\n{data}\ntrain: {{run_dir: $DISK/x}}"))
    assert (recipe.model.path, recipe.data.train.path) == ("/home/me/model", "/disk/a.jsonl")
    assert recipe.train.run_dir == "/disk/x"
    assert load(write(), {"train.run_dir": "~/x"}).train.run_dir == "/home/me/x"
    assert "$NOWHERE stands for nothing" in refusal(write(), {"train.run_dir": "$NOWHERE/x"})
    assert "base: expected a path" in refusal(write(MINIMAL + "base: ~whoever/x.yaml"))


def test_a_section_with_nothing_below_means_its_defaults(write):
    recipe = load(write(MINIMAL + "train:\noptimizer:\n"))
    assert recipe.train == load(write()).train
    assert "section" in refusal(write("model: {path: tiny}\ndata: {train: }"))


def test_numbers_are_numbers(write):
    assert load(write(MINIMAL + "optimizer: {lr: 2e-6}")).optimizer.lr == 2e-6
    assert load(write(), {"optimizer.lr": "3E-06"}).optimizer.lr == 3e-6
    assert load(write(), {"tau_neg": "2"}).algorithm.tau_neg == 2.0


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.steps", "abc", 'expected a whole number, got "abc"'),
        ("train.steps", "1.5", "expected a whole number, got 1.5"),
        ("train.steps", "true", "expected a whole number, got true"),
        ("tau_pos", "true", "expected a number, got true"),
        ("tau_pos", "[1]", "expected a number, got [1]"),
        ("name", "3", "expected a text (quote it), got 3"),
        ("dynamic_sampling", "1", "expected true or false, got 1"),
        ("recompute_modules", "moe", 'expected a list, got "moe"'),
        ("data.train.tasks", "[3]", "data.train.tasks.0: expected a section"),
        ("data.train.tasks", "[{name: x, options: 3}]", "expected a mapping"),
        ("data.train.tasks", "[{nam: x}]", "tasks.0.nam: no such key"),
        ("data.train.tasks", "[{weight: 1}]", "data.train.tasks.0.name: missing"),
        ("loss_type", "ppo", "expected 'sapo', 'grpo', 'gspo', 'cispo'"),
        ("replay_threshold", "-0.1", "expected a finite number >= 0 and <= 1, got -0.1"),
        ("replay_threshold", "1.5", "expected a finite number >= 0 and <= 1, got 1.5"),
        ("router_replay", "R4", "expected 'disabled', 'R2' or 'R3', got \"R4\""),
        ("router_replay", "off", "expected 'disabled', 'R2' or 'R3', got false"),
        ("decompose_every", "1.5", "expected a whole number, got 1.5"),
        ("data.train", "3", "no such key"),
        ("data.eval", "3", "expected a section"),
    ],
)
def test_a_wrong_type_says_what_is_wanted(write, key, text, expected):
    assert expected in refusal(write(), {key: text})


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "0", "-1"])
@pytest.mark.parametrize("key", ["tau_pos", "tau_neg", "optimizer.lr", "rollout.temperature"])
def test_not_a_finite_positive_number(write, key, value):
    message = refusal(write(), {key: value if value != "0" else "0.0"})
    assert key.rsplit(".", 1)[-1] in message
    assert "expected a finite number > " in message


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("rollout.top_p", "0.0", "a finite number > 0 and <= 1, got 0.0"),
        ("eval.top_p", "1.5", "a finite number > 0 and <= 1, got 1.5"),
        ("optimizer.adam_beta2", "1.0", "a finite number >= 0 and < 1, got 1.0"),
        ("optimizer.optimizer_offload_fraction", "-0.5", "a finite number >= 0 and <= 1, got -0.5"),
        ("algorithm.kl_coef", "-0.1", "a finite number >= 0, got -0.1"),
        ("algorithm.clip_ratio_c", "1.0", "a finite number > 1, got 1.0"),
        ("algorithm.clip_ratio_low", "-1.0", "a finite number > 0, got -1.0"),
        ("reward.timeout_s", ".inf", "a finite number > 0, got Infinity"),
        ("train.steps", "-1", "a whole number >= 0, got -1"),
        ("train.logprob_chunk_size", "0", "a whole number > 0, got 0"),
        ("rollout.num_generations", "1", "a whole number >= 2, got 1"),
        ("rollout.async_steps", "9", "a whole number >= 0 and <= 8, got 9"),
        ("rollout.async_steps", "true", "a whole number, got true"),
        ("parallel.virtual_pipeline_model_parallel_size", "1", "a whole number >= 2, got 1"),
        ("data.train.seed", "-3", "a whole number >= 0, got -3"),
    ],
)
def test_a_number_out_of_its_range(write, key, text, expected):
    assert refusal(write(), {key: text}) == f"{key}: expected {expected}; change it"


def test_a_number_out_of_its_range_in_a_list(write):
    message = refusal(write(), {"data.train.tasks": "[{name: a}, {name: b, weight: .nan}]"})
    assert message.startswith("data.train.tasks.1.weight: expected a finite number > 0, got NaN")


def test_stop_tokens_are_a_list_of_ids(write):
    assert load(write(), {"rollout.stop_token_ids": "[5, 3]"}).rollout.stop_token_ids == (5, 3)
    for text, place, expected in (
        ("[5, -1]", ".1", "a whole number >= 0, got -1"),
        ("[1.5]", ".0", "a whole number, got 1.5"),
        ("[true]", ".0", "a whole number, got true"),
        ("7", "", "a list, got 7"),
        ('["<|im_end|>"]', ".0", 'a whole number, got "<|im_end|>"'),
    ):
        message = refusal(write(), {"rollout.stop_token_ids": text})
        assert message == f"rollout.stop_token_ids{place}: expected {expected}; change it"


def test_template_arguments_are_a_mapping(write):
    chat = {"data.apply_chat_template": "true"}
    given = {"data.chat_template_kwargs": "{enable_thinking: false, level: [1, x]}"}
    recipe = load(write(), chat | given)
    assert recipe.data.chat_template_kwargs == {"enable_thinking": False, "level": [1, "x"]}
    message = refusal(write(), chat | {"data.chat_template_kwargs": "3"})
    assert (
        message
        == "data.chat_template_kwargs: expected a mapping (keys and values), got 3; change it"
    )


def test_every_number_has_a_lowest_value():
    def numbers(node):
        """The parts of a JSON schema that describe a number."""
        if isinstance(node, dict):
            if node.get("type") in ("integer", "number"):
                yield node
            for inner in node.values():
                yield from numbers(inner)
        elif isinstance(node, list):
            for inner in node:
                yield from numbers(inner)

    found = list(numbers(TypeAdapter(Recipe).json_schema()))
    assert len(found) > 50
    assert [n for n in found if not n.keys() & {"minimum", "exclusiveMinimum"}] == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"num_mini_batches": "7"}, ["train.num_mini_batches", "256", "got 7"]),
        ({"max_tokens_per_gpu": "2047"}, ["train.max_tokens_per_gpu", "2048", "2047"]),
        (
            {"max_tokens_per_gpu": "2047", "context_parallel_size": "2"},
            ["train.max_tokens_per_gpu", "even", "context_parallel_size 2", "2047"],
        ),
        (
            {"routing.observe": "false", "logging.dump_every": "3"},
            ["logging.dump_every", "routing.observe false", "got 3"],
        ),
        (
            {"packing": "false", "context_parallel_size": "2"},
            ["train.packing", "context_parallel_size 2"],
        ),
        ({"min_lr": "1e-3"}, ["optimizer.min_lr", "1e-06"]),
        ({"name": "a/b"}, ["name", "a/b"]),
        ({"data.template": "hello"}, ["data.template", "{prompt}"]),
        (
            {"data.chat_template_kwargs": "{enable_thinking: false}"},
            ["data.chat_template_kwargs", "enable_thinking", "set data.apply_chat_template=true"],
        ),
        (
            {
                "data.chat_template_kwargs": "{thinking: true, tokenize: true}",
                "data.apply_chat_template": "true",
            },
            ["data.chat_template_kwargs.tokenize:", "remove it"],
        ),
        (
            {"old_policy": "rollout", "router_replay": "R2"},
            ["routing.router_replay: expected disabled or R3", "old_policy rollout", "got R2"],
        ),
        (
            {"old_policy": "rollout", "rollout_is": "tis"},
            ["correction.rollout_is: expected disabled with", "got tis; change one"],
        ),
        (
            {"old_policy": "rollout", "sequence_mask_kl": "0.1"},
            ["correction.sequence_mask_kl: expected none with", "got 0.1"],
        ),
        (
            {"old_policy": "rollout", "rollout.top_p": "0.9"},
            ["rollout.top_p: expected 1.0 with", "before top-p, got 0.9"],
        ),
        ({"data.train.template": "hello"}, ["data.train.template", "{prompt}"]),
        ({"data.train.path": "x.jsonl"}, ["data.train", "tasks or path", "both"]),
        ({"data.train.tasks": "[]"}, ["data.train", "neither"]),
        ({"data.eval": "{seed: 1}"}, ["data.eval", "neither"]),
        ({"reward.function": "math_verfy"}, ["reward.function", "nearest is math_verify"]),
        (
            {"reward.function": "reasoning_gym", "data.eval.path": "x.jsonl"},
            ["reward.function", "data.eval.path"],
        ),
        (
            {"importance_sampling_level": "sequence"},
            ["importance_sampling_level", "SAPO gates each token", "GSPO"],
        ),
        (
            {"importance_sampling_level": "token", "loss_type": "gspo"},
            ["importance_sampling_level", "expected sequence", "got token"],
        ),
        (
            {"importance_sampling_level": "token", "loss_type": "vespo"},
            ["importance_sampling_level", "expected sequence", "got token", "product"],
        ),
        (
            {"clip_ratio_high": "0.3", "loss_type": "vespo"},
            ["algorithm.clip_ratio_high", "loss_type vespo", "got 0.3"],
        ),
        (
            {"rollout_is": "tis", "loss_type": "vespo"},
            ["correction.rollout_is: expected disabled with", "loss_type vespo", "got tis"],
        ),
        ({"clip_ratio_low": "0.2"}, ["algorithm.clip_ratio_low", "sapo", "soft gate"]),
        ({"clip_ratio_high": "0.3"}, ["algorithm.clip_ratio_high", "sapo", "got 0.3"]),
        ({"clip_ratio_c": "3.0"}, ["algorithm.clip_ratio_c", "sapo"]),
        ({"clip_ratio_c": "3.0", "loss_type": "gspo"}, ["algorithm.clip_ratio_c", "grpo"]),
        (
            {"replay_threshold": "0.5", "router_replay": "R2"},
            ["routing.replay_threshold", "router_replay R2", "got 0.5", "=R3"],
        ),
        ({"virtual_pipeline_model_parallel_size": "2"}, ["virtual_pipeline", "one pipeline"]),
        ({"num_layers_in_last_pipeline_stage": "2"}, ["num_layers_in_last", "one pipeline"]),
        ({"recompute_granularity": "full"}, ["recompute_method", "recompute_num_layers"]),
        (
            {"recompute_granularity": "full", "recompute_method": "uniform"},
            ["parallel.recompute_num_layers: missing"],
        ),
        ({"recompute_method": "block"}, ["parallel.recompute_method", "got 'block'"]),
        (
            {"recompute_granularity": "selective", "recompute_num_layers": "1"},
            ["parallel.recompute_num_layers", "unless recompute_granularity is full"],
        ),
        ({"recompute_modules": "[moe]"}, ["parallel.recompute_modules", "selective"]),
        (
            {"recompute_granularity": "selective", "recompute_modules": "[moes]"},
            ["parallel.recompute_modules", "nearest is moe"],
        ),
    ],
)
def test_a_broken_rule_is_named(write, overrides, parts):
    message = refusal(write(), overrides)
    assert all(part in message for part in parts), message


def test_what_other_losses_may_set(write):
    gspo = load(write(), {"loss_type": "gspo", "importance_sampling_level": "sequence"})
    assert gspo.algorithm.clip_range == (3e-4, 4e-4)
    grpo = load(write(), {"loss_type": "grpo", "clip_ratio_high": "0.28", "clip_ratio_c": "3.0"})
    assert grpo.algorithm.clip_range == (0.2, 0.28)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("algorithm: {tau_poss: 1.0}", ["algorithm.tau_poss", "nearest is algorithm.tau_pos"]),
        ("train: {tau_pos: 1.0}", ["train.tau_pos", "nearest is algorithm.tau_pos"]),
        ("tau_pos: 1.0", ["tau_pos: no such key", "nearest is algorithm.tau_pos"]),
        ("algorithm: {sapo_temperature_neg: 1}", ["called algorithm.tau_neg"]),
        ("algorithm: {policy_loss: {loss_mode: sapo}}", ["called algorithm.loss_type"]),
        ("actor: {loss_mode: sapo}", ["actor.loss_mode", "called algorithm.loss_type"]),
        (
            "actor_rollout_ref: {actor: {policy_loss: {loss_mode: sapo}}}",
            ["actor_rollout_ref.actor.policy_loss.loss_mode", "called algorithm.loss_type"],
        ),
        ("routing: {router_replay_mode: R3}", ["called routing.router_replay"]),
        (
            "actor_rollout_ref: {actor: {router_replay: {mode: R2}}}",
            ["actor_rollout_ref.actor.router_replay.mode", "nearest is routing.router_replay"],
        ),
        ("router_replay: R2", ["router_replay: no such key", "nearest is routing.router_replay"]),
        ("optimiser: {lr: 1.0e-6}", ["optimiser.lr", "nearest is optimizer.lr"]),
    ],
)
def test_an_unknown_key_is_answered_with_ours(write, text, parts):
    message = refusal(write(MINIMAL + text))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", sorted(PEER_KEYS))
def test_peers_names_lead_to_keys_that_exist(write, name):
    assert PEER_KEYS[name] in keys()
    assert PEER_KEYS[name] in refusal(write(), {name: "1"})


def test_keys_on_the_command_line(write, tmp_path, monkeypatch):
    recipe = load(write(), {"tau-pos": "1.5", "optimizer.lr": "2e-5", "loss_type": "sapo"})
    assert (recipe.algorithm.tau_pos, recipe.optimizer.lr) == (1.5, 2e-5)
    assert "cold_start.lr" in refusal(write(), {"lr": "1"})
    assert load(write(MINIMAL + "logging:"), {"wandb": "true"}).logging.wandb
    monkeypatch.chdir("/")
    here = load(write(), {"data.train.tasks": "[]", "data.train.path": "rows.jsonl"})
    assert here.data.train.path == "/rows.jsonl"
    assert "algorithm: expected a section" in refusal(write("algorithm: 3"), {"tau_pos": "1"})


def test_paths_are_relative_to_the_recipe(write, tmp_path):
    recipe = load(write("model: {path: m, tokenizer: t.model}\ndata: {train: {path: d.jsonl}}"))
    assert recipe.model.path == str(tmp_path / "m")
    assert recipe.model.tokenizer == str(tmp_path / "t.model")
    assert recipe.data.train.path == str(tmp_path / "d.jsonl")
    hub = load(write(MINIMAL), {"model.tokenizer": "Qwen/Qwen3-30B-A3B"})
    assert hub.model.tokenizer == "Qwen/Qwen3-30B-A3B"


@pytest.mark.parametrize(
    "name", ["owner/name", "Owner-1/na.me", "owner/name/data/train-*.parquet", "owner/name/en/"]
)
def test_names_of_datasets_are_left_alone_unless_they_are_folders_here(write, tmp_path, name):
    text = f"model: {{path: m}}\ndata: {{train: {{path: {name}}}, eval: {{path: {name}}}}}"
    data = load(write(text)).data
    assert data.train.path == data.eval.path == name
    assert load(write(MINIMAL), {"data.train.path": name, "data.train.tasks": "[]"}).data == (
        dataclasses.replace(data, eval=None)
    )
    tmp_path.joinpath(*name.split("/")[:2]).mkdir(parents=True)
    assert load(write(text)).data.train.path == str(tmp_path / name)


@pytest.mark.parametrize(
    "path", ["d/rows.jsonl", "d/rows.parquet", "rows", "./d/rows", "../d/rows", "d/*.jsonl", "/d/r"]
)
def test_other_paths_of_data_are_of_this_machine(write, tmp_path, path):
    loaded = load(write(f"model: {{path: m}}\ndata: {{train: {{path: {path}}}}}")).data.train.path
    assert loaded == str((tmp_path / path).resolve())


def test_base_recipes(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write(MINIMAL + "name: base\nalgorithm: {tau_pos: 1.5, kl_coef: 0.1}", "sub/low.yaml")
    recipe = load(write("base: sub/low.yaml\nalgorithm: {tau_pos: 1.25}\ntrain:", "top.yaml"))
    assert (recipe.algorithm.tau_pos, recipe.algorithm.kl_coef) == (1.25, 0.1)
    assert recipe.name == "top"
    assert recipe.model.path == str(tmp_path / "sub" / "tiny")
    assert "its own base" in refusal(write("base: loop.yaml", "loop.yaml"))
    message = refusal(write("base: none.yaml", "top.yaml"))
    assert "none.yaml" in message
    assert "top.yaml" in message


def test_a_section_of_the_base_can_be_taken_back(write):
    low = "model: {path: m}\ndata: {train: {path: a}, eval: {path: b}}"
    write(low, "low.yaml")
    assert load(write("base: low.yaml\ndata: {eval: null}", "top.yaml")).data.eval is None
    assert load(write("base: low.yaml\ndata:", "top.yaml")).data.eval is not None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1\nb: 2", [":2:", "expected ',' or ']'"]),
        ("model: {path: a}\nmodel: {path: b}", [":2:", "model is given twice"]),
        ("- 1", ["expected a mapping of sections, got [1]"]),
        ("", ["expected a mapping of sections, got null"]),
        ("model: {path: a}", ["data: missing"]),
        ("model: \x00", ["not YAML"]),
    ],
)
def test_a_file_that_is_no_recipe(write, text, parts):
    message = refusal(write(text))
    assert all(part in message for part in parts), message


def test_a_file_that_cannot_be_read(write, tmp_path):
    assert "no such file" in refusal(tmp_path / "none.yaml")
    assert "cannot read" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    assert "cannot read" in refusal(tmp_path / "latin.yaml")


def test_yaml_anchors_work(write):
    text = (
        "model: {path: m}\ndata:\n  train: &t {tasks: [{name: a}], seed: 1}\n"
        "  eval: {<<: *t, seed: 2}"
    )
    data = load(write(text)).data
    assert (data.train.seed, data.eval.seed) == (1, 2)
    assert data.train.tasks == data.eval.tasks


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        ({}, []),
        ({"tau_neg": "0.9"}, ["tau_neg 0.9 < algorithm.tau_pos 1"]),
        ({"num_mini_batches": "1"}, ["num_mini_batches is 1"]),
        ({"num_mini_batches": "1", "old_policy": "rollout"}, []),
        ({"tau_neg": "0.9", "num_mini_batches": "1"}, ["tau_neg", "num_mini_batches"]),
        ({"tau_neg": "0.9", "num_mini_batches": "1", "loss_type": "grpo"}, []),
    ],
)
def test_each_warning_comes_once(write, caplog, overrides, warnings):
    with caplog.at_level(logging.WARNING):
        load(write(), overrides)
    assert len(caplog.messages) == len(warnings)
    assert all(part in said for part, said in zip(warnings, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("layout", "world_size", "parts"),
    [
        ({}, 1, None),
        ({"tensor_model_parallel_size": "4", "pipeline_model_parallel_size": "2"}, 8, None),
        ({"tensor_model_parallel_size": "2"}, 3, ["tp x pp x cp = 2", "3 processes"]),
        ({"expert_model_parallel_size": "4"}, 6, ["etp x ep x pp = 4", "6 processes"]),
        (
            {"context_parallel_size": "3", "expert_model_parallel_size": "2"},
            2,
            ["tp x pp x cp = 3", "a multiple of 6", "torchrun --nproc-per-node 6"],
        ),
        ({}, 3, ["rollout_batch_size", "256", "3 ranks"]),
    ],
)
def test_the_number_of_processes(write, layout, world_size, parts):
    recipe = load(write(), layout)
    if parts is None:
        check_world(recipe, world_size)
        return
    with pytest.raises(UserError) as caught:
        check_world(recipe, world_size)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("layout", "arch", "parts"),
    [
        ({}, {}, None),
        (
            {
                "tensor_model_parallel_size": "8",
                "pipeline_model_parallel_size": "4",
                "virtual_pipeline_model_parallel_size": "3",
                "expert_model_parallel_size": "16",
                "expert_tensor_parallel_size": "2",
            },
            {},
            None,
        ),
        (
            {"tensor_model_parallel_size": "3"},
            {},
            ["parallel.tensor", "attention heads 32", "got 3"],
        ),
        ({"server_tensor_parallel_size": "3"}, {}, ["rollout.server", "heads 32", "got 3"]),
        ({"server_tensor_parallel_size": "8"}, {}, None),
        (
            {"tensor_model_parallel_size": "4"},
            {"num_key_value_heads": 6, "num_attention_heads": 36},
            ["num_key_value_heads 6", "got 4"],
        ),
        ({"tensor_model_parallel_size": "4", "context_parallel_size": "4"}, HYBRID, None),
        (
            {"tensor_model_parallel_size": "4", "context_parallel_size": "8"},
            HYBRID,
            ["context_parallel_size", "linear_num_key_heads 16", "got 32"],
        ),
        ({"pipeline_model_parallel_size": "5"}, {}, ["48 layers", "48 over 5"]),
        ({"pipeline_model_parallel_size": "5"}, HYBRID, ["48 layers", "48 over 5"]),
        (
            {"pipeline_model_parallel_size": "4", "num_layers_in_first_pipeline_stage": "10"},
            {},
            ["48 layers", "10 on the outer stages", "38 over 3"],
        ),
        (
            {"pipeline_model_parallel_size": "4", "num_layers_in_first_pipeline_stage": "12"},
            {},
            None,
        ),
        (
            {
                "pipeline_model_parallel_size": "2",
                "num_layers_in_first_pipeline_stage": "20",
                "num_layers_in_last_pipeline_stage": "20",
            },
            {},
            ["20 + 20", "8 over 0"],
        ),
        (
            {
                "pipeline_model_parallel_size": "2",
                "num_layers_in_first_pipeline_stage": "23",
                "num_layers_in_last_pipeline_stage": "25",
            },
            {},
            None,
        ),
        ({"pipeline_model_parallel_size": "64"}, {"num_hidden_layers": 32}, ["32 over 64"]),
        (
            {"pipeline_model_parallel_size": "4", "virtual_pipeline_model_parallel_size": "5"},
            {},
            ["virtual_pipeline_model_parallel_size", "12 layers of a stage", "got 5"],
        ),
        ({"expert_model_parallel_size": "3"}, {}, ["experts 128", "got 3"]),
        ({"expert_model_parallel_size": "3"}, MOONLIGHT, ["experts 64", "got 3"]),
        ({"tensor_model_parallel_size": "3"}, MOONLIGHT, ["attention heads 16", "got 3"]),
        ({"max_response_length": "8192", "max_tokens_per_gpu": "9999"}, MOONLIGHT, ["8192"]),
        ({"expert_tensor_parallel_size": "5"}, {}, ["expert_tensor", "768", "got 5"]),
        ({"expert_model_parallel_size": "2"}, DENSE, ["without experts", "2"]),
        ({"router_replay": "R2"}, DENSE, ["routing.router_replay", "got R2"]),
        ({"router_replay": "R3"}, DENSE, ["routing.router_replay", "got R3"]),
        ({"router_replay": "R3"}, {}, None),
        ({}, DENSE, None),
        (SERVERS, {}, ["routing.observe: expected false with algorithm.old_policy rollout"]),
        (SERVERS, DENSE, None),
        (SERVERS | {"observe": "false"}, {}, None),
        (SERVERS | {"router_replay": "R3"}, {}, None),
    ],
)
def test_the_layout_against_the_model(write, layout, arch, parts):
    recipe = load(write(), layout)
    if parts is None:
        check_architecture(recipe, parse_architecture(QWEN3_30B | arch))
        return
    with pytest.raises(UserError) as caught:
        check_architecture(recipe, parse_architecture(QWEN3_30B | arch))
    assert all(part in str(caught.value) for part in parts), caught.value
