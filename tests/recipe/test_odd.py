"""Recipes with whatever YAML can hold: taken as it is meant, or one line; never a hang.

``make torture`` tries every key with every value; this is a slice of it, and what it cannot see.
"""

import itertools
import os
import random

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.load import PEER_KEYS, keys, load
from tests.torture import mutations

MINIMAL = "model: {path: m}\ndata: {train: {tasks: [{name: a}]}}\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path, overrides=None):
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_slice_of_the_torture(tmp_path):
    tried = list(itertools.islice(mutations.trials(0, tmp_path), 60))
    assert [outcome for outcome in tried if outcome.problem] == []


def test_every_value_of_one_key_of_each_kind(tmp_path, monkeypatch):
    path = tmp_path / "good.yaml"
    path.write_text(MINIMAL)
    names = ["train.steps", "model.path", "data.eval"]
    monkeypatch.setattr(mutations, "keys", lambda: names)
    count = len(mutations.NUMBERS) + len(mutations.OTHERS) + len(mutations.REFUSED)
    tried = list(mutations._values(path, random.Random(0), count))
    assert len(tried) == 3 * count
    assert [outcome for outcome in tried if outcome.problem] == []


@pytest.mark.parametrize("text", ["010", "1:30", "0x10", "0b11", "0o17"])
def test_numbers_of_other_bases_are_texts(write, text):
    message = refusal(write(MINIMAL + f"train: {{steps: {text}}}"))
    assert message == f'train.steps: expected a whole number, got "{text}"; change it'
    assert load(write(MINIMAL + f"logging: {{wandb_name: {text}}}")).logging.wandb_name == text


def test_dates_are_texts(write):
    recipe = load(write(MINIMAL + "logging: {wandb_name: 2024-1-1}"))
    assert recipe.logging.wandb_name == "2024-1-1"
    assert "2024-01-01.x: no such key" in refusal(write(MINIMAL + "2024-01-01: {x: 1}"))


@pytest.mark.parametrize(
    ("key", "text", "part"),
    [
        ("train.seed", "1" + "0" * 30, "a whole number >= 0 and <= 2147483647, got 1000"),
        ("train.steps", "1e300", "expected a whole number, got 1e+300"),
        ("optimizer.lr", "1e300", "and <= 1000000000.0, got 1e+300"),
        ("tau_pos", "1e-300", "a finite number > 1e-30, got 1e-300"),
        ("parallel.distributed_timeout_s", "1e300", "<= 1000000.0, got 1e+300"),
        ("model.path", "''", "model.path: expected a text that is not blank"),
        ("model.path", "' '", "model.path: expected a text that is not blank"),
        ("train.run_dir", "''", "train.run_dir: expected a text that is not blank"),
        ("model.path", "/" + "a" * 300, "names of at most 255 bytes"),
        ("train.run_dir", "a" * 300, "names of at most 255 bytes"),
        ("data.template", '"{prompt}\\0"', "data.template: expected a text without '\\x00'"),
        ("data.template", '"{prompt}\\ud800"', "expected a text without '\\ud800'"),
    ],
)
def test_what_would_go_over_later(write, key, text, part):
    assert part in refusal(write(MINIMAL), {key: text})


def test_an_alias_is_a_copy(write):
    text = "model: {path: m}\ndata: {train: &t {tasks: [{name: a}]}, eval: *t}\n"
    data = load(write(text), {"data.train.seed": "5"}).data
    assert (data.train.seed, data.eval.seed) == (5, 0)


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "cannot read" in refusal(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot read" in refusal(tmp_path / "loop")


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("optimizer.lrr", "the nearest is optimizer.lr"),
        ("zzz", "there are name, model, data, parallel, rollout"),
        ("optimizer.qqq", "optimizer has lr, min_lr, lr_warmup_steps"),
        ("trainer.critic_warmup", "there are name"),
        ("actor_rollout_ref.rollout.n", "here it is called rollout.num_generations"),
        ("x" * 5000, "there are name"),
    ],
)
def test_a_name_is_near_only_where_it_is(write, key, part):
    message = refusal(write(MINIMAL), {key: "1"})
    assert part in message


def test_many_names_of_other_projects_are_known():
    assert len(PEER_KEYS) >= 150
    assert {name for name in PEER_KEYS if name in {k.rsplit(".", 1)[-1] for k in keys()}} == set()
