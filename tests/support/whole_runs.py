"""What the tests of whole runs do on ranks: several runs, one after the other, in one world."""

import contextlib
import errno
import io
import json
import math
import os
import resource
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from sapo_megatron import __main__ as program
from sapo_megatron.errors import RunFailed, UserError
from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.training import loop as train
from sapo_megatron.training import update
from sapo_megatron.training.inputs import read_inputs
from tests.support.tiny import write_recipe

EP2 = {"expert_model_parallel_size": 2}


def run(folder: Path, resume: str | None = None, **overrides: Any) -> dict[str, Any]:
    """Train the recipe in ``folder``; ``section__key=value`` changes it. Returns the summary."""
    recipe = load(
        folder / "recipe.yaml", {k.replace("__", "."): str(v) for k, v in overrides.items()}
    )
    if recipe.train.run_dir and dist.get_rank() == 0:
        _lend(folder, Path(recipe.train.run_dir))
    inputs = read_inputs(recipe, dist.get_world_size())
    try:
        return train.train(recipe, inputs, resume)
    finally:
        parallel.teardown()
        dist.barrier()


def _lend(folder: Path, new: Path) -> None:
    """Give a new run below ``folder`` the weights that the first ones made, to begin with.

    Their names stand for what they depend on: a run that begins with others makes them.
    """
    if not new.exists():
        for made in (*folder.glob("*/random-*"), *folder.glob("*/cold-start-*")):
            shutil.copytree(made, new / made.name, dirs_exist_ok=True)


def command(cwd: Path, words: list[str]) -> tuple[int, str]:
    """Status and stdout of ``sapo-megatron words`` on this rank of those that were launched.

    No report is drawn.
    """
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # their world is there already
    os.chdir(cwd)
    program._report_apart = lambda run: None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return program.main(words), out.getvalue()


def message_of(error: type[Exception], folder: Path, resume: str | None, **overrides: Any) -> str:
    """The message of the error that a run must end with."""
    try:
        run(folder, resume, **overrides)
    except error as raised:
        return str(raised)
    raise AssertionError(f"expected {error.__name__}")


def without_reports_and_checkpoints() -> None:
    checkpoint.save = lambda *args, **kwargs: None


# Resuming


class Crash(Exception):
    """Stands for whatever ends a run."""


def _stopped(folder: Path, name: str = "stopped", **changes: Any) -> dict[str, Any]:
    """A run that is asked to stop in its second step, and goes on."""
    where = folder / name
    step = train.run_step

    def asked_to_stop(session: Any, number: int) -> Any:
        if number == 2 and dist.get_rank() == 0:
            (where / "stop").touch()
        return step(session, number)

    train.run_step = asked_to_stop
    at_the_end = {"checkpoint__every": 0, "train__steps": 4, "train__run_dir": str(where)}
    at_the_end |= changes
    first = run(folder, **at_the_end)
    train.run_step = step
    left = sorted(p.relative_to(where).as_posix() for p in where.glob("*/step*"))
    left += [name for name in ("stop", "summary.json") if (where / name).exists()]
    dist.barrier()
    if dist.get_rank() == 0:
        (where / "stop").touch()  # came too late for the run that it was meant for
    dist.barrier()
    return {"first": first, "left": left, **run(folder, "auto", **at_the_end)}


def _ahead(folder: Path) -> dict[str, Any]:
    """A whole run that generates two steps ahead, one that was interrupted, and what is refused."""
    changes = {
        "rollout__async_steps": 2,
        "rollout__dynamic_sampling": True,
        "reward__function": "tests.support.tiny:starts_even",
    }
    straight = {"train__run_dir": folder / "ahead", "train__steps": 4, "checkpoint__every": 2}
    steps, weights = train.run_steps, []

    def kept(session: Any) -> Any:
        summary = steps(session)
        chunks = session.policy.model.chunks
        weights.append([p.detach().clone() for chunk in chunks for p in chunk.parameters()])
        return summary

    train.run_steps = kept
    run(folder, **straight, **changes)
    found: dict[str, Any] = {"stopped": _stopped(folder, "ahead stopped", **changes)}
    train.run_steps = steps
    found["same"], found["unmoved"] = (
        all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))
        for other in (weights[2], weights[1])
    )
    place = folder / "ahead" / "checkpoints" / "step-000002"
    found["files"] = [
        sorted(p.name for p in at.glob("ahead-*")) for at in sorted(place.parent.iterdir())
    ]
    again = {"train__steps": 4, "rollout__num_generations": 8, **changes}
    found["other"] = message_of(UserError, folder, str(place), **again)
    dist.barrier()
    if dist.get_rank() == 0:
        (place / "ahead-00001.safetensors").unlink()
    dist.barrier()
    again = {"train__steps": 4, **changes}
    found["missing"] = message_of(UserError, folder, str(place), **again)
    dist.barrier()
    if dist.get_rank() == 0:
        (place / "ahead-00000.safetensors").write_bytes(b"torn")
    dist.barrier()
    found["torn"] = message_of(UserError, folder, str(place), **again)
    return found


def _lost_step(folder: Path) -> list[dict[str, Any]]:
    """Where prompts go on after a step that ended a run, and after a run that ended before it."""
    if dist.get_rank() == 0:
        reward = {"function": "tests.support.tiny:fades"}
        write_recipe(folder, parallel=EP2, rollout={"dynamic_sampling": True}, reward=reward)
    dist.barrier()
    message_of(RunFailed, folder, None, train__run_dir=folder / "lost", train__steps=50)
    (lost,) = (folder / "lost" / "checkpoints").iterdir()
    run(folder, train__run_dir=folder / "ended", train__steps=int(lost.name[-6:]))
    places = [folder / name / "checkpoints" / lost.name for name in ("lost", "ended")]
    return [json.loads((place / "state.json").read_text())["cursor"] for place in places]


def _full(folder: Path) -> dict[str, Any]:
    """A run of whose second checkpoint the second rank's disk takes a part, and none of another."""
    where, step = folder / "full", train.run_step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(session: Any, number: int) -> Any:
        if number == 2 and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        return step(session, number)

    train.run_step = filling
    with mock.patch.object(checkpoint, "LEAST_FREE", math.inf):  # this disk has room
        found = {"said": message_of(RunFailed, folder, None, train__run_dir=where, train__steps=4)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train.run_step = step
    found["left"] = sorted(p.name for p in (where / "checkpoints").iterdir())
    checkpoint.write_state, write = _full_disk, checkpoint.write_state
    found["state"] = message_of(RunFailed, folder, "auto", train__run_dir=where, train__steps=4)
    checkpoint.write_state = write
    found["left then"] = sorted(p.name for p in (where / "checkpoints").iterdir())
    return {**found, **run(folder, "auto", train__run_dir=where, train__steps=4)}


def _full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def resuming(folder: Path) -> dict[str, Any]:
    """Runs of four steps that were interrupted in several ways, below ``folder``."""
    if dist.get_rank() == 0:
        write_recipe(
            folder,
            parallel=EP2,
            cold_start={"steps": 3, "batch_size": 8},
            checkpoint={"every": 1},
            optimizer={"ess_scaling": True},
        )
        write_recipe(folder / "wide", arch={"hidden_size": 64}, parallel=EP2)
    dist.barrier()
    found: dict[str, Any] = {}
    straight, halves, crashed = (str(folder / n) for n in ("straight", "halves", "crashed"))

    at_the_end = {"checkpoint__every": 0}
    found["straight"] = run(folder, train__run_dir=straight, train__steps=4, **at_the_end)
    run(folder, train__run_dir=halves, train__steps=2, **at_the_end)
    found["halves"] = run(folder, "auto", train__run_dir=halves, train__steps=4)

    _crash_while_saving(step=3)
    message_of(Crash, folder, None, train__run_dir=crashed, train__steps=4)
    dist_checkpointing.save = _save
    found["left behind"] = sorted(p.name for p in (folder / "crashed/checkpoints").iterdir())
    dist.barrier()
    found["crashed"] = run(folder, "auto", train__run_dir=crashed, train__steps=4)
    found["stopped"] = _stopped(folder)
    found["full"] = _full(folder)
    found["kept"] = sorted(p.name for p in (folder / "crashed/checkpoints").iterdir())

    found["ahead"] = _ahead(folder)
    found["lost"] = _lost_step(folder / "fading")

    finished = Path(straight)
    before = {p: p.read_bytes() for p in finished.glob("*.*")}
    found["layout"] = message_of(
        UserError,
        folder,
        straight,
        parallel__expert_model_parallel_size=1,
        train__steps=5,
    )
    found["fewer steps"] = message_of(UserError, folder, straight, train__steps=3)
    found["model"] = message_of(UserError, folder / "wide", straight, train__steps=5)
    found["no run"] = message_of(UserError, folder, str(folder / "wide"))
    found["taken"] = message_of(UserError, folder, None, train__run_dir=straight)
    found["untouched"] = before == {p: p.read_bytes() for p in finished.glob("*.*")}
    found["finished"] = run(folder, straight, train__steps=4)
    return found


_save = dist_checkpointing.save


def _crash_while_saving(step: int) -> None:
    """The next save of this step ends when the tensors are written and nothing else is."""

    def save(state: Any, folder: str, **kwargs: Any) -> None:
        _save(state, folder, **kwargs)
        if f"step-{step:06d}" in folder:
            raise Crash

    dist_checkpointing.save = save


# Losses and options


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "clip_ratio_high": 0.28, "clip_ratio_c": 3, "kl_coef": 0.1},
    "gspo": {"loss_type": "gspo", "adv_estimator": "rloo", "kl_coef": 0.1, "kl_type": "k1"},
    "cispo": {"loss_type": "cispo", "adv_estimator": "dr_grpo", "kl_coef": 0.1, "kl_type": "k2"},
    "vespo": {"loss_type": "vespo", "kl_coef": 0.1},
    "sapo": {"loss_type": "sapo", "entropy_coef": 0.01, "loss_agg_mode": "token-mean"},
}


REPLAYS: dict[str, dict[str, Any]] = {
    "disabled": {},
    "R2": {"router_replay": "R2"},
    "R3": {"router_replay": "R3"},
    "graded": {"router_replay": "R3", "replay_threshold": 0.9},
}


def variants(folder: Path) -> dict[str, Any]:
    """A step of each, one rank; and runs whose numbers are not finite."""
    without_reports_and_checkpoints()
    write_recipe(folder)
    found: dict[str, Any] = {}
    for name, algorithm in VARIANTS.items():
        changes = {f"algorithm__{key}": value for key, value in algorithm.items()}
        found[name] = run(folder, train__run_dir=folder / name, **changes)
    for name, routing in REPLAYS.items():
        for observe in (True, False):
            run(
                folder,
                train__run_dir=folder / f"{name} {observe}",
                routing__observe=observe,
                logging__samples_per_step=2 * observe,
                routing__decompose_every=1,
                **{f"routing__{key}": value for key, value in routing.items()},
            )
    found["dynamic"] = run(
        folder,
        train__run_dir=folder / "dynamic",
        rollout__dynamic_sampling=True,
        reward__function="tests.support.tiny:starts_even",
        reward__timeout_s=60,
    )
    found["nothing to learn"] = message_of(
        RunFailed,
        folder,
        None,
        train__run_dir=folder / "never",
        rollout__dynamic_sampling=True,
        reward__function="tests.support.tiny:never",
    )
    found["few updates"] = _few(folder)
    run(
        folder,
        train__run_dir=folder / "errors",
        reward__function="tests.support.tiny:fails_on_short",
    )
    broken = {"reward__function": "tests.support.tiny:breaks", "train__run_dir": folder / "broken"}
    found["broken"] = message_of(RunFailed, folder, None, **broken)
    run(folder, train__run_dir=folder / "short", rollout__stop_token_ids=list(range(104)))
    found["only evaluation"] = run(folder, train__run_dir=folder / "none", train__steps=0)
    for mode in ("abort", "skip"):
        for poison in ("loss", "gradient"):
            found[f"{mode} {poison}"] = _poisoned(folder, mode, poison)
    return found


def _few(folder: Path) -> list[int]:
    """The tokens of each update of a step in which two groups are left for 16 mini-batches."""
    policy_update, tokens = Policy.update, []

    def watched_update(self: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        tokens.append(sum(int(batch.mask.sum()) for batch in batches))
        return policy_update(self, batches, *args, **kwargs)

    Policy.update = watched_update
    changes = {
        "train__run_dir": folder / "few",
        "train__num_mini_batches": 16,
        "rollout__rollout_batch_size": 8,
        "rollout__num_generations": 2,
        "rollout__dynamic_sampling": True,
        "rollout__dynamic_sampling_max_rounds": 1,
        "reward__function": "tests.support.tiny:tells_two_apart",
    }
    run(folder, **changes)
    Policy.update = policy_update
    return tokens


def _poisoned(folder: Path, mode: str, poison: str) -> tuple[str, bool]:
    """A run whose second mini-batch goes wrong: its message, and whether that changed weights."""
    weights: list[list[torch.Tensor]] = []
    policy_update, policy_loss = Policy.update, update.policy_loss
    calls = 0

    def watched_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        state = [p.detach().clone() for chunk in self.model.chunks for p in chunk.parameters()]
        weights.append(state)
        try:
            return policy_update(self, *args, **kwargs)
        finally:
            weights.append([p.detach().clone() for c in self.model.chunks for p in c.parameters()])

    def poisoned_loss(*args: Any, **kwargs: Any) -> Any:
        loss, metrics = policy_loss(*args, **kwargs)
        if calls != 2:
            return loss, metrics
        if poison == "gradient":  # finite itself: the root's slope at zero is not
            return loss + (0 * loss).sqrt(), metrics
        bad = Metrics()
        bad.add("actor/pg_loss", Mean(math.nan, 1.0))
        return loss * math.nan, bad

    Policy.update, update.policy_loss = watched_update, poisoned_loss
    target = folder / f"{mode}-{poison}"
    arguments = {
        "train__run_dir": target,
        "train__on_nonfinite": mode,
        "train__num_mini_batches": 4,
    }
    try:
        message = (
            message_of(RunFailed, folder, None, **arguments)
            if mode == "abort"
            else str(run(folder, **arguments)["steps"])
        )
    finally:
        Policy.update, update.policy_loss = policy_update, policy_loss
    before, after = weights[2:4]
    changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))
    return message, changed
