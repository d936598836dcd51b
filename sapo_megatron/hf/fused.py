"""Experts of a layer that are one tensor on disk, read as if each were its own (Qwen3.5).

``mlp.experts.gate_up_proj [experts, gate and up, hidden]`` and ``mlp.experts.down_proj [experts,
hidden, inner]`` stand for ``mlp.experts.N.gate_proj.weight`` and the like, which is what others
write, and what transformers itself does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some rows of one expert of a tensor, in the place of what safetensors calls a slice."""

    whole: Any
    expert: int
    rows: slice

    def get_dtype(self) -> str:
        return self.whole.get_dtype()

    def get_shape(self) -> list[int]:
        return [self.rows.stop - self.rows.start, self.whole.get_shape()[2]]

    def __getitem__(self, index: Any) -> Tensor:
        """Of up to two slices, or of the ellipsis that stands for all."""
        rows, *columns = [slice(None)] if index == (...,) else index
        start, stop, _ = rows.indices(self.get_shape()[0])
        here = slice(self.rows.start + start, self.rows.start + stop)
        return self.whole[(slice(self.expert, self.expert + 1), here, *columns)][0]


def apart(files: dict[str, Path], read: Callable[[str], Any]) -> dict[str, Part]:
    """The experts of every tensor of ``files`` that holds a layer's, by their names.

    ``files`` has them in its place afterwards; ``read`` makes a slice of a name.
    """
    found: dict[str, Part] = {}
    for name, path in list(files.items()):
        match = re.fullmatch(r"(.*\.mlp\.experts\.)(gate_up|down)_proj", name)
        if match is None or len((whole := read(name)).get_shape()) != 3:
            continue
        experts, height, _ = whole.get_shape()
        names = ("gate", "up") if match[2] == "gate_up" else ("down",)
        count = height // len(names)
        held = {
            f"{match[1]}{expert}.{part}_proj.weight": Part(
                whole, expert, slice(i * count, (i + 1) * count)
            )
            for expert in range(experts)
            for i, part in enumerate(names)
        }
        if twice := held.keys() & files.keys():
            raise UserError(
                f"{path}: {name}: expected the experts once, got also {min(twice)}; the files are "
                f"of two models: download them again"
            )
        del files[name]
        files |= dict.fromkeys(held, path)
        found |= held
    return found
