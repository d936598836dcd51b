"""Model folders whose weights are in fp8 with a scale for each block, as they are published."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapo_megatron.hf.folder import INDEX

BLOCK = 128
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
NOT_CONVERTED = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "layers.1.self_attn.o_proj")


def quantise(
    folder: Path, config: dict[str, Any], scale_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Put the matrices of a folder into fp8; what each tensor of the model then is, in fp32.

    ``config`` becomes ``config.json``. A weight's scale is in another file than the weight where
    there is another.
    """
    files = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    expected, scales = {}, {}
    for tensors in files.values():
        for name, tensor in tensors.items():
            expected[name] = tensor.float()
            if tensor.ndim == 2 and not any(part in name for part in NOT_CONVERTED):
                tensors[name], scale = _in_blocks(tensor.float(), scale_dtype)
                scales[f"{name}_scale_inv"] = scale
                expected[name] = by_hand(tensors[name], scale)
    next(iter(files.values())).update(scales)
    for path, tensors in files.items():
        save_file(tensors, path, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: path.name for path, tensors in files.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    skipped = {"modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.o_proj"]}
    quantised = {**config, "quantization_config": QUANTIZATION | skipped}
    (folder / "config.json").write_text(json.dumps(quantised))
    return expected


def _in_blocks(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = (range(0, size, BLOCK) for size in weight.shape)
    values, scale = torch.empty_like(weight), torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = slice(row, row + BLOCK), slice(column, column + BLOCK)
            scale[i, j] = (weight[block].abs().max() / 448).to(scale_dtype)
            values[block] = weight[block] / scale[i, j]
    return values.clamp(-448, 448).to(torch.float8_e4m3fn), scale.to(scale_dtype)


def by_hand(values: Tensor, scale: Tensor) -> Tensor:
    """Each value times the scale of its block."""
    rows, columns = (torch.arange(size) // BLOCK for size in values.shape)
    return values.float() * scale.float()[rows][:, columns]
