"""Weights in fp8 with a scale for each block of 128 x 128, as DeepSeek-V3 has them.

A weight ``NAME`` in e4m3 has beside it ``NAME_scale_inv``, by whose values those of its blocks are
multiplied (arXiv 2412.19437, section 3.3). Blocks begin at the first row and column; the last ones
are cut off where a size is no multiple of 128.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo_megatron.errors import UserError

if TYPE_CHECKING:  # a config.json is read without torch
    from torch import Tensor

BLOCK = 128
DTYPE = "F8_E4M3"
SCALE = "_scale_inv"
SCALE_DTYPES = ("BF16", "F32", "F8_E8M0")


def check_quantization(given: dict[str, Any], path: str | Path) -> None:
    """Refuse a ``quantization_config`` of other weights; ``path`` is the file that has it.

    Raises UserError. An empty one says nothing.
    """
    method, size = given.get("quant_method"), given.get("weight_block_size")
    if given and not (method == "fp8" and size == [BLOCK, BLOCK]):
        got = f"fp8 with weight_block_size {json.dumps(size)}" if method == "fp8" else method
        raise UserError(
            f"{path}: quantization_config: expected none, or quant_method fp8 with "
            f"weight_block_size {[BLOCK, BLOCK]}, got {got}; use the model in bf16 or in such fp8"
        )


def scale_shape(shape: Sequence[int]) -> list[int]:
    """The shape of the scales of a weight."""
    return [-(-size // BLOCK) for size in shape]


def blocks(rows: slice) -> slice:
    """The blocks that hold these rows, or columns."""
    return slice(rows.start // BLOCK, -(-rows.stop // BLOCK))


def dequantised(values: Tensor, scale: Tensor, index: Sequence[slice]) -> Tensor:
    """``values``, which are ``weight[index]``, times the scales of their blocks, in fp32."""
    scale = scale.float()
    for dim, part in enumerate(index):
        expanded = scale.repeat_interleave(BLOCK, dim)
        scale = expanded.narrow(dim, part.start % BLOCK, part.stop - part.start)
    return values.float().mul_(scale)
