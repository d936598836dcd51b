"""A pretrained model on disk: found, checked, and read piece by piece.

A Hugging Face folder holds ``config.json``, weights in one or many safetensors files, and a
tokenizer. Nothing here reads more of a tensor than it is asked for.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sapo_megatron.errors import UserError, one_line, with_type
from sapo_megatron.hf.architecture import Architecture, parse_architecture, read_architecture

INDEX = "model.safetensors.index.json"
DTYPES = {"F64", "F32", "BF16", "F16"}
SAME = (
    "model_type",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "vocab_size",
    "tied_embeddings",
    "attention",
    "experts",
)
"""What a model must have in common with ``model.architecture``; the rest is its own affair."""
NOT_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "tiktoken*")
"""What a model folder holds beside weights: its configuration and its tokenizer."""


def find_model(path: str) -> Path:
    """The folder of a model: ``path`` itself, or what the hub has under that name.

    Weights from the hub go to the Hugging Face cache; many processes may ask for them at once.
    Raises UserError where there is no such folder and no such model.
    """
    return _find(path, ["*.safetensors", *NOT_WEIGHTS])


def _find(path: str, patterns: list[str]) -> Path:
    """The folder ``path``, or one with what the hub has of a model that fits the patterns."""
    folder = Path(path)
    if folder.is_dir() or not is_hub_name(path):
        return folder
    from huggingface_hub import snapshot_download  # seconds to import

    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # network, permission and cache errors have no common ancestor
        raise UserError(
            f"model.path: expected a folder or a model of the Hugging Face hub, got {path}: "
            f"{one_line(error, 200)}; download it first (hf download {path}) or name a folder"
        ) from None


def is_hub_name(path: str) -> bool:
    """Whether ``path`` looks like ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None


def find_architecture(path: str, expected: str | None) -> Architecture:
    """The architecture of the model at ``path`` without its weights.

    That of the folder where it is on this machine, else that of the file ``expected``. Raises
    UserError where there is neither, or where they are not the same model.
    """
    if Path(path).is_dir() or expected is None:
        return check_same(read_architecture(_find(path, ["config.json"])), path, expected)
    return _expected(expected)


def check_same(arch: Architecture, path: str, expected: str | None) -> Architecture:
    """``arch``, of the model at ``path``, if it has the sizes of the file ``expected``.

    Raises UserError if not.
    """
    if expected is None:
        return arch
    wanted, got = _sizes(_expected(expected)), _sizes(arch)
    for name in wanted | got:
        if wanted.get(name) != got.get(name):
            raise UserError(
                f"model.path: expected the model of {expected}, got another in {path}: {name} is "
                f"{got.get(name)} instead of {wanted.get(name)}; change one of them"
            )
    return arch


def _sizes(arch: Architecture) -> dict[str, Any]:
    """What ``SAME`` names, by dotted name."""
    sizes: dict[str, Any] = {}
    for name in SAME:
        value = getattr(arch, name)
        parts = vars(value) if dataclasses.is_dataclass(value) else {"": value}
        sizes.update({f"{name}.{part}".rstrip("."): x for part, x in parts.items()})
    return sizes


def _expected(file: str) -> Architecture:
    path = Path(file)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"model.architecture: no such file: {path}; change it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.architecture: cannot read {path}: {error}") from None
    return parse_architecture(config, path)


class Listed(NamedTuple):
    """What is known of a tensor without it."""

    name: str
    dtype: torch.dtype
    shape: torch.Size


class WeightFiles:
    """The weights of a model folder, by tensor name."""

    def __init__(self, folder: Path) -> None:
        """Opens every file, once, and reads what it says it holds.

        Raises UserError, naming the file, for weights that are missing, cut short or in a dtype
        that is no floating-point number's.
        """
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path, names in self._listed().items():
            self._open[path] = _opened(path)
            held = set(self._open[path].keys())
            for name in held if names is None else names:
                if name not in held:
                    raise UserError(
                        f"{path}: expected the tensor {name}, which {INDEX} places there, got none;"
                        f" download the file again"
                    )
                self._files[name] = path

    def _listed(self) -> Mapping[Path, list[str] | None]:
        """File -> the tensors that the index places in it; None: all that it has."""
        index = self.folder / INDEX
        if not index.exists():
            files = sorted(self.folder.glob("*.safetensors"))
            if not files:
                raise UserError(
                    f"model.path: expected weights (*.safetensors) in {self.folder}, got none; "
                    f"download them, or set model.init=random to start without"
                )
            return dict.fromkeys(files)
        try:
            places = json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{index}: expected a weight_map from tensors to files, could not read it "
                f"({with_type(error)}); download it again"
            ) from None
        listed: dict[Path, list[str]] = {}
        for name, file in places.items():
            listed.setdefault(self.folder / file, []).append(name)
        return listed

    def read(self, name: str, shape: Sequence[int], *index: slice) -> Tensor:
        """``tensor[index]`` of the tensor ``name``, on the CPU, in the dtype that it is stored in.

        Raises UserError, naming tensor and file, where it is missing, has not this ``shape`` or
        holds a value that is not finite.
        """
        path = self._files.get(name)
        if path is None:
            raise UserError(
                f"{self.folder}: expected the tensor {name}, got none in its files; the weights "
                f"are not whole or not those of config.json"
            )
        tensor = self._open[path].get_slice(name)
        if tuple(tensor.get_shape()) != tuple(shape):
            raise UserError(
                f"{path}: {name}: expected the shape {list(shape)} that config.json asks for, "
                f"got {list(tensor.get_shape())}; the weights are not those of config.json"
            )
        values = tensor[index or (...,)]
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise UserError(
                f"{path}: {name}: expected finite values, got {bad} that are NaN or infinite; "
                f"download the file again, or export the model again"
            )
        return values


def _opened(path: Path) -> Any:
    """One file, after a look at its header. Raises UserError."""
    try:
        file = safe_open(path, framework="pt")
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file, and {INDEX} places tensors there; download it"
        ) from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: expected a whole safetensors file, got one that is cut short or damaged "
            f"({error}); download it again"
        ) from None
    for name, dtype in sorted(dtypes.items()):
        if dtype not in DTYPES:
            raise UserError(
                f"{path}: {name}: expected one of {', '.join(sorted(DTYPES))}, got {dtype}; "
                f"convert the weights to bf16"
            )
    return file
