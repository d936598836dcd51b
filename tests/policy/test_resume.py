"""A checkpoint that is loaded under another recipe: its tensors, and the recipe's settings."""

import dataclasses

import pytest
import torch

from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.runs.state import RunState
from sapo_megatron.training.coldstart import _step, initial_weights
from sapo_megatron.training.inputs import read_inputs
from tests.support.gloo import run_ranks
from tests.support.tiny import write_recipe

UPDATES = 3
SETTINGS = {
    "lr": 1e-2,
    "min_lr": 1e-4,
    "lr_warmup_steps": 1,
    "lr_decay_style": "linear",
    "weight_decay": 0.1,
}
CHANGES = {
    "nothing": {},
    "lr": {"lr": 1e-3, "min_lr": 1e-3},
    "schedule": {"lr_warmup_steps": 6, "lr_decay_style": "cosine"},
    "adam": {"weight_decay": 0.3, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_eps": 1e-5},
    "length": {"total_updates": 16},
}
STATE = RunState(
    step=1,
    start="",
    model={},
    recipe={},
    data="",
    cursor={},
    eval={},
    wall_s=0.0,
    world_size=1,
    updates=UPDATES,
)


def settings(policy):
    """What the next update is made with, of each parameter group."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in policy.optimizer.param_groups
    ]


def loaded(folder):
    """By change: settings and weights behind the checkpoint, and those it should have."""
    recipe = load(write_recipe(folder, optimizer=SETTINGS, cold_start={"batch_size": 4}))
    inputs = read_inputs(recipe, 1)
    groups = parallel.setup(recipe.parallel, seed=1)
    start = initial_weights(recipe, inputs, groups, folder)

    def opened(load, total_updates=8, **changes):
        optimizer = dataclasses.replace(recipe.optimizer, **changes)
        options = {"optimizer": optimizer, "total_updates": total_updates, "load": load}
        return Policy(recipe, inputs.arch, groups, start, **options)

    def weights(policy):
        return [p.detach().clone() for chunk in policy.model.chunks for p in chunk.parameters()]

    first, found = opened(True), {}
    for step in range(UPDATES):
        _step(first, recipe, inputs, step)
    place = checkpoint.save(first, folder / "checkpoints", STATE, keep=1)
    for name, changes in CHANGES.items():
        resumed, fresh = opened(False, **changes), opened(True, **changes)
        checkpoint.load(resumed, place, STATE)
        fresh.scheduler.step(UPDATES)
        same = all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(first), strict=True))
        moved = not torch.equal(weights(fresh)[0], weights(first)[0])
        found[name] = settings(resumed), settings(fresh), same and moved, resumed.updates
    parallel.teardown()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(1, loaded, tmp_path_factory.mktemp("loaded"))[0]


@pytest.mark.parametrize("name", CHANGES)
def test_the_recipe_s_settings_take_effect_at_the_checkpoint_s_place(found, name):
    resumed, fresh, weights, updates = found[name]
    assert resumed == fresh
    assert weights
    assert updates == UPDATES
    assert (resumed == found["nothing"][0]) == (name == "nothing")
