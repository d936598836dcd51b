"""The state of a run beside a checkpoint's tensors: it comes back, or a line says what is wrong."""

import dataclasses
import json

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.runs.state import (
    QueuedGroup,
    RunState,
    read_state,
    write_state,
)
from sapo_megatron.sample import Prompt

STATE = RunState(
    step=12,
    start="../start",
    model={"model_type": "qwen3_moe", "rope_scaling": None},
    recipe={"train": {"steps": 9}},
    data="0af1",
    cursor={"index": 384, "skipped": {"too_long": 1}},
    eval={"avg@8": 0.25, "pass@1": 1},
    moments={"variance/router": [[1.0, 2.5, 0.125]]},
    ahead=[QueuedGroup(prompt=Prompt(uid=3, text="1 + 2", answer="3", tokens=(5, 9)), kept=True)],
    wall_s=321.5,
    world_size=8,
    updates=48,
)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step-000012"
    folder.mkdir()
    write_state(folder, STATE)
    return folder


def refusal(checkpoint):
    with pytest.raises(UserError) as caught:
        read_state(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_state_comes_back(checkpoint):
    assert read_state(checkpoint) == STATE


OPTIONAL = {"moments", "ahead"}


def test_a_state_of_before_moments_were_kept_can_be_resumed(checkpoint):
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    for key in OPTIONAL:
        del state[key]
    path.write_text(json.dumps(state | {"router": {"variance/total": 0.0025}}))
    expected = dataclasses.replace(STATE, moments={}, ahead=[])
    assert read_state(checkpoint) == expected


@pytest.mark.parametrize("key", sorted({f.name for f in dataclasses.fields(RunState)} - OPTIONAL))
def test_a_missing_key_is_named(checkpoint, key):
    path = checkpoint / "state.json"
    path.write_text(json.dumps({k: v for k, v in dataclasses.asdict(STATE).items() if k != key}))
    message = refusal(checkpoint)
    assert message.startswith(f"{path}: expected the state of a run, ")
    assert f"({key}: Field required)" in message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"step": "12"}, "step: Input should be a valid integer, got '12'"),
        ({"step": 1.5}, "step: Input should be a valid integer, got 1.5"),
        ({"world_size": True}, "world_size: Input should be a valid integer, got True"),
        ({"start": None}, "start: Input should be a valid string, got None"),
        ({"model": []}, "model: Input should be an object, got []"),
        ({"eval": {"avg@8": "x"}}, "eval.avg@8: Input should be a valid number, got 'x'"),
        ({"moments": {"tv": [0.5]}}, "moments.tv.0: Input should be a valid array, got 0.5"),
        ({"ahead": [{"prompt": {}}]}, "ahead.0.prompt.uid: Field required"),
        ({"recipe": None}, "recipe: Input should be an object, got None"),
    ],
)
def test_a_wrong_type_is_named(checkpoint, changed, said):
    path = checkpoint / "state.json"
    path.write_text(json.dumps(dataclasses.asdict(STATE) | changed))
    message = refusal(checkpoint)
    assert str(path) in message
    assert f"({said})" in message


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"step": 12'])
def test_a_damaged_file_is_named(checkpoint, damage):
    path = checkpoint / "state.json"
    path.write_bytes(damage)
    message = refusal(checkpoint)
    assert message.startswith(f"{path}: expected the state of a run, got something else (")
    assert message.endswith("); resume from another checkpoint")


def test_a_folder_without_a_state_is_no_checkpoint(tmp_path):
    assert f"{tmp_path}: expected a checkpoint folder with state.json" in refusal(tmp_path)
