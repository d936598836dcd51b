"""The command line: exit statuses, and one line for whatever is wrong with the input."""

import importlib.util
import io
import json
import logging
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from sapo_megatron.__main__ import _overrides, main
from sapo_megatron.errors import UserError
from sapo_megatron.recipe.check import smallest_world
from sapo_megatron.recipe.load import load
from sapo_megatron.runs.trackers import SamplesTracker
from tests.support.shown import shown
from tests.support.tiny import ROOT, Done, cli, write_recipe


@pytest.fixture
def work(tmp_path):
    """A working folder with a recipe."""
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _logging():
    """``main`` sets up logging for a program; put back what the tests had."""
    root, ours = logging.getLogger(), logging.getLogger("sapo_megatron")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def refused(done, *expected):
    """Exit status 2 and one line on stderr that says all of ``expected``."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for text in expected:
        assert text in lines[0]
    assert done.stdout == ""


def test_a_cuda_build_of_torch_without_a_gpu_adds_no_line(caplog):
    importlib.import_module("sapo_megatron.policy")
    said = "No CUDA runtime is found, using CUDA_HOME='%s'"
    found = importlib.util.find_spec("torch.utils.cpp_extension")
    assert said in Path(found.origin).read_text()
    torchs = logging.getLogger(found.name)
    torchs.warning(said, "/usr/local/cuda")
    torchs.warning("something else")
    assert caplog.messages == ["something else"]


@pytest.fixture
def refuses(monkeypatch, capsys, work):
    """The same of ``main`` in this process; nothing may have changed in the working folder."""

    def refuses(words, expected):
        monkeypatch.chdir(work)
        before = sorted(work.rglob("*"))
        status = main(words)
        refused(Done(status, *capsys.readouterr(), []), *expected)
        assert sorted(work.rglob("*")) == before

    return refuses


def nothing_written(folder):
    return sorted(p.name for p in folder.iterdir()) == ["model", "recipe.yaml", "sums.jsonl"]


# Words on the command line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["COMMAND", "sapo-megatron --help"]),
        (["trian", "recipe.yaml"], ["trian", "train", "report"]),
        (["train"], ["recipe", "sapo-megatron train --help"]),
        (["train", "missing.yaml"], ["no such file: missing.yaml"]),
        (["train", "tiny-moe"], ["no recipe of that name", "tiny-moe-cpu, tiny-moe-vllm-cpu"]),
        (["train", "recipe.yaml", "--resume"], ["--resume", "expected one argument"]),
        (["train", "recipe.yaml", "steps"], ["steps", "section.key=value"]),
        (["train", "recipe.yaml", "--tau_pos"], ["--tau_pos", "no value"]),
        (["train", "recipe.yaml", "--tau_pos", "--tau_neg", "1"], ["--tau_pos", "no value"]),
        (["train", "recipe.yaml", "--tau_pos", "-1"], ["algorithm.tau_pos", "> 0", "-1"]),
        (["train", "recipe.yaml", "--tau_pos=nan"], ["algorithm.tau_pos", "number", "nan"]),
        (["train", "recipe.yaml", "--tau_pso", "1"], ["tau_pso", "algorithm.tau_pos"]),
        (["train", "recipe.yaml", "--sapo_tau_pos", "1"], ["algorithm.tau_pos"]),
        (["train", "recipe.yaml", "--resum", "auto"], ["resum: no such key"]),
        (["train", "recipe.yaml", "trian.steps=3"], ["trian.steps", "train.steps"]),
        (["train", "recipe.yaml", "--steps", "3"], ["train.steps", "cold_start.steps"]),
        (["train", "recipe.yaml", "--clip_ratio_high", "0.2"], ["clip_ratio_high", "sapo"]),
        (
            ["train", "recipe.yaml", "--importance_sampling_level", "sequence"],
            ["importance_sampling_level", "GSPO"],
        ),
        (["train", "recipe.yaml", "--loss_type", "spao"], ["algorithm.loss_type", "spao"]),
        (["train", "recipe.yaml", "--resume=$NOWHERE/run"], ["resume: ", "$NOWHERE stands for no"]),
        (["train", "recipe.yaml", "train.run_dir=~whoever/x"], ["train.run_dir: ", "~whoever"]),
        (["eval", "recipe.yaml"], ["--checkpoint", "sapo-megatron eval --help"]),
        (["eval", "recipe.yaml", "--checkpoint", "x", "--out", "no/where.json"], ["--out"]),
        (["report"], ["run", "sapo-megatron report --help"]),
        (["report", "missing"], ["run folder", "missing"]),
        (["report", "model"], ["metrics.jsonl"]),
        (["report", "model", "--dpi", "3"], ["report", "--dpi 3"]),
        (["samples", "missing"], ["run folder", "missing"]),
        (["samples", "model"], ["samples.jsonl", "logging.samples_per_step"]),
        (["samples", "model", "--step", "last"], ["--step", "'last'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words(refuses, words, expected):
    refuses(words, expected)


def test_through_the_shell(work):
    refused(cli(cwd=work, fresh=True), "COMMAND")
    (work / "model" / "config.json").unlink()
    refused(cli("train", "recipe.yaml", cwd=work), "model.path", "config.json")


def test_debug_adds_the_traceback(work):
    done = cli("train", "recipe.yaml", "--tau_pos", "0", "--debug", cwd=work)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: algorithm.tau_pos")


def test_a_recipe_by_its_name(work, monkeypatch):
    """A recipe of the package, where the working folder has nothing of that name."""
    monkeypatch.chdir(work)
    assert load("qwen3.5-35b-a3b-8gpu").name == "qwen3.5-35b-a3b-8gpu"
    tiny = load("tiny-moe-vllm-cpu")
    assert tiny.model.path == str(ROOT / "recipes/tiny-moe")
    assert tiny.rollout.vllm_python == str(work / "venvs/vllm/bin/python")
    (work / "tiny-moe-cpu").write_text((work / "recipe.yaml").read_text())
    assert load("tiny-moe-cpu").model.path == str(work / "model")
    with pytest.raises(UserError, match=r"^recipe: no such file: recipes/tiny-moe-cpu\.yaml$"):
        load("recipes/tiny-moe-cpu.yaml")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "-h"]])
def test_help(work, capsys, words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert "usage: sapo-megatron" in capsys.readouterr().out


def test_overrides():
    words = ["--loss_type", "grpo", "train.steps=3", "--tau_pos=2", "--lr", "-1", "a.b=x=y"]
    assert _overrides(words) == {
        "loss_type": "grpo",
        "train.steps": "3",
        "tau_pos": "2",
        "lr": "-1",
        "a.b": "x=y",
    }
    with pytest.raises(UserError, match="word: expected"):
        _overrides(["word"])


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ({}, 1),
        ({"expert_model_parallel_size": 2}, 2),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}, 4),
        ({"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 3}, 6),
        ({"context_parallel_size": 3, "expert_model_parallel_size": 2}, 6),
    ],
)
def test_smallest_world(tmp_path, layout, world):
    recipe = load(write_recipe(tmp_path, parallel=layout))
    assert smallest_world(recipe.parallel) == world


# Samples


def test_samples_are_written_for_any_terminal(tmp_path, monkeypatch):
    SamplesTracker(tmp_path).show(9, [shown(9, "random", ("\u4e2d \xe9", 1.0))])
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["samples", str(tmp_path), "--worst"]) == 0
    assert b"\n    \\u4e2d \xe9\n" in out.buffer.getvalue()


def test_a_reader_that_has_read_enough_is_no_error(tmp_path, monkeypatch):
    SamplesTracker(tmp_path).show(1, [shown(1, "random", ("4", 1.0))])
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["samples", str(tmp_path)]) == 0


# Files


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path, key):
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def malformed_yaml(work):
    (work / "recipe.yaml").write_text("model:\n  path: model\n data: [\n")


def malformed_row(work):
    with (work / "sums.jsonl").open("a") as file:
        file.write('{"prompt": "x", \n')


def row_without_answer(work):
    (work / "sums.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n')


@pytest.mark.parametrize(
    ("spoil", "words", "expected"),
    [
        (malformed_yaml, [], ["recipe.yaml:3", "YAML"]),
        (malformed_row, [], ["sums.jsonl:25", "not JSON"]),
        (row_without_answer, [], ["sums.jsonl:2", "'answer'"]),
        (lambda w: (w / "sums.jsonl").unlink(), [], ["data.train.path", "sums.jsonl"]),
        (lambda w: edit(w / "model/config.json", vocab_size=50), [], ["tokenizer", "50", "99"]),
        (lambda w: (w / "model/config.json").unlink(), [], ["model.path", "config.json"]),
        (
            lambda w: edit(w / "model/config.json", model_type="llama"),
            [],
            ["model_type", "qwen3_moe", "'llama'"],
        ),
        (lambda w: without(w / "model/config.json", "rope_theta"), [], ["rope_theta", "missing"]),
        (None, ["model.tokenizer=nothing.model"], ["model.tokenizer", "nothing.model"]),
        (None, ["--expert_model_parallel_size", "3"], ["expert_model_parallel_size", "experts 4"]),
        (None, ["reward.function=tests.support.tiny:evne"], ["reward.function", "even"]),
        (None, ["--max_response_length=1", "cold_start.steps=1"], ["cold_start", "at most"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_files(refuses, work, spoil, words, expected):
    if spoil:
        spoil(work)
    refuses(["train", "recipe.yaml", *words], expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--resume", "nowhere"], ["--resume", "nowhere"]),
        (["train.run_dir=sums.jsonl/run"], ["train.run_dir", "sums.jsonl"]),
    ],
)
def test_wrong_folders(work, words, expected):
    refused(cli("train", "recipe.yaml", *words, cwd=work), *expected)
    assert nothing_written(work)


# Processes


def launched(**changes):
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {name: value for name, value in (env | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"MASTER_ADDR": None}, ["MASTER_ADDR", "torchrun"]),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE", "torchrun"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", "'two'"]),
        ({"WORLD_SIZE": "3"}, ["world size", "3 processes", "torchrun"]),
    ],
)
def test_a_wrong_environment(refuses, monkeypatch, env, expected):
    for name, value in launched(**env).items():
        monkeypatch.setenv(name, value)
    refuses(["train", "recipe.yaml", "--expert_model_parallel_size=2"], expected)


def test_a_port_in_use(work):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = launched(MASTER_PORT=str(port))
        refused(cli("train", "recipe.yaml", cwd=work, env=env), str(port), "--master-port")
    assert nothing_written(work)


def test_torchrun_shows_one_line_of_ours(work):
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m")
    words = ["sapo_megatron", "train", "recipe.yaml", "train.run_dir=sums.jsonl/run"]
    done = cli(*words, cwd=work, program=program)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1
    assert "train.run_dir" in ours[0]
    assert nothing_written(work)


def test_the_launcher_finds_mistakes_of_the_ranks_and_keeps_their_status(work):
    # The folder is chosen after the processes have started.
    words = ["--expert_model_parallel_size=2", "train.run_dir=sums.jsonl/run"]
    refused(cli("train", "recipe.yaml", *words, cwd=work), "train.run_dir")
    assert nothing_written(work)


def test_the_console_script_is_this_program():
    script = shutil.which("sapo-megatron", path=str(ROOT / ".venv" / "bin"))
    if script is None:
        pytest.skip("the package is not installed beside the tests")
    assert "sapo_megatron.__main__" in Path(script).read_text()
