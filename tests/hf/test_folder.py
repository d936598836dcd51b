"""Model folders: what is read from them, and what is said about one that is wrong."""

import errno
import json
import shutil

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.hf.architecture import LatentAttention, read_architecture
from sapo_megatron.hf.folder import (
    INDEX,
    WeightFiles,
    check_inside,
    check_same,
    find_architecture,
    find_model,
)
from sapo_megatron.policy import parallel, weights
from sapo_megatron.policy.model import Model
from sapo_megatron.recipe.load import load
from sapo_megatron.training.inputs import preflight
from tests.support.families import FAMILIES, Place, can_be_made, make_model
from tests.support.gloo import run_ranks
from tests.support.tiny import TOKENIZER, cli, write_recipe
from tests.support.whole_runs import command

FAMILY = "qwen3-moe"
TENSOR = "model.layers.1.self_attn.q_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(FAMILY, folder)
    return folder


@pytest.fixture
def model(whole, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "model")


def file_of(model, tensor=TENSOR):
    return model / json.loads((model / INDEX).read_text())["weight_map"][tensor]


def rewrite(model, change):
    """Put other values into the file of ``TENSOR``."""
    path = file_of(model)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(model):
    data = file_of(model).read_bytes()
    file_of(model).write_bytes(data[: len(data) // 2])


def without_index(model):
    (model / INDEX).unlink()
    for path in model.glob("*.safetensors"):
        path.unlink()


def set_nan(tensors):
    tensors[TENSOR][3, 4] = float("nan")


def reshape(tensors):
    tensors[TENSOR] = tensors[TENSOR][:-1].contiguous()


def eighth(tensors):
    tensors[TENSOR] = tensors[TENSOR].to(torch.int8)


def point(model, place):
    """Have the index place the tensor there."""
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][TENSOR] = place
    (model / INDEX).write_text(json.dumps(index))


def twice(model):
    """The tensor in a second file of the index, as an export to the same folder may leave it."""
    other = next(p for p in sorted(model.glob("*.safetensors")) if p != file_of(model))
    tensors = load_file(other) | {TENSOR: torch.ones(64, 32)}
    save_file(tensors, other, metadata={"format": "pt"})


def linked(model):
    """A file of the model as a link to one elsewhere."""
    shutil.move(file_of(model), model.parent / "elsewhere.safetensors")
    file_of(model).symlink_to(model.parent / "elsewhere.safetensors")


def only(model, name):
    """No weights but those in another format."""
    without_index(model)
    (model / name).write_bytes(b"weights")


HEADERS = {
    "missing shard": (lambda m: file_of(m).unlink(), ["no such file", INDEX]),
    "truncated shard": (truncate, ["cut short or damaged", "download it again"]),
    "empty file": (lambda m: file_of(m).write_bytes(b""), ["cut short or damaged"]),
    "tensor not in its shard": (lambda m: rewrite(m, lambda t: t.pop(TENSOR)), [TENSOR]),
    "int8": (lambda m: rewrite(m, eighth), [TENSOR, "I8", "bf16"]),
    "pointer of git LFS": (
        lambda m: file_of(m).write_text(POINTER),
        [".safetensors", "git LFS", "git lfs pull"],
    ),
    "no index": (lambda m: (m / INDEX).unlink(), [INDEX, "files of weights", "got none"]),
    "file of another export": (
        lambda m: shutil.copyfile(file_of(m), m / "model-00001-of-00002.safetensors"),
        ["model-00001-of-00002.safetensors: ", INDEX, "remove it"],
    ),
    "one file beside an index": (
        lambda m: shutil.copyfile(file_of(m), m / "model.safetensors"),
        ["model.safetensors: ", INDEX, "remove it"],
    ),
    "tensor in two files": (twice, [TENSOR, "alone", "of two models"]),
    "index of a parent": (lambda m: point(m, "../x.safetensors"), [INDEX, TENSOR, "'../x.safe"]),
    "index of the root": (lambda m: point(m, "/x.safetensors"), [INDEX, TENSOR, "'/x.safe"]),
    "index of a folder": (lambda m: point(m, ".."), [INDEX, TENSOR, "'..'"]),
    "index of a number": (lambda m: point(m, 3), [INDEX, TENSOR, "got 3"]),
    "link out of the folder": (linked, ["a link to ", "elsewhere.safetensors"]),
    "GGUF": (lambda m: only(m, "model-q4.gguf"), ["*.safetensors", "got model-q4.gguf, a format"]),
    "torch's files": (
        lambda m: only(m, "pytorch_model-00001-of-00002.bin"),
        ["*.safetensors", "got pytorch_model-00001-of-00002.bin, a format"],
    ),
    "index of a list": (
        lambda m: (m / INDEX).write_text('{"weight_map": [1]}'),
        [INDEX, "weight_map", "TypeError"],
    ),
    "no weights": (without_index, ["*.safetensors", "model.init=random"]),
    "index of nothing": (lambda m: (m / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index that is no JSON": (lambda m: (m / INDEX).write_text("{"), [INDEX, "JSONDecodeError"]),
}
VALUES = {
    "NaN": (lambda m: rewrite(m, set_nan), [TENSOR, "1 that are NaN or infinite"]),
    "shape": (lambda m: rewrite(m, reshape), [TENSOR, "[64, 32]", "[63, 32]"]),
    "no such tensor": (
        lambda m: (m / "config.json").write_text(
            json.dumps(FAMILIES[FAMILY] | {"num_hidden_layers": 5})
        ),
        ["model.layers.4.", "not whole or not those of config.json"],
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_files_that_are_not_whole(model, name):
    spoil, parts = HEADERS[name]
    spoil(model)
    with pytest.raises(UserError) as caught:
        WeightFiles(model)
    message = str(caught.value)
    assert all(part in message for part in [str(model), *parts]), message
    assert "\n" not in message


def test_links_within_a_hugging_face_cache(whole, tmp_path):
    """Where files are links from snapshots/REVISION to blobs, and another model's are not."""
    ours, other = tmp_path / "models--A--B", tmp_path / "models--C--D"
    snapshot = shutil.copytree(whole, ours / "snapshots" / "0")
    for number, path in enumerate(sorted(snapshot.glob("*.safetensors"))):
        (ours / "blobs").mkdir(exist_ok=True)
        shutil.move(path, ours / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    WeightFiles(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    WeightFiles(tmp_path / "link")
    shutil.copytree(ours / "blobs", other / "blobs")
    path.unlink()
    path.symlink_to(f"../../../models--C--D/blobs/{number}")
    with pytest.raises(UserError, match=rf"{path.name}: .* got a link to .*models--C--D/"):
        WeightFiles(snapshot)


BESIDE = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "merges.txt", "tokenizer.model"),
    *("modeling.py", "tiktoken.bpe", "additional_chat_templates/tools.jinja"),
    "additional_chat_templates",
]


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("target", ["../elsewhere", "/etc/hostname", "here/../../elsewhere"])
def test_links_of_what_is_beside_weights(tmp_path, name, target):
    model = tmp_path / "model"
    (model / name).parent.mkdir(parents=True)
    (model / "here").mkdir()
    (tmp_path / "elsewhere").write_text("{}")
    (model / name).symlink_to(target if "/" not in name else model / target)
    for read in (
        lambda: find_model(str(model)),
        lambda: WeightFiles(model),
        lambda: load_tokenizer(str(model), 100),
        lambda: weights._beside_weights(model),
    ):
        with pytest.raises(UserError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(f"{model / name}: expected a file in this folder, got a link to")
        assert "\n" not in message


def test_links_within_a_folder(whole, tmp_path):
    model = shutil.copytree(whole, tmp_path / "model")
    (model / "tokenizer.json").symlink_to("config.json")
    (model / "unread").symlink_to("/etc")
    assert find_model(str(model)) == model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_file": "/etc/passwd"}, "vocab_file: expected the name of a file in this folder"),
        ({"tokenizer_file": "../x/tokenizer.json"}, "tokenizer_file: "),
        ({"merges_file": "a/../../merges.txt"}, "merges_file: "),
        ({"fast_tokenizer_files": ["../tokenizer.1.0.json"]}, "fast_tokenizer_files: "),
        ({"fast_tokenizer_files": ["tokenizer.json", "/x/tokenizer.1.json"]}, "got ['tokenizer"),
        ({"special_tokens_map_file": "/root/x.json"}, ""),  # which nobody opens
        ({"tokenizer_file": None, "fast_tokenizer_files": ["tokenizer.1.0.json"]}, ""),
        ({"name_or_path": "/home/x/model"}, ""),
        ([1], ""),
    ],
)
def test_names_in_a_tokenizers_settings(tmp_path, settings, said):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if not said:
        check_inside(tmp_path)
        return
    with pytest.raises(UserError) as caught:
        check_inside(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer_config.json'}: ")
    assert said in str(caught.value)


FOLDERS = {
    "adapter": (
        lambda m: (m / "adapter_config.json").write_text("{}"),
        ["adapter_config.json: ", "merge"],
    ),
    "GGUF without config.json": (
        lambda m: (only(m, "model-q4.gguf"), (m / "config.json").unlink()),
        ["*.safetensors", "got model-q4.gguf, a format"],
    ),
    "tokenizer that git LFS has not fetched": (
        lambda m: (m / "tokenizer.model").write_text(POINTER),
        ["tokenizer.model: ", "git lfs pull"],
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_no_model(model, name):
    spoil, parts = FOLDERS[name]
    assert find_model(str(model)) == model
    spoil(model)
    for find in (find_model, lambda path: find_architecture(path, None)):
        with pytest.raises(UserError) as caught:
            find(str(model))
        message = str(caught.value)
        assert all(part in message for part in [str(model), *parts]), message
        assert "\n" not in message


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"expected a folder, got the file .*model\.gguf; "):
        find_model(str(tmp_path / "model.gguf"))


def messages(folders):
    """What loading each folder is refused with, on this rank."""
    found = []
    for folder in folders:
        recipe = Place(family=FAMILY, tp=2, ep=2).recipe
        groups = parallel.setup(recipe.parallel, seed=1)
        try:
            Model(recipe, read_architecture(folder), groups, folder)
            found.append("")
        except UserError as error:
            found.append(str(error))
        parallel.teardown()
    return found


def test_values_that_are_not_what_they_should_be(whole, tmp_path):
    """Every rank is told, also those that do not read the tensor."""
    folders = []
    for i, (spoil, _) in enumerate(VALUES.values()):
        folders.append(shutil.copytree(whole, tmp_path / str(i)))
        spoil(folders[-1])
    first, second = run_ranks(2, messages, [whole, *folders])
    assert first == second
    assert first[0] == ""
    for message, (_, parts) in zip(first[1:], VALUES.values(), strict=True):
        assert all(part in message for part in parts), message
        assert "\n" not in message


def bytes_read(model):
    """What this rank reads of the files, and what its piece of the model holds."""
    read = WeightFiles.read
    sizes = []

    def counted(self, *args):
        values = read(self, *args)
        sizes.append(values.nbytes)
        return values

    WeightFiles.read = counted
    recipe = Place(family=FAMILY, tp=2, ep=2).recipe
    groups = parallel.setup(recipe.parallel, seed=1)
    policy = Model(recipe, read_architecture(model), groups, model)
    held = sum(w.nbytes for chunk in policy.chunks for w in chunk.parameters())
    parallel.teardown()
    return sum(sizes), held, max(sizes)


def test_a_rank_reads_its_piece_and_no_more(whole):
    total = sum(t.nbytes for path in whole.glob("*.safetensors") for t in load_file(path).values())
    for read, held, largest in run_ranks(2, bytes_read, whole):
        assert read <= held < 0.7 * total  # the vocabulary's padding is held and not read
        assert held - read < 1000
        assert largest < 0.1 * total


def test_a_file_is_opened_once(whole, monkeypatch):
    opened = []

    def counting(path, **options):
        opened.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr("sapo_megatron.hf.folder.safe_open", counting)
    weights = WeightFiles(whole)
    for path in whole.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            half = slice(0, tensor.shape[0] // 2)
            assert torch.equal(weights.read(name, tensor.shape, half), tensor[half])
    assert sorted(opened) == sorted(whole.glob("*.safetensors"))


def export_to_a_full_disk(model, out):
    """What each rank is told when the second cannot write, and then when it can."""
    recipe = Place(family=FAMILY, ep=2).recipe
    groups = parallel.setup(recipe.parallel, seed=1)
    policy = Model(recipe, read_architecture(model), groups, model)
    save_file = weights.save_file

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == 1:
        weights.save_file = full
    try:
        policy.weights.save(out / "full")
        told = ""
    except RunFailed as error:
        told = str(error)
    dist.barrier()  # the first rank tidies up
    left = sorted(path.name for path in out.iterdir())
    dist.barrier()
    weights.save_file = save_file
    policy.weights.save(out / "whole")
    parallel.teardown()
    return told, left


def test_an_export_that_fails_leaves_nothing(whole, tmp_path):
    first, second = run_ranks(2, export_to_a_full_disk, whole, tmp_path)
    assert first == second == ("rank 1: [Errno 28] No space left on device", [])
    assert WeightFiles(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("truncated shard", ["cut short"]),
        ("missing shard", ["no such file"]),
        ("file of another export", ["remove it"]),
    ],
)
def test_training_does_not_start(model, tmp_path, name, parts):
    HEADERS[name][0](model)
    recipe = write_recipe(tmp_path, model={"path": str(model), "init": "pretrained"})
    done = cli("train", recipe, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_what_is_left_out_of_a_model_is_said(model, tmp_path, caplog):
    index = json.loads((model / INDEX).read_text())
    extra = {
        "model.layers.4.eh_proj.weight": torch.ones(2),
        "model.layers.4.enorm.weight": torch.ones(2),
        "model.visual.patch.weight": torch.ones(2),
    }
    save_file(extra, model / "extra.safetensors")
    index["weight_map"].update(dict.fromkeys(extra, "extra.safetensors"))
    (model / INDEX).write_text(json.dumps(index))
    config = json.loads((model / "config.json").read_text())
    recipe = write_recipe(tmp_path, model={"path": str(model), "init": "pretrained"})
    config = {"text_config": config | {"num_nextn_predict_layers": 1}}
    (model / "config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO"):
        preflight(load(recipe), 1)
    assert caplog.messages == [
        "of the model neither trained nor exported: layer 4, behind the last (2 tensors); "
        "model.visual (1 tensors)"
    ]


def test_a_recipe_for_another_model(whole, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(FAMILIES[FAMILY] | {"moe_intermediate_size": 24}))
    with pytest.raises(UserError, match=r"experts\.hidden_size is 16 instead of 24; "):
        find_architecture(str(whole), str(other))
    other.write_text(json.dumps(FAMILIES[FAMILY] | {"rope_theta": 5e6}))  # its own affair
    assert check_same(read_architecture(whole), str(whole), str(other)).rope.theta == 10000.0


def test_a_model_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="hf download Nobody/Nothing"):
        find_model("Nobody/Nothing")
    with pytest.raises(UserError, match=r"config\.json, got nowhere"):
        find_architecture("nowhere", None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FAMILIES["moonlight"]))
    arch = find_architecture("Nobody/Nothing", str(file))
    assert isinstance(arch.attention, LatentAttention)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: expected a JSON object, got list"):
        find_architecture("Nobody/Nothing", str(file))


def test_in_and_out_again(tmp_path):
    """A model in Hugging Face format is trained at TP2 x EP2, and transformers goes on with it."""
    source = tmp_path / "source"
    make_model("qwen3-moe", source)
    shutil.copyfile(TOKENIZER, source / "tokenizer.model")
    write_recipe(
        tmp_path,
        model={"path": "source", "init": "pretrained", "tokenizer": None},
        parallel={"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        train={"steps": 2},
        eval={"num_problems": 2, "k": 1},
    )
    export = ["export", "recipe.yaml", "--checkpoint", "runs/recipe/run-001", "--out", "out"]
    for words in (["train", "recipe.yaml"], export):
        assert run_ranks(2, command, tmp_path, words) == [(0, ""), (0, "")]
    assert (tmp_path / "out" / "tokenizer.model").exists()
    before = transformers.AutoModelForCausalLM.from_pretrained(source)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(changed[:3])
    tokens = after.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] > 3
    again = cli(*export, cwd=tmp_path)
    assert again.returncode == 2
    assert "not there yet" in again.stderr


def put(model, file, tensors):
    """More tensors, in a file of their own that the index names."""
    index = json.loads((model / INDEX).read_text())
    save_file(tensors, model / file)
    index["weight_map"].update(dict.fromkeys(tensors, file))
    (model / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.4.mlp.gate.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.experts.99.up_proj.weight",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.00.input_layernorm.weight",
        "model.visual.patch.weight",
        "mtp.layers.0.weight",
        "score.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_that_nothing_reads(model, name):
    put(model, "extra.safetensors", {name: torch.ones(2)})
    with pytest.raises(UserError, match="got one that nothing reads") as caught:
        WeightFiles(model).left_out(read_architecture(model))
    assert f"extra.safetensors: {name}: expected the tensors of the 4 layers" in str(caught.value)


def test_one_tensor_by_two_names(model):
    put(model, "extra.safetensors", {"model.language_model.norm.weight": torch.ones(2)})
    with pytest.raises(UserError, match="the files are of two models"):
        WeightFiles(model)


@pytest.mark.parametrize("family", filter(can_be_made, FAMILIES))
def test_every_tensor_of_a_family_is_read(tmp_path, family):
    make_model(family, tmp_path)
    assert WeightFiles(tmp_path).left_out(read_architecture(tmp_path)) == ""
