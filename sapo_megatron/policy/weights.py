"""Weights between Hugging Face folders and this rank's piece of the model, through mbridge."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from mbridge import AutoBridge
from safetensors.torch import save_file
from torch import Tensor

from sapo_megatron.config import ModelConfig
from sapo_megatron.policy.model import DTYPES, PolicyModel

SHARD_BYTES = 4 * 2**30
"""Size at which an exported safetensors file is closed and the next begun."""


def save_random(model: ModelConfig, folder: Path, *, seed: int) -> None:
    """Write a freshly initialised model of ``model``'s architecture to ``folder``."""
    config = transformers.AutoConfig.from_pretrained(model.path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = transformers.AutoModelForCausalLM.from_config(config)
    with _whole(folder) as temporary:
        fresh.to(DTYPES[model.params_dtype]).save_pretrained(temporary)


class HuggingFaceWeights:
    """The chunks' weights as a Hugging Face folder: read here, written in the same format."""

    def __init__(self, chunks: list[PolicyModel], folder: Path, model: ModelConfig) -> None:
        self._chunks = chunks
        self._folder = folder
        self._bridge = AutoBridge.from_pretrained(
            str(folder),
            dtype=DTYPES[model.params_dtype],  # by default it rounds fp32 weights to bfloat16
            make_vocab_size_divisible_by=chunks[0].config.tensor_model_parallel_size,
        )
        # It would set these when it builds the model itself.
        self._bridge.vocab_size = chunks[0].true_vocab_size
        self._bridge.padded_vocab_size = chunks[0].vocab_size
        _complete_names(self._bridge)
        if chunks[0].config.expert_tensor_parallel_size == 1:
            _keep_experts_whole(self._bridge)

    def load(self) -> None:
        """Fill the chunks. Collective over all ranks."""
        with torch.no_grad():
            self._bridge.load_weights(self._chunks, str(self._folder))

    def save(self, folder: Path) -> None:
        """Write the chunks' present weights as a new folder. Collective over all ranks.

        One tensor at a time is gathered, and one shard is held on rank 0.
        """
        with torch.no_grad():
            tensors = self._bridge.export_weights(self._chunks)
            if dist.get_rank() == 0:
                with _whole(folder) as temporary:
                    _write_shards(tensors, temporary)
                    self._bridge.hf_config.save_pretrained(temporary)
            else:
                for _ in tensors:
                    pass
        dist.barrier()


def _complete_names(bridge: Any) -> None:
    """What mbridge lacks for MoE models: dense layers among the others, tied embeddings.

    On this bridge alone: upstream's tables belong to the class.
    """
    layer = "model.layers.{layer_number}."
    bridge._MLP_MAPPING = {
        "mlp.linear_fc1.weight": [f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"],
        "mlp.linear_fc1.layer_norm_weight": [f"{layer}post_attention_layernorm.weight"],
        "mlp.linear_fc2.weight": [f"{layer}mlp.down_proj.weight"],
        **bridge._MLP_MAPPING,
    }
    tied = bridge.hf_config.tie_word_embeddings
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    bridge._DIRECT_MAPPING = {**bridge._DIRECT_MAPPING, "output_layer.weight": head}


def _keep_experts_whole(bridge: Any) -> None:
    """Where ep is 1, mbridge gathers experts over tensor parallelism, which did not cut them."""
    merge = bridge._weight_merge_across_tp

    def merge_across_tp(name: str, shards: list[Tensor], param: Tensor) -> Tensor:
        return shards[0] if ".mlp.experts." in name else merge(name, shards, param)

    bridge._weight_merge_across_tp = merge_across_tp


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    size = total = 0

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` once the block is through."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        temporary = Path(parent) / folder.name
        temporary.mkdir()
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
