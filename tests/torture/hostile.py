"""Files of others that would run code, or have files from elsewhere read: each gets one line.

Checkpoints with something to run at every place that unpickles; model folders with links and names
that lead out of them; tokenizers that bring code, and templates that look for it.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.hf.folder import INDEX, NOT_WEIGHTS, WeightFiles, find_model
from sapo_megatron.policy import compat
from tests.support.chat import save_tokenizer
from tests.support.gloo import run_ranks
from tests.support.hostile import (
    by_hand,
    craft,
    payloads,
    plain_checkpoint,
    refusals,
    refused,
)
from tests.torture import Outcome


def trials(seed: int, folder: Path) -> Iterator[Outcome]:
    """All of them, in an order that ``seed`` makes."""
    mark = folder / "ran"
    cases = [*_pickles(folder, mark), *_models(folder), *_tokenizers(folder, mark)]
    random.Random(seed).shuffle(cases)
    for name, place, load in cases:
        yield Outcome(trial=name, problem=refused(load, place, mark)[1])
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        ((_, tried),) = run_ranks(1, refusals, folder, 1)
    finally:
        del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]
    for where, command, problem in tried:
        yield Outcome(trial=f"{command}, checkpoint's {where}", problem=problem)


Case = tuple[str, Path, Callable[[], Any]]
"""What it is, where the message must point, and what reads it."""


def _pickles(folder: Path, mark: Path) -> Iterator[Case]:
    plain = plain_checkpoint(folder)
    for payload, value in {**payloads(mark), **by_hand(mark)}.items():
        for where in (".metadata", "tensor", "value.lr"):
            crafted = craft(plain, folder / f"{payload} {where}", where, value)
            yield f"{payload} in {where}", crafted, lambda crafted=crafted: _read(crafted)
    for name in ("../plain/__0_0.distcp", "/etc/hostname", "a/b"):
        described = dcp.FileSystemReader(plain).read_metadata()
        for place in described.storage_data.values():
            place.relative_path = name
        crafted = craft(plain, folder / name.replace("/", " "), ".metadata", described)
        yield f"a checkpoint's file {name}", crafted, lambda crafted=crafted: _read(crafted)


def _read(checkpoint: Path) -> None:
    with compat.reading(checkpoint):
        state: dict[str, Any] = {"tensor": torch.zeros(3), "value": {"lr": 0.0}}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)


def _models(folder: Path) -> Iterator[Case]:
    (folder / "elsewhere").write_text("{}")
    for number, pattern in enumerate([*NOT_WEIGHTS, "*.safetensors"]):
        for target in ("../elsewhere", "/etc/hostname", "here/../../elsewhere"):
            model = folder / f"links-{number}-{target.replace('/', '_')}"
            (model / "here").mkdir(parents=True)
            path = model / pattern.replace("*", "x")
            path.symlink_to(target)
            yield f"{path.name} -> {target}", path, lambda model=model: find_model(str(model))
    for number, name in enumerate(("../x.safetensors", "/x.safetensors", "a/x.safetensors")):
        model = folder / f"index-{number}"
        model.mkdir()
        (model / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
        yield f"an index that names {name}", model, lambda model=model: WeightFiles(model)


def _tokenizers(folder: Path, mark: Path) -> Iterator[Case]:
    names = ("../elsewhere", "/etc/hostname", "a/b")
    for key in ("vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files"):
        for number, name in enumerate(names):
            place = folder / f"tokenizer-{key}-{number}"
            place.mkdir()
            settings = {key: [name] if key.endswith("s") else name}
            (place / "tokenizer_config.json").write_text(json.dumps(settings))
            yield f"{key}: {name}", place, lambda place=place: load_tokenizer(str(place), 100)
    touch = f"touch '{mark}'"
    for number, template in enumerate(
        (
            "{{ cycler.__init__.__globals__.os.system(%r) }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}%.0s",
            "{{ self.__init__.__globals__.__builtins__.eval('1') }}%.0s",
            "{{ messages.append.__self__.clear() }}%.0s",
        )
    ):
        place = save_tokenizer(folder / f"template-{number}", template % touch)
        yield f"template {template}", place, lambda place=place: _chat(place)
    place = save_tokenizer(folder / "code")
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "own.py").write_text(f"import os\nos.system({touch!r})\nclass Own: pass\n")
    yield "a tokenizer with code of its own", place, lambda: load_tokenizer(str(place), 1000)


def _chat(place: Path) -> None:
    load_tokenizer(str(place), 1000).encode_chat([{"role": "user", "content": "x"}])
