"""fp8 weights with a scale for each block: what the model gets of them, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.quantizers import quantizer_finegrained_fp8

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import parse_architecture, read_architecture
from sapo_megatron.hf.folder import INDEX, WeightFiles
from sapo_megatron.policy import parallel
from sapo_megatron.policy.model import Model
from tests.support.families import FAMILIES, Place, can_be_made, make_model
from tests.support.fp8 import QUANTIZATION, by_hand, quantise
from tests.support.gloo import run_ranks
from tests.support.tiny import WITHOUT_REPORT, cli, write_recipe

# transformers 5.19 takes a size that is no multiple of 128 for equal blocks: where it reads them,
# sizes are multiples, or fit into one block. Its shards are not: 192 rows, 192 columns.
EVEN = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
QWEN = EVEN | {
    "vocab_size": 104,  # the tiny tokenizer's
    **{"head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2},
    **{"moe_intermediate_size": 96, "num_experts": 4},
}
DEEPSEEK = EVEN | {
    **{"kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    **{"v_head_dim": 64, "moe_intermediate_size": 128, "n_routed_experts": 8},
}
UNEVEN = DEEPSEEK | {
    **{"hidden_size": 200, "intermediate_size": 328, "kv_lora_rank": 544, "q_lora_rank": 136},
    **{"moe_intermediate_size": 72, "v_head_dim": 50},
}
HYBRID = {
    **{"hidden_size": 200, "num_hidden_layers": 2, "full_attention_interval": 2, "head_dim": 32},
    **{"linear_key_head_dim": 24, "linear_value_head_dim": 40, "moe_intermediate_size": 72},
}
CASES = {
    "qwen3-moe": ("qwen3-moe", QWEN, torch.float32),
    "qwen3-moe, powers of two": ("qwen3-moe", QWEN, torch.float8_e8m0fnu),
    "deepseek-v3": ("deepseek-v3", DEEPSEEK, torch.float32),
    "deepseek-v3, uneven": ("deepseek-v3", UNEVEN, torch.float32),
    "deepseek-v3, uneven, bf16": ("deepseek-v3", UNEVEN, torch.bfloat16),
    "qwen3.5-moe, uneven": ("qwen3.5-moe", HYBRID, torch.float32),
    "qwen3-next, uneven": ("qwen3-next", HYBRID, torch.float32),
}
MADE = [case for case, (family, _, _) in CASES.items() if can_be_made(family)]
NAME = "model.layers.0.mlp.down_proj.weight"
SCALE = f"{NAME}_scale_inv"


def exported(cases):
    """Load each folder and write it again."""
    for place, source, out in cases:
        groups = parallel.setup(place.recipe.parallel, seed=1)
        model = Model(place.recipe, read_architecture(source), groups, source)
        model.weights.save(out)
        parallel.teardown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By case: the fp8 folder, and what its tensors are."""
    made = {}
    for number, case in enumerate(MADE):
        family, sizes, dtype = CASES[case]
        folder = tmp_path_factory.mktemp(f"fp8-{number}")
        make_model(family, folder, shard="500KB", **sizes)
        made[case] = folder, quantise(folder, FAMILIES[family] | sizes, dtype)
    return made


@pytest.fixture(scope="module")
def exports(folders, tmp_path_factory):
    """(case, ranks, dtype) -> what was loaded and written again."""
    out = tmp_path_factory.mktemp("out")
    places = {}
    for size in (1, 2):
        for dtype in ("float32", "bfloat16"):
            for number, (case, (folder, _)) in enumerate(folders.items()):
                place = Place(family=CASES[case][0], world=size, tp=size, ep=size, dtype=dtype)
                places[case, size, dtype] = place, folder, out / f"{number}-{size}-{dtype}"
        run_ranks(size, exported, [v for k, v in places.items() if k[1] == size])
    return {key: folder for key, (_, _, folder) in places.items()}


def tensors_of(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", MADE)
def test_a_model_gets_each_value_times_the_scale_of_its_block(folders, exports, case, size, dtype):
    _, expected = folders[case]
    got = tensors_of(exports[case, size, dtype])
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name
    assert got["model.layers.1.self_attn.o_proj.weight"].dtype == getattr(torch, dtype)


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 does not dequantise fp8"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if "uneven" not in case])
def test_it_is_what_transformers_makes_of_it(folders, exports, case, dtype, monkeypatch):
    """Of an export it makes the very same model, which says nothing of fp8 any more."""
    # What it wants accelerate for is placing layers on devices.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    dtype_ = getattr(torch, dtype)
    theirs = load(
        folders[case][0],
        dtype=dtype_,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    ).state_dict()
    out = exports[case, 2, dtype]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ours = load(out, dtype=dtype_).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture
def model(folders, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(folders["deepseek-v3, uneven"][0], tmp_path / "model")


def test_any_slice(folders):
    folder, expected = folders["deepseek-v3, uneven"]
    files, name = WeightFiles(folder), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    whole = expected[name]
    assert whole.shape == (576, 200)
    cuts = [0, 1, 127, 128, 129, 192, 200, 383, 384, 500, 575, 576]
    for i, start in enumerate(cuts):
        for stop in cuts[i:]:
            part = slice(start, stop)
            assert torch.equal(files.read(name, whole.shape, part), whole[part]), part
            if stop <= 200:
                both = slice(64, 320), part
                assert torch.equal(files.read(name, whole.shape, *both), whole[both]), part
    assert torch.equal(files.read(name, whole.shape), whole)
    assert torch.equal(files.read(name, whole.shape, slice(None), slice(130)), whole[:, :130])


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that is made, views (of a file that is mapped) apart."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        there, made = (
            {x.untyped_storage().data_ptr(): x.nbytes for x in tree_leaves(tensors) if is_tensor(x)}
            for tensors in (args, result)
        )
        new = [size for place, size in made.items() if place not in there]
        self.nbytes = max([self.nbytes, *new])
        return result


def test_no_more_than_the_slice_is_ever_there(tmp_path):
    """With a block more of rows, where it does not begin with one."""
    values = torch.randn(4096, 1024).to(torch.float8_e4m3fn)
    scale = torch.rand(32, 8)
    save_file({"w": values, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": QUANTIZATION}))
    files = WeightFiles(tmp_path)
    with Largest() as largest:
        part = files.read("w", (4096, 1024), slice(1000, 1100))
    assert torch.equal(part, by_hand(values, scale)[1000:1100])
    assert part.nbytes == 100 * 1024 * 4 <= largest.nbytes <= (100 + 128) * 1024 * 4


def rewrite(model, change):
    """Put other tensors into the file of the weight, or of its scale."""
    places = json.loads((model / INDEX).read_text())["weight_map"]
    for name in (NAME, SCALE):
        tensors = load_file(model / places[name])
        if change(name, tensors):
            save_file(tensors, model / places[name], metadata={"format": "pt"})


def scales(make):
    """Change the scale of the weight."""

    def change(name, tensors):
        if name == SCALE:
            tensors[name] = make(tensors[name]).contiguous()
        return name == SCALE

    return lambda model: rewrite(model, change)


def forgotten(model):
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][SCALE]
    (model / INDEX).write_text(json.dumps(index))


def unannounced(model):
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))


def other_fp8(model):
    def change(name, tensors):
        if name == NAME:
            tensors[name] = tensors[name].float().to(torch.float8_e5m2)
        return name == NAME

    rewrite(model, change)


REFUSED = {
    "no scale": (forgotten, [SCALE, "[2, 3] in BF16 or F32 or F8_E8M0", "got none"]),
    "scale of another shape": (scales(lambda s: s[:, :2]), [SCALE, "[2, 3]", "got [2, 2] in F32"]),
    "scale in another dtype": (scales(lambda s: s.half()), [SCALE, "got [2, 3] in F16"]),
    "not in config.json": (unannounced, [NAME, "no quantization_config", "F8_E4M3"]),
    "e5m2": (other_fp8, [NAME, "F8_E4M3", "got F8_E5M2", "bf16"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_do_not_fit(model, name):
    spoil, parts = REFUSED[name]
    spoil(model)
    with pytest.raises(UserError) as caught:
        WeightFiles(model)
    message = str(caught.value)
    assert all(part in message for part in [".safetensors", *parts]), message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(model, bad):
    def spoil(scale):
        scale[1, 2] = bad
        return scale

    scales(spoil)(model)
    files = WeightFiles(model)
    shape = (200, 328)
    assert torch.isfinite(files.read(NAME, shape, slice(0, 128))).all()
    with pytest.raises(UserError, match=rf"safetensors: {SCALE}: expected finite values, got 1 "):
        files.read(NAME, shape, slice(120, 130))


def test_a_weight_that_is_not_finite(model):
    def change(name, tensors):
        if name == NAME:
            tensors[name].view(torch.uint8)[3, 4] = 0x7F  # NaN in e4m3
        return name == NAME

    rewrite(model, change)
    with pytest.raises(UserError, match=rf"safetensors: {NAME}: expected finite values, got 1 "):
        WeightFiles(model).read(NAME, (200, 328))


@pytest.mark.parametrize(
    ("quantization", "got"),
    [
        ({"quant_method": "fp8"}, "fp8 with weight_block_size null"),
        (QUANTIZATION | {"weight_block_size": [64, 128]}, r"fp8 with .* \[64, 128\]"),
        *(({"quant_method": method, "bits": 4}, method) for method in ("gptq", "awq", "mxfp4")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"bits": 4}, "None"),
    ],
)
def test_other_quantisation_is_refused_by_name(quantization, got):
    config = FAMILIES["deepseek-v3"] | {"quantization_config": quantization}
    with pytest.raises(UserError, match=rf"^there: quantization_config: .* got {got}; use "):
        parse_architecture(config, "there")


def test_training_knows_nothing_of_it():
    config = FAMILIES["deepseek-v3"]
    quantised = parse_architecture(config | {"quantization_config": QUANTIZATION})
    assert quantised == parse_architecture(config)


def test_a_run_starts_from_it_and_exports_bf16(folders, tmp_path):
    source = shutil.copytree(folders["qwen3-moe"][0], tmp_path / "source")
    recipe = write_recipe(
        tmp_path,
        model={"path": str(source), "init": "pretrained", "params_dtype": "bfloat16"},
        eval={"num_problems": 2, "k": 1},
    )
    for words in (
        ["train", recipe],
        ["export", recipe, "--checkpoint", "runs/recipe/run-001", "--out", "out"],
    ):
        done = cli(*words, cwd=tmp_path, program=WITHOUT_REPORT)
        assert done.returncode == 0, done.stderr
    assert "exported in bfloat16: out\n" in done.stderr
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_of(tmp_path / "out").values())
