"""The cold start: what it learns from, and when its weights are used again."""

import dataclasses
import gc
import json
import weakref

import pytest
import torch

from sapo_megatron.errors import UserError
from sapo_megatron.policy import parallel
from sapo_megatron.recipe.load import load
from sapo_megatron.sample import Denominators, PackedBatch
from sapo_megatron.training import coldstart
from sapo_megatron.training.coldstart import _key, supervised_loss
from sapo_megatron.training.inputs import demonstrations, preflight, read_inputs
from tests.support.gloo import run_ranks
from tests.support.tiny import write_recipe


@pytest.fixture
def key(tmp_path):
    """The key of the recipe with some changes."""
    write_recipe(tmp_path, cold_start={"steps": 5, "batch_size": 6})

    def key(**changes):
        overrides = {name.replace("__", "."): str(value) for name, value in changes.items()}
        recipe = load(tmp_path / "recipe.yaml", overrides)
        return _key(recipe, read_inputs(recipe, 2))

    return key


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm__loss_type": "grpo"},
        {"train__steps": 50},
        {"train__run_dir": "elsewhere"},
        {"optimizer__lr": 1e-5},
        {"optimizer__lr_decay_style": "cosine"},
        {"eval__every": 3},
        {"eval__k": 5},
        {"checkpoint__every": 3},
        {"rollout__num_generations": 8},
        {"parallel__expert_model_parallel_size": 2},
        {"reward__function": "exact_match"},
        {"logging__tensorboard": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_leaves_the_weights_as_they_are(key, changes):
    assert key(**changes) == key()


@pytest.mark.parametrize(
    "changes",
    [
        {"cold_start__steps": 6},
        {"cold_start__batch_size": 7},
        {"cold_start__lr": 1e-4},
        {"train__seed": 1},
        {"data__train__seed": 1},
        {"data__template": "Q {prompt}"},
        {"optimizer__weight_decay": 0.1},
        {"rollout__temperature": 0.5},
        {"eval__num_problems": 5},
        {"model__params_dtype": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_makes_other_weights(key, changes):
    assert key(**changes) != key()


def test_other_data_in_the_same_file_makes_other_weights(key, tmp_path):
    before = key()
    file = tmp_path / "sums.jsonl"
    file.write_text(file.read_text().replace('"answer": 3}', '"answer": 4}', 1))
    assert key() != before


def test_data_in_a_folder_is_what_its_files_hold(key, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "sums.jsonl").rename(tmp_path / "folder" / "sums.jsonl")
    before = key(data__train__path=tmp_path / "folder")
    assert key(data__train__path=tmp_path / "folder") == before
    more = '{"prompt": "Calculate 9 + 9.", "answer": 18}'
    (tmp_path / "folder" / "more.jsonl").write_text(more)
    assert key(data__train__path=tmp_path / "folder") != before


def test_other_held_out_problems_make_other_weights(tmp_path):
    """Also where the problems that are drawn first stay the same."""
    recipe = load(
        write_recipe(tmp_path, cold_start={"steps": 5, "batch_size": 6}),
        {"data.eval.path": str(tmp_path / "eval.jsonl"), "eval.num_problems": "1"},
    )
    keys, first = [], []
    for place in (-1, -2):
        (tmp_path / "eval.jsonl").write_text('{"prompt": "none of them", "answer": 0}')
        epoch = read_inputs(recipe, 2).source.next(24)
        (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": epoch[place].text, "answer": 0}))
        inputs = read_inputs(recipe, 2)
        keys.append(_key(recipe, inputs))
        first.append(demonstrations(recipe, inputs))
    assert first[0] == first[1]
    assert keys[0] != keys[1]


def test_the_key_leaves_the_cursor_where_it_was(tmp_path):
    recipe = load(write_recipe(tmp_path, cold_start={"steps": 5}))
    inputs = read_inputs(recipe, 1)
    inputs.source.next(3)
    before = inputs.source.state_dict()
    _key(recipe, inputs)
    assert inputs.source.state_dict() == before
    assert preflight(recipe, 1).source.state_dict()["index"] == 0


def test_demonstrations_end_with_eos_and_are_not_held_out(tmp_path):
    recipe = load(write_recipe(tmp_path, cold_start={"batch_size": 15}))
    inputs = read_inputs(recipe, 1)
    held_out = {p.tokens for p in inputs.problems}
    samples = demonstrations(recipe, inputs)
    assert len(samples) == 15
    for s in samples:
        assert s.prompt_tokens not in held_out
        *answer, last = s.response_tokens
        assert last == inputs.endings.turn_id == inputs.tokenizer.eos_id
        question = inputs.tokenizer.decode(s.prompt_tokens)
        left, right = question.removeprefix("Calculate ").removesuffix(".").split(" + ")
        assert int(inputs.tokenizer.decode(answer)) == int(left) + int(right)


def test_problems_without_an_answer_are_refused(tmp_path):
    recipe = load(write_recipe(tmp_path, cold_start={"steps": 1}))
    inputs = read_inputs(recipe, 1)
    (prompt,) = inputs.source.next(1)
    inputs.source.next = lambda n: [dataclasses.replace(prompt, answer="")] * n
    with pytest.raises(UserError, match=r"cold_start: expected problems with an answer"):
        demonstrations(recipe, inputs)


def test_the_supervised_loss_is_the_mean_over_sequences_of_their_token_means():
    mask = torch.tensor([False, True, True, False, True])
    logprob = torch.tensor([9.0, -1.0, -3.0, 9.0, -4.0], requires_grad=True)
    batch = PackedBatch(
        tokens=torch.zeros(5, dtype=torch.long),
        targets=torch.zeros(5, dtype=torch.long),
        mask=mask,
        position_ids=torch.tensor([0, 1, 2, 0, 1]),
        sequence_ids=torch.tensor([0, 0, 0, 1, 1]),
        cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32),
        max_seqlen=3,
        lengths=torch.tensor([2, 1]),
        advantages=torch.zeros(5),
        rollout_logprob=torch.zeros(5),
        sample_uids=(0, 1),
    )
    sizes = Denominators(sequences=4, tokens=10)  # two more sequences lie on another rank
    loss, metrics = supervised_loss(batch, logprob, torch.zeros(5), denominators=sizes)
    assert loss.item() == pytest.approx((2 + 4) / 4)
    loss.backward()
    assert logprob.grad.tolist() == pytest.approx([0, -1 / 8, -1 / 8, 0, -1 / 4])
    assert metrics.values()["actor/pg_loss"] == pytest.approx(1.5)


def held_after_the_cold_start(folder):
    """How many of its weights and gradients are still there once it is over."""
    seen = []

    class Watched(coldstart.Policy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            weights = [w for chunk in self.model.chunks for w in chunk.parameters()]
            gradients = [b.grad_data for chunk in self.ddp for b in chunk.buffers]
            seen.extend(weakref.ref(tensor) for tensor in weights + gradients)

    coldstart.Policy = Watched
    recipe = load(write_recipe(folder, cold_start={"steps": 2, "batch_size": 4}))
    groups = parallel.setup(recipe.parallel, seed=1)
    coldstart.initial_weights(recipe, read_inputs(recipe, 1), groups, folder)
    gc.collect()
    parallel.teardown()
    return len(seen), sum(tensor() is not None for tensor in seen)


def test_nothing_of_the_cold_start_lives_on(tmp_path):
    ((tensors, held),) = run_ranks(1, held_after_the_cold_start, tmp_path)
    assert tensors > 20
    assert held == 0
