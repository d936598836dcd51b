"""The text model of one that also sees: trained, and exported alone, with the logits it had."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.hf.folder import WeightFiles
from tests.support.families import FAMILIES, Place, fill, measure, sequences
from tests.support.gloo import run_ranks

VISION = {"hidden_size": 16, "num_heads": 2, "depth": 1, "intermediate_size": 16, "patch_size": 2}
QWEN = {**VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
KIMI = {**VISION, "num_attention_heads": 2, "num_hidden_layers": 1}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
WRAPPERS = {
    "glm4v_moe": ("glm-4.5", "glm4v_moe_text", {**VISION, "out_hidden_size": 32}, MROPE),
    "qwen3_vl": ("qwen3", "qwen3_vl_text", QWEN, {**MROPE, "mrope_section": [2, 1, 1]}),
    "kimi_k25": ("kimi-k2", "deepseek_v3", KIMI, None),
    "qwen3_5_moe": ("qwen3.5-moe", "qwen3_5_moe_text", QWEN, {**MROPE, "mrope_section": [1, 1, 0]}),
}
"""Name -> the family of its text model, that model's name, vision, and rotary positions."""
VISIBLE = {
    "glm4v_moe": {"model.visual"},
    "qwen3_vl": {"model.visual"},
    "kimi_k25": {"vision_tower", "mm_projector", "model.mm_projector"},
    "qwen3_5_moe": {"model.visual", "mtp"},
}
"""What is left out of each."""


def fused(tensors):
    """The experts of a layer as one tensor, as they are on the hub."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match is None:
            found[name] = tensor
        else:
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
    for name, parts in experts.items():
        gate, up, down = (
            torch.stack([parts[part][i] for i in range(len(parts[part]))])
            for part in ("gate", "up", "down")
        )
        found |= {f"{name}.gate_up_proj": torch.cat((gate, up), 1), f"{name}.down_proj": down}
    return found


@pytest.fixture(params=WRAPPERS)
def wrapped(request, tmp_path):
    """A folder with such a model, and the model."""
    family, kind, vision, rope = WRAPPERS[request.param]
    text = {**FAMILIES[family], "model_type": kind}
    if rope:
        del text["rope_theta"]
        text["rope_parameters"] = rope
    config = transformers.AutoConfig.for_model(
        request.param,
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    fill(model)
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    # transformers 5.19 writes the layers of Kimi's text model as the blocks of its vision.
    blocks, layers = "language_model.model.blocks.", "language_model.model.layers."
    tensors = {k.replace(blocks, layers): x for k, x in load_file(file).items()}
    if request.param == "qwen3_5_moe":
        tensors = fused(tensors) | {"mtp.fc.weight": torch.zeros(2, 2)}
    save_file(tensors, file)
    return tmp_path / "whole", model, family


def test_the_text_model_is_trained_and_exported_alone(wrapped, tmp_path):
    folder, model, family = wrapped
    arch = read_architecture(folder)
    (found,) = run_ranks(1, measure, Place(family=family), folder, tmp_path)
    sample = sequences()[1]
    ids = torch.tensor([[*sample.prompt_tokens, *sample.response_tokens]])
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert type(alone).__name__ == arch.config["architectures"][0]
    with torch.no_grad():
        expected, exported = model(input_ids=ids).logits[0], alone(ids).logits[0]
    got = torch.from_numpy(found["logits"])
    torch.testing.assert_close(got, expected[len(sample.prompt_tokens) - 1 :], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
    assert (
        json.loads((tmp_path / "weights" / "config.json").read_text())
        .keys()
        .isdisjoint({"vision_config", "text_config"})
    )
    left_out = WeightFiles(folder).left_out(arch).split("; ")
    assert {part.split(" ")[0] for part in left_out} == VISIBLE[model.config.model_type]
    assert WeightFiles(tmp_path / "weights").left_out(arch) == ""
