"""Files that run code when they are unpickled, in the place of those that a checkpoint has."""

import importlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from sapo_megatron.errors import UserError
from sapo_megatron.files import checksum
from sapo_megatron.policy import parallel
from sapo_megatron.recipe.load import load
from sapo_megatron.runs.history import MANIFEST, write_manifest
from sapo_megatron.training.inputs import read_inputs
from sapo_megatron.training.loop import train
from sapo_megatron.training.session import evaluate_checkpoint, export_checkpoint
from tests.support.tiny import write_recipe

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": lambda recipe, inputs, path, out: train(recipe, inputs, str(path)),
    "eval": lambda recipe, inputs, path, out: evaluate_checkpoint(recipe, inputs, path),
    "export": lambda recipe, inputs, path, out: export_checkpoint(
        recipe, inputs.model, inputs.arch, path, out
    ),
}


class Calls:
    """Unpickled, it is what ``function(*args)`` returns."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path) -> dict[str, Any]:
    """Objects that make the file ``mark`` when they are unpickled, by what they do it with."""
    touch = f"touch '{mark}'"
    inner = io.BytesIO()
    torch.save(Calls(os.system, touch), inner)
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
        "getattr": [Calls(getattr, Calls(importlib.import_module, "os"), "system"), touch],
        "torch.load": Calls(torch.storage._load_from_bytes, inner.getvalue()),
        "a tensor's type": Calls(
            torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (touch,), {}
        ),
        "numpy": np.array([Calls(os.system, touch)], dtype=object),
        "a dictionary": {"param_groups": [{"lr": Calls(os.system, touch)}]},
    }


def by_hand(mark: Path) -> dict[str, bytes]:
    """Pickles that nothing writes by itself: of names below a module's, and of a changed class."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    call = b"\x93" + text(f"touch '{mark}'") + b"\x85R."
    setting = b"}" + text("__setstate__") + b"ctorch\nSize\ns"
    return {
        "torch.serialization os.system": b"\x80\x04"
        + text("torch.serialization")
        + text("os.system")
        + call,
        "a class": b"\x80\x04c"
        + f"{Metadata.__module__}\nMetadata\n".encode()
        + b"N"
        + setting
        + b"\x86b.",
    }


def bytes_of(value: Any, *, plain: bool) -> bytes:
    """Pickled, as :func:`torch.save` does it or ``plain``."""
    if plain:
        return pickle.dumps(value)
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def places(checkpoint: Path) -> list[str]:
    """Where in ``checkpoint`` something can be put: files, values in others, and one tensor."""
    described = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    values = [name for name, found in described.items() if isinstance(found, BytesStorageMetadata)]
    files = sorted(path.name for path in checkpoint.iterdir() if path.suffix != ".distcp")
    return [*files, *values, next(name for name in described if name not in values)]


def craft(checkpoint: Path, target: Path, place: str, value: Any) -> Path:
    """A copy of ``checkpoint`` at ``target`` with ``value`` at ``place``, one of :func:`places`.

    Its checksums, if it has any, are those of the crafted files.
    """
    shutil.copytree(checkpoint, target)
    _put(target, place, value)
    if (target / MANIFEST).exists() and place != MANIFEST:
        files = [path for path in target.iterdir() if path.name != MANIFEST]
        write_manifest(target, "0", {path.name: checksum(path) for path in files})
    return target


def _put(target: Path, place: str, value: Any) -> None:
    if (path := target / place).exists():
        plain = place in (".metadata", "state.json", "metadata.json")
        path.write_bytes(value if isinstance(value, bytes) else bytes_of(value, plain=plain))
        return
    described = pickle.loads((target / ".metadata").read_bytes())
    for index, where in described.storage_data.items():
        if index.fqn == place:
            data = value if isinstance(value, bytes) else bytes_of(value, plain=False)
            with (target / where.relative_path).open("ab") as file:
                where.offset, where.length = file.tell(), len(data)
                file.write(data)
    (target / ".metadata").write_bytes(pickle.dumps(described))


def plain_checkpoint(folder: Path) -> Path:
    """A checkpoint below ``folder`` of a ``tensor`` and a ``value.lr``, in one file."""
    state = {"tensor": torch.ones(3), "value": {"lr": 1.0}}
    dcp.save(state, checkpoint_id=folder / "torch's", no_dist=True)
    described = dcp.FileSystemReader(folder / "torch's").read_metadata()
    described.storage_meta = None  # torch's own writer keeps a Path there
    return craft(folder / "torch's", folder / "plain", ".metadata", described)


def refused(load: Callable[[], Any], place: Path, mark: Path) -> tuple[str, str]:
    """What is said of something hostile at ``place``, and what is wrong with that, or nothing."""
    try:
        load()
        message, problem = "", "it was taken"
    except UserError as error:
        message, problem = str(error), ""
        if "\n" in message or str(place) not in message:
            problem = f"expected one line about {place}, got {message!r}"
        if "weights_only" in message:
            problem = f"it says how to have it run: {message}"
    except Exception as error:  # what a user would see as a traceback
        message, problem = str(error), f"{type(error).__name__}: {error}"
    if mark.exists():
        mark.unlink()
        problem = f"it ran; {problem}"
    return message, problem


def refusals(folder: Path, every: int) -> tuple[list[str], list[tuple[str, str, str]]]:
    """On a rank: a run's checkpoint with something hostile at each of its places, by each command.

    ``every``: of those only each so-many-th. Returns the places, and what was tried: place,
    command, problem.
    """
    write_recipe(folder, rollout={"async_steps": 1}, train={"steps": 2}, checkpoint={"every": 1})
    recipe = load(folder / "recipe.yaml", {"train.run_dir": str(folder / "run")})
    train(recipe, read_inputs(recipe, 1))
    parallel.teardown()
    kept, mark = folder / "run" / "checkpoints" / "step-000001", folder / "ran"
    values = list({**payloads(mark), **by_hand(mark)}.values())
    found = places(kept)
    tried = []
    for number, (place, command) in enumerate((p, c) for p in found for c in COMMANDS):
        if number % every or (place.startswith("ahead-") and command != "train"):
            continue  # nobody else reads those
        crafted = kept.with_name("step-000003")
        craft(kept, crafted, place, values[number % len(values)])
        arguments = recipe, read_inputs(recipe, 1), crafted, folder / "out"
        _, problem = refused(
            lambda: COMMANDS[command](*arguments),  # noqa: B023
            crafted,
            mark,
        )
        tried.append((place, command, problem))
        parallel.teardown()
        shutil.rmtree(crafted)
    return found, tried
