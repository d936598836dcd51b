"""Folders that one generation of transformers writes are trained, and both read what comes out."""

import json
import os
import string
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.hf.folder import WeightFiles
from tests.support.families import FAMILIES, make_model
from tests.support.gloo import run_worlds
from tests.support.tiny import ROOT, write_recipe
from tests.support.whole_runs import command

GENERATION_4 = ROOT / "venvs" / "transformers-4"
TEXT = "<|im_start|>user\n7 + 5 , please<|im_end|>"
KNOWN_TO_4 = {"qwen3", "qwen3_moe", "qwen3_next", "deepseek_v3", "glm4_moe"}
IDS = [[3, 44, 95, 7, 61, 20]]

pytestmark = pytest.mark.skipif(
    not GENERATION_4.is_dir() or version("transformers").startswith("4."),
    reason="one generation of transformers alone; make test has both",
)


def outputs(folder: Path) -> dict:
    """What this process's transformers makes of a model folder; of an unknown family, nothing."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        return {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    turns = [{"role": "user", "content": "7 + 5"}]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    return {
        "ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "chat": tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
        "dtype": str(model.config.dtype),
        "logits": logits.tolist(),
    }


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters, of as many ids as the tiny models have."""
    vocabulary = {letter: i for i, letter in enumerate(string.printable[:95] + "\n")}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)


def write(folder: Path, *families: str) -> None:
    """A model folder of each family that this process's transformers has."""
    for family in families:
        if FAMILIES[family]["model_type"] in transformers.CONFIG_MAPPING:
            make_model(family, folder / family / "model")
            save_tokenizer(folder / family / "model")


def in_generation_4(function: str, *arguments: str) -> str:
    """What a function of this file prints in a process with transformers 4."""
    paths = os.pathsep.join([str(GENERATION_4), str(ROOT)])
    code = f"from tests.hf import test_generations as g; g.{function}(*{list(arguments)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_there(folder: str, *families: str) -> None:
    assert transformers.__version__.startswith("4.")
    write(Path(folder), *families)


def read_there(folder: str, *families: str) -> None:
    assert transformers.__version__.startswith("4.")
    found = {family: outputs(Path(folder) / family / "out") for family in families}
    print(json.dumps(found))  # noqa: T201


@pytest.fixture(scope="module")
def chosen(request):
    """The families of the tests that run."""
    items = [item for item in request.session.items if item.path == request.path]
    return sorted({item.callspec.params["family"] for item in items if hasattr(item, "callspec")})


@pytest.fixture(scope="module")
def written(tmp_path_factory, chosen):
    """A folder for each family, with the model that transformers 5 writes and a recipe."""
    folder = tmp_path_factory.mktemp("written")
    write(folder, *chosen)
    for family in chosen:
        config = json.loads((folder / family / "model" / "config.json").read_text())
        write_recipe(
            folder / family,
            arch=config,
            model={"init": "pretrained", "tokenizer": None},
            data={"apply_chat_template": True},
            rollout={"max_prompt_length": 50},
            parallel={"tensor_model_parallel_size": 2},
            optimizer={"lr": 1e-3},
            train={"steps": 3, "max_tokens_per_gpu": 256},
            eval={"num_problems": 2, "k": 1},
        )
        (folder / family / "model" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def trained(written, chosen):
    export = ["export", "recipe.yaml", "--checkpoint", "runs/recipe/run-001", "--out", "out"]
    for words in (["train", "recipe.yaml"], export):
        jobs = [(2, (written / family, words)) for family in chosen]
        assert run_worlds(command, jobs) == [[(0, "")] * 2] * len(chosen)
    return written


@pytest.fixture(scope="module")
def read(trained, chosen):
    """What transformers 4 makes of what was trained."""
    return json.loads(in_generation_4("read_there", str(trained), *chosen))


@pytest.fixture(scope="module")
def written_there(chosen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("there")
    in_generation_4("write_there", str(folder), *chosen)
    return folder


EVERY = [
    pytest.param(family, marks=() if family == "qwen3-moe" else pytest.mark.slow)
    for family in FAMILIES
]


@pytest.mark.parametrize("family", EVERY)
def test_what_generation_5_writes_trains_and_comes_back(trained, read, family):
    settings = json.loads((trained / family / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend", "no folder of transformers 5"
    here, there = outputs(trained / family / "out"), read[family]
    before = outputs(trained / family / "model")
    assert torch.tensor(here["logits"]).sub(torch.tensor(before["logits"])).abs().max() > 1e-4
    assert [here[name] for name in ("ids", "text", "chat")] == [
        before[name] for name in ("ids", "text", "chat")
    ]
    assert here["dtype"] == "torch.float32"
    if FAMILIES[family]["model_type"] in KNOWN_TO_4:
        torch.testing.assert_close(
            torch.tensor(there.pop("logits")), torch.tensor(here.pop("logits")), rtol=0, atol=1e-5
        )
        assert there == here
    else:
        assert there == {}


@pytest.mark.parametrize("family", EVERY)
def test_both_generations_write_the_same_model(written, written_there, family):
    if FAMILIES[family]["model_type"] not in KNOWN_TO_4:
        assert not (written_there / family).exists()
        return
    archs, names = [], []
    for folder in (written, written_there):
        arch = read_architecture(folder / family / "model")
        archs.append({k: v for k, v in vars(arch).items() if k != "config"})
        names.append(sorted(WeightFiles(folder / family / "model")._files))
    assert archs[0] == archs[1]
    assert names[0] == names[1]
