"""A pretrained model on disk: found, checked, and read piece by piece.

A Hugging Face folder holds ``config.json``, weights in one or many safetensors files, and a
tokenizer. Nothing here reads more of a tensor than it is asked for.
"""

import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sapo_megatron.errors import UserError, one_line, with_type
from sapo_megatron.files import read_text
from sapo_megatron.hf import fp8, fused
from sapo_megatron.hf.architecture import Architecture, parse_architecture, read_architecture
from sapo_megatron.hf.config import MULTI_TOKEN
from sapo_megatron.hf.kinds import text_model, text_name
from sapo_megatron.hf.names import tensors_read

INDEX = "model.safetensors.index.json"
DTYPES = {"F64", "F32", "BF16", "F16", fp8.DTYPE}
SAME = (
    "model_type",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "vocab_size",
    "tied_embeddings",
    "attention",
    "experts",
    "delta_net",
)
"""What a model must have in common with ``model.architecture``; the rest is its own affair."""
NOT_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "tiktoken*")
"""What a model folder holds beside weights: its configuration and its tokenizer."""
TEMPLATES = ("additional_chat_templates", "additional_chat_templates/*")
OTHER_FORMATS = ("*.gguf", "pytorch_model*.bin", "consolidated*.pth")
LFS = b"version https://git-lfs"
"""How a file begins that stands for one which git LFS has not fetched."""


def find_model(path: str, *, weights: bool = True) -> Path:
    """The folder of a model: ``path`` itself, or what the hub has under that name.

    ``weights``: whether they are asked for as well. What comes from the hub goes to the Hugging
    Face cache; many processes may ask for it at once. Raises UserError where
    there is no such folder and no such model.
    """
    return _find(path, [*(["*.safetensors"] if weights else []), *NOT_WEIGHTS])


def _find(path: str, patterns: list[str]) -> Path:
    """The folder ``path``, or one with what the hub has of a model that fits the patterns."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"model.path: expected a folder, got the file {path}; name its folder")
    if folder.is_dir() or not is_hub_name(path):
        return _checked(folder)
    from huggingface_hub import snapshot_download  # seconds to import

    try:
        folder = Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # network, permission and cache errors have no common ancestor
        raise UserError(
            f"model.path: expected a folder or a model of the Hugging Face hub, got {path}: "
            f"{one_line(error, 200)}; download it first (hf download {path}) or name a folder"
        ) from None
    return _checked(folder)


def _checked(folder: Path) -> Path:
    """``folder``, if what it holds beside weights is a model's. Raises UserError."""
    check_inside(folder)
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(
            f"{adapter}: expected a whole model, got an adapter; merge it into its base model "
            f"(merge_and_unload of peft), and set model.path to that"
        )
    if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
        raise _without_weights(folder)
    for path in itertools.chain(*map(folder.glob, NOT_WEIGHTS)):
        _refuse_pointer(path)
    return folder


def check_inside(folder: Path) -> None:
    """Refuse a folder that would have files from elsewhere read, or copied. Raises UserError.

    Those are links out of it, unless into the ``blobs`` of its Hugging Face cache, and what its
    tokenizer's settings have transformers open.
    """
    home = Path(os.path.realpath(folder))
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    for path in itertools.chain(*map(folder.glob, ("*.safetensors", *NOT_WEIGHTS, *TEMPLATES))):
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(home) and real.parent != blobs:
            raise UserError(
                f"{path}: expected a file in this folder, got a link to {real}; put the file there"
            )
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return  # who needs it will say so
    for key, value in settings.items() if isinstance(settings, dict) else ():
        names = value if isinstance(value, list) else [value]
        opened = key.endswith(("_file", "_files")) and key != "special_tokens_map_file"
        if opened and any(isinstance(name, str) and Path(name).name != name for name in names):
            raise UserError(
                f"{path}: {key}: expected the name of a file in this folder, got {value!r}; put "
                f"the file there"
            )


def _without_weights(folder: Path) -> UserError:
    """What to say of a folder that has no safetensors files."""
    others = [path.name for path in itertools.chain(*map(folder.glob, OTHER_FORMATS))]
    got = (
        f"{min(others)}, a format that is not read; load it with transformers and save_pretrained"
        if others
        else "none; download them, or set model.init=random to start without"
    )
    return UserError(f"model.path: expected weights (*.safetensors) in {folder}, got {got}")


def _refuse_pointer(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: expected a file, got a pipe or a device; remove it")
    try:
        with path.open("rb") as file:
            begins = file.read(len(LFS))
    except OSError:
        return  # who needs it will say so
    if begins == LFS:
        raise UserError(
            f"{path}: expected the file itself, got a pointer of git LFS; run git lfs pull in its "
            f"folder, or download it again"
        )


def is_hub_name(path: str) -> bool:
    """Whether ``path`` looks like ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None


def find_architecture(path: str, expected: str | None) -> Architecture:
    """The architecture of the model at ``path`` without its weights.

    That of the folder where it is on this machine, else that of the file ``expected``. Raises
    UserError where there is neither, or where they are not the same model.
    """
    if Path(path).is_dir() or expected is None:
        folder = _find(path, ["config.json", "adapter_config.json"])
        return check_same(read_architecture(folder), path, expected)
    return _expected(expected)


def check_same(arch: Architecture, path: str, expected: str | None) -> Architecture:
    """``arch``, of the model at ``path``, if it has the sizes of the file ``expected``.

    Raises UserError if not.
    """
    if expected is None:
        return arch
    wanted, got = sizes(_expected(expected), SAME), sizes(arch, SAME)
    for name in wanted | got:
        if wanted.get(name) != got.get(name):
            raise UserError(
                f"model.path: expected the model of {expected}, got another in {path}: {name} is "
                f"{got.get(name)} instead of {wanted.get(name)}; change one of them"
            )
    return arch


def sizes(arch: Architecture, names: Iterable[str]) -> dict[str, Any]:
    """What ``names`` are, by dotted name."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(arch, name)
        parts = vars(value) if dataclasses.is_dataclass(value) else {"": value}
        found.update({f"{name}.{part}".rstrip("."): x for part, x in parts.items()})
    return found


def _expected(file: str) -> Architecture:
    path = Path(file)
    try:
        config = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"model.architecture: no such file: {path}; change it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.architecture: cannot read {path}: {one_line(error, 200)}") from None
    return parse_architecture(config, path)


def end_tokens(folder: Path, arch: Architecture) -> set[int]:
    """The tokens that ``generation_config.json`` and ``config.json`` let a response end with.

    Raises UserError, naming file and key.
    """
    config, generation = folder / "config.json", folder / "generation_config.json"
    given = [(config, "eos_token_id", arch.config.get("eos_token_id"))]
    if generation.exists():
        given.append((generation, "eos_token_id", _generation(generation).get("eos_token_id")))
    found: set[int] = set()
    for path, key, value in given:
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        for token in tokens:
            if type(token) is not int or not 0 <= token < arch.vocab_size:
                raise UserError(
                    f"{path}: {key}: expected whole numbers >= 0 and below the vocab_size "
                    f"{arch.vocab_size}, got {token!r}; correct it"
                )
        found.update(tokens)
    return found


def _generation(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected JSON, could not read it ({with_type(error)}); correct or remove it"
        ) from None
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {type(settings).__name__}; correct or remove it"
        )
    return settings


class Listed(NamedTuple):
    """What is known of a tensor without it."""

    name: str
    dtype: torch.dtype
    shape: torch.Size


class WeightFiles:
    """The weights of a model folder, by tensor name; a text model's as if they stood alone."""

    def __init__(self, folder: Path) -> None:
        """Opens every file, once, and reads what it says it holds.

        Raises UserError, naming the file, for weights that are missing, cut short, of two
        generations, or in a dtype that is not read. ``config.json`` has been read before.
        """
        check_inside(folder)
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        """The names on disk."""
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
                if (other_name := self._stored.setdefault(text_name(name), name)) != name:
                    raise UserError(
                        f"{path}: {name}: expected one tensor of that name, got also {other_name}; "
                        f"the files are of two models: download them again"
                    )
                self._files[text_name(name)] = path
        for path, file in self._open.items():
            for name in file.keys():  # noqa: SIM118
                if (other := self._files.get(text_name(name), path)) != path:
                    raise UserError(
                        f"{path}: {name}: expected it in {other.name} alone, where {INDEX} places "
                        f"it, got it here as well; the files are of two models: download them again"
                    )
        self._parts = fused.apart(self._files, self._slice)
        self._check_scales()

    def _listed(self) -> Mapping[Path, list[str] | None]:
        """File -> the tensors that the index places in it; None: all that it has."""
        index, files = self.folder / INDEX, sorted(self.folder.glob("*.safetensors"))
        if not index.exists():
            if not files:
                raise _without_weights(self.folder)
            if len(files) > 1:
                raise UserError(
                    f"{index}: expected it beside {len(files)} files of weights, to say what is in "
                    f"which, got none; download it"
                )
            return dict.fromkeys(files)
        try:
            places = dict(json.loads(read_text(index))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{index}: expected a weight_map from tensors to files, could not read it "
                f"({with_type(error)}); download it again"
            ) from None
        listed: dict[Path, list[str]] = {}
        for name, file in places.items():
            if not (isinstance(file, str) and re.fullmatch(r"[^/\0]+\.safetensors", file)):
                raise UserError(
                    f"{index}: {name}: expected the name of a safetensors file in this folder, got "
                    f"{file!r}; download it again"
                )
            listed.setdefault(self.folder / file, []).append(name)
        if strays := [path for path in files if path not in listed]:
            raise UserError(
                f"{strays[0]}: expected no weights but those that {INDEX} names, got this file; "
                f"remove it if it is of another model, or download the index again"
            )
        return listed

    def _check_scales(self) -> None:
        """Refuse fp8 weights that their scales, or ``config.json``, do not fit."""
        quantised = sorted(name for name in self._files if self._dtype(name) == fp8.DTYPE)
        config = self.folder / "config.json"
        values = text_model(json.loads(config.read_text())) if quantised else {}
        known = values.get("quantization_config")
        for name in quantised:
            if not known:
                raise UserError(
                    f"{self._files[name]}: {name}: expected bf16 or fp32, as config.json has no "
                    f"quantization_config, got {fp8.DTYPE}; download config.json again"
                )
            scale, shape, got = name + fp8.SCALE, fp8.scale_shape(self._slice(name).get_shape()), ""
            if scale in self._files:
                got = f"{self._slice(scale).get_shape()} in {self._dtype(scale)}"
            if got not in [f"{shape} in {dtype}" for dtype in fp8.SCALE_DTYPES]:
                raise UserError(
                    f"{self._files.get(scale, self._files[name])}: {scale}: expected {shape} in "
                    f"{' or '.join(fp8.SCALE_DTYPES)} for the fp8 weight, got {got or 'none'}; "
                    f"download the folder again"
                )

    def _slice(self, name: str) -> Any:
        stored = self._stored.get(name)
        return self._open[self._files[name]].get_slice(stored) if stored else self._parts[name]

    def _dtype(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def left_out(self, arch: Architecture) -> str:
        """The parts that the files have beside the text model ``arch``, with how many tensors: what
        sees and hears, and predicts several tokens. Raises UserError for any other tensor."""
        ours, config = tensors_read(arch), arch.config
        more = max(config.get(n) or 0 for n in MULTI_TOKEN)
        beside = more or arch.model_type == "qwen3_next"  # whose config.json does not say so
        whole = json.loads((self.folder / "config.json").read_text())
        counts: Counter[str] = Counter()
        for name, path in self._files.items():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            text = layer or re.match(r"model\.(?:embed_tokens|norm)\.|lm_head\.", name)
            if ours(name.removesuffix(fp8.SCALE)) or name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight" and self._is_tied(name):
                continue
            if layer and 0 <= int(layer[1]) - arch.num_layers < more:
                counts[f"layer {layer[1]}, behind the last"] += 1
            elif not text and ("text_config" in whole or (beside and name.startswith("mtp."))):
                counts[".".join(name.split(".")[: 1 + name.startswith("model.")])] += 1
            else:
                raise UserError(
                    f"{path}: {name}: expected the tensors of the {arch.num_layers} layers that "
                    f"config.json describes, got one that nothing reads; the weights are not those "
                    f"of config.json"
                )
        return "; ".join(f"{part} ({number} tensors)" for part, number in sorted(counts.items()))

    def _is_tied(self, head: str) -> bool:
        embedding = "model.embed_tokens.weight"
        return embedding in self._files and torch.equal(
            self._slice(head)[...], self._slice(embedding)[...]
        )

    def read(self, name: str, shape: Sequence[int], *index: slice) -> Tensor:
        """``tensor[index]`` of the tensor ``name``, on the CPU, in the dtype that it is stored in.

        fp8 is multiplied by its scales, in fp32. Raises UserError, naming tensor and file, where
        the tensor is missing, has not this ``shape`` or holds a value that is not finite.
        """
        path = self._files.get(name)
        if path is None:
            raise UserError(
                f"{self.folder}: expected the tensor {name}, got none in its files; the weights "
                f"are not whole or not those of config.json"
            )
        tensor = self._slice(name)
        if tuple(tensor.get_shape()) != tuple(shape):
            raise UserError(
                f"{path}: {name}: expected the shape {list(shape)} that config.json asks for, "
                f"got {list(tensor.get_shape())}; the weights are not those of config.json"
            )
        values = tensor[index or (...,)]
        if tensor.get_dtype() == fp8.DTYPE:
            values = self._dequantised(name, values, index)
        self._check_finite(name, values)
        return values

    def _dequantised(self, name: str, values: Tensor, index: Sequence[slice]) -> Tensor:
        """``values``, which are the fp8 weight's at ``index``; reads the scales that they need."""
        parts = []
        for size, part in itertools.zip_longest(self._slice(name).get_shape(), index):
            start, stop, _ = (part or slice(None)).indices(size)
            parts.append(slice(start, stop))
        scale = self._slice(name + fp8.SCALE)[tuple(map(fp8.blocks, parts))]
        self._check_finite(name + fp8.SCALE, scale.float())
        return fp8.dequantised(values, scale, parts)

    def _check_finite(self, name: str, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise UserError(
                f"{self._files[name]}: {name}: expected finite values, got {bad} that are NaN or "
                f"infinite; download the file again, or export the model again"
            )


def _opened(path: Path) -> Any:
    """One file, after a look at its header. Raises UserError."""
    _refuse_pointer(path)
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
        if dtype not in DTYPES and not name.endswith(fp8.SCALE):
            raise UserError(
                f"{path}: {name}: expected one of {', '.join(sorted(DTYPES))}, got {dtype}; "
                f"convert the weights to bf16"
            )
    return file
