"""Weights between Hugging Face folders and this rank's piece of the model, tensor by tensor.

Loading, every rank reads its own pieces from the files and nothing else. Saving, one rank of each
tensor-parallel group that holds weights for the first time gathers and writes them, so a large
model is written by many ranks at once; the folder must be one that all of them see.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from sapo_megatron.errors import RunFailed
from sapo_megatron.files import whole_file, whole_folder
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.hf.config import MULTI_TOKEN, in_both_spellings, tokenizer_for_both
from sapo_megatron.hf.folder import INDEX, NOT_WEIGHTS, Listed, WeightFiles, check_inside
from sapo_megatron.hf.names import Entry, Named, Plain, entry
from sapo_megatron.policy import parallel
from sapo_megatron.policy.gpt import LogprobGPT
from sapo_megatron.policy.parallel import Nodes, ParallelGroups
from sapo_megatron.policy.spec import DTYPES
from sapo_megatron.recipe.schema import ModelConfig

SHARD_BYTES = 4 * 2**30
"""Size at which an exported safetensors file is closed and the next begun."""


def save_random(arch: Architecture, model: ModelConfig, folder: Path, *, seed: int) -> None:
    """Write a freshly initialised model of architecture ``arch`` to ``folder``.

    Every row of the embedding is drawn. transformers leaves that of ``pad_token_id`` at zero, where
    the first norm amplifies by 1 / sqrt(eps): once such a token is sampled, its gradient is a
    hundred thousand times that of any other.
    """
    values = {**arch.config, "pad_token_id": None}
    if arch.model_type == "kimi_k2":  # which is the hub's name for it alone
        values["model_type"] = "deepseek_v3"
    config = transformers.AutoConfig.for_model(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = transformers.AutoModelForCausalLM.from_config(config)
    fresh.config.pad_token_id = arch.config.get("pad_token_id")
    transformers.logging.disable_progress_bar()
    with whole_folder(folder) as temporary:
        fresh.to(DTYPES[model.params_dtype]).save_pretrained(temporary)


_Turn = tuple[int, int, Listed]
"""Turn and rank."""


@dataclass(frozen=True)
class _Weight:
    """A weight of this rank."""

    entry: Entry
    tensor: Tensor
    group: ProcessGroup
    """Over which it is cut."""
    replicas: ProcessGroup
    """Ranks that hold the same."""

    @property
    def place(self) -> tuple[int, int]:
        """(rank, size) of the cut."""
        if isinstance(self.entry, Plain) and self.tensor.shape == self.entry.shape:
            return 0, 1  # whole on every rank, though other layers of this name are cut
        return self.group.rank(), self.group.size()


@dataclass(frozen=True)
class Written:
    """What a hand-over has written."""

    bytes: int
    changed: int
    """Bytes of elements that differ from those that were there; all where nothing was."""


class HuggingFaceWeights:
    """The chunks' weights as a Hugging Face folder: read here, written in the same format."""

    def __init__(
        self, chunks: list[LogprobGPT], arch: Architecture, groups: ParallelGroups, folder: Path
    ) -> None:
        self._chunks = chunks
        self._arch = arch
        self._groups = groups
        self._folder = folder

    def load(self) -> None:
        """Fill the chunks. Collective over all ranks.

        Raises UserError, on every rank, where a tensor is missing, misshapen or not finite.
        """
        with parallel.failing_together(self._groups), torch.no_grad():
            files = WeightFiles(self._folder)
            for weight in self._weights():
                weight.tensor.copy_(weight.entry.load(files.read, *weight.place))

    def save(self, folder: Path, *, tokenizer: str | None = None) -> None:
        """Write the chunks' present weights as a new folder. Collective over all ranks.

        A rank holds one file's tensors at a time; what goes wrong leaves no folder behind. Beside
        the weights comes what the folder that was loaded holds, and ``tokenizer`` (a folder or a
        file) where it is another one. Raises RunFailed as ``check_finite``.
        """
        self.check_finite(folder)
        rank = dist.get_rank()
        with _shared_folder(self._groups, folder) as temporary:
            tensors = self._whole_tensors()
            with parallel.failing_together(self._groups):
                try:
                    files = _write(tensors, temporary, f"rank-{rank:05d}")
                finally:
                    for _ in tensors:  # others of its group wait for this rank's pieces
                        pass
            written: list[Any] = [None] * dist.get_world_size()
            # Over the world: every rank says what it has written, the first makes the index.
            dist.all_gather_object(written, files, group=self._groups.world)
            if rank == 0:
                _write_index(list(itertools.chain(*written)), temporary)
                self._write_rest(temporary, tokenizer)

    def check_finite(self, target: Path) -> None:
        """Raise RunFailed, on every rank, where a weight is not one to be kept in ``target``.

        Collective over all ranks.
        """
        with parallel.failing_together(self._groups):
            for chunk in self._chunks:
                for name, weight in chunk.named_parameters():
                    if not bool(torch.isfinite(weight).all()):
                        raise RunFailed(
                            f"{target}: not written, as the weights have become NaN or infinite "
                            f"({self._name_in_whole_model(name, chunk)}); lower the learning rate, "
                            f"and go on from a checkpoint before"
                        )

    def listing(self) -> list[Listed]:
        """What ``stream`` yields, in its order; the same on every rank.

        Collective over all ranks.
        """
        return [listed for _, _, listed in self._schedule()]

    def stream(self) -> Iterator[Named]:
        """Every tensor of the model, one after the other, on the first rank; others yield nothing.

        Collective over all ranks, each of which must come to its end. A rank holds the tensors of
        one weight at a time; some are the model's own memory, for who keeps them to copy.
        """
        rank = dist.get_rank()
        for owner, listed, mine in self._in_turn():
            tensor = self._empty(listed) if rank == 0 and mine is None else mine
            if tensor is None:
                continue
            # Between two ranks, which come to the tensors of the schedule in its order.
            if owner != 0 and rank == 0:
                dist.recv(tensor, src=owner)
            elif owner != 0:
                dist.send(tensor, dst=0)
            if rank == 0:
                yield listed.name, tensor

    def save_on_nodes(self, folder: Path, nodes: Nodes) -> Written:
        """Write the present weights into ``folder`` of every node, in place of those of before.

        For a file system that a node has for itself. Each rank writes what those in its place on
        all nodes hold, a file at a time, so that a node never has more than the model and a file
        for each of its ranks. The folder is whole when all ranks are through. Collective over all
        ranks. Returns what this node has written.
        """
        with parallel.failing_together(self._groups):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a memory that all users share
            tensors = self._of_peers(nodes)
            try:
                mine = _replace(tensors, folder, f"rank-{nodes.local:05d}")
            finally:
                for _ in tensors:  # others wait for this rank's pieces
                    pass
        found: list[Any] = [None] * dist.get_world_size()
        # Over the world: every rank says what it has written, the first of a node makes the index.
        dist.all_gather_object(found, (nodes.number, *mine), group=self._groups.world)
        here = [(files, changed) for number, files, changed in found if number == nodes.number]
        files = [file for some, _ in here for file in some]
        with parallel.failing_together(self._groups):
            if nodes.is_first:
                _write_places(files, folder)
                self._write_rest(folder, None)
        return Written(bytes=sum(f.size for f in files), changed=sum(bytes for _, bytes in here))

    def _of_peers(self, nodes: Nodes) -> Iterator[Named]:
        """The tensors that any rank in this rank's place on its node is to write.

        Collective over all ranks.
        """
        size = dist.get_world_size() // len(nodes.firsts)
        for owner, listed, mine in self._in_turn():
            if owner % size == nodes.local:
                tensor = self._empty(listed) if mine is None else mine
                if nodes.peers:
                    # Over those in the same place on their nodes, in the order of the schedule.
                    dist.broadcast(tensor, src=owner, group=nodes.peers)
                yield listed.name, tensor

    def _in_turn(self) -> Iterator[tuple[int, Listed, Tensor | None]]:
        """(owner, what it is, on the owner itself) of every tensor of the model.

        Collective over all ranks, each of which must come to its end.
        """
        weights = enumerate(self._weights())
        position, tensors = -1, iter(list[Named]())
        for turn, owner, listed in self._schedule():
            while position < turn:  # every rank of a weight's group comes to it in the same turn
                position, weight = next(weights, (turn, None))
                tensors = iter(self._whole(weight) if weight else [])
            if owner == dist.get_rank():
                name, tensor = next(tensors)
                assert Listed(name, tensor.dtype, tensor.shape) == listed, name
                yield owner, listed, tensor.contiguous()
            else:
                yield owner, listed, None

    def _empty(self, listed: Listed) -> Tensor:
        return torch.empty(listed.shape, dtype=listed.dtype, device=self._groups.device)

    def _schedule(self) -> list[_Turn]:
        """The tensors of all ranks by turn, of which each rank has one for each of its weights."""
        mine: list[_Turn] = []
        for turn, weight in enumerate(self._weights()):
            if self._is_written(weight) and weight.group.rank() == 0:
                _, size = weight.place
                pieces = [torch.empty_like(weight.tensor, device="meta")] * size
                for name, tensor in weight.entry.merge(pieces):
                    listed = Listed(name, tensor.dtype, tensor.shape)
                    mine.append((turn, dist.get_rank(), listed))
        turns: list[Any] = [None] * dist.get_world_size()
        # Over the world: every rank says what it has and when it comes to it.
        dist.all_gather_object(turns, mine, group=self._groups.world)
        return sorted(itertools.chain(*turns), key=lambda turn: turn[:2])  # stable: names as merged

    def _whole_tensors(self) -> Iterator[Named]:
        """The tensors that this rank is to write. Collective over each weight's group."""
        for weight in self._weights():
            yield from self._whole(weight)

    def _whole(self, weight: _Weight) -> list[Named]:
        """The tensors of a weight, on the rank that is to write them. Collective over its group."""
        if not self._is_written(weight):
            return []
        _, size = weight.place
        pieces = [weight.tensor.detach().contiguous()]
        if size > 1:
            gathered = [torch.empty_like(pieces[0]) for _ in range(size)]
            # Over the group that the weight is cut over: its ranks hold the same weights in the
            # same order, and of all replicas the first come here together.
            dist.all_gather(gathered, pieces[0], group=weight.group)
            pieces = gathered
        return weight.entry.merge(pieces) if weight.group.rank() == 0 else []

    def _is_written(self, weight: _Weight) -> bool:
        """Whether this rank's group of the weight is the one that writes it."""
        return weight.replicas.rank() == 0 and not self._is_tied_copy(weight)

    def _weights(self) -> Iterator[_Weight]:
        """This rank's weights, under the names they have in the whole model."""
        megatron = self._groups.megatron
        for chunk in self._chunks:
            # The bias that helps a router choose is no parameter, but part of the model.
            biases = ((n, b) for n, b in chunk.named_buffers() if n.endswith(".expert_bias"))
            for name, tensor in itertools.chain(chunk.named_parameters(), biases):
                whole = self._name_in_whole_model(name, chunk)
                found = entry(self._arch, whole, chunk.vocab_size)
                if ".mlp.experts." in name:
                    yield _Weight(found, tensor, megatron.expt_tp, megatron.expt_dp)
                else:
                    yield _Weight(found, tensor, self._groups.tp, self._groups.dp_cp)

    def _name_in_whole_model(self, name: str, chunk: LogprobGPT) -> str:
        words = name.split(".")
        if words[:2] != ["decoder", "layers"]:
            return name
        words[2] = str(chunk.decoder.layers[int(words[2])].layer_number - 1)
        if ".mlp.experts." in name:
            assert self._arch.experts, "only a model with experts has such weights"
            local = self._arch.experts.number // self._groups.ep.size()
            expert = self._groups.ep.rank() * local + int(words[-1].removeprefix("weight"))
            words[-1] = f"weight{expert}"
        return ".".join(words)

    def _is_tied_copy(self, weight: _Weight) -> bool:
        """Whether this is the last stage's copy of the embedding."""
        return (
            self._arch.tied_embeddings
            and not self._groups.is_first_stage
            and isinstance(weight.entry, Plain)
            and weight.entry.name == "model.embed_tokens.weight"
        )

    def _write_rest(self, folder: Path, tokenizer: str | None) -> None:
        """``config.json``, and the files that a model folder holds beside weights."""
        sources = [self._folder, *([Path(tokenizer)] if tokenizer else [])]
        for path in itertools.chain(*map(_beside_weights, sources)):
            shutil.copyfile(path, folder / path.name)
        settings = folder / "tokenizer_config.json"
        if settings.exists():
            for_both = tokenizer_for_both(json.loads(settings.read_text()))
            settings.write_text(json.dumps(for_both, indent=2, ensure_ascii=False) + "\n")
        dtype = str(self._chunks[0].config.params_dtype).removeprefix("torch.")
        config = in_both_spellings({**self._arch.config, "torch_dtype": dtype, "dtype": dtype})
        for key in {*MULTI_TOKEN, "use_mtp"} & config.keys():
            config[key] = type(config[key])(0)  # they are neither loaded nor trained
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclass(frozen=True)
class _File:
    name: str
    tensors: list[str]
    size: int


def _write(tensors: Iterator[Named], folder: Path, prefix: str) -> list[_File]:
    """Write files of about ``SHARD_BYTES``, holding one at a time."""
    files: list[_File] = []
    for number, shard in enumerate(_shards(tensors)):
        name = f"{prefix}-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.append(_File(name, list(shard), sum(t.nbytes for t in shard.values())))
    return files


def _replace(tensors: Iterator[Named], folder: Path, prefix: str) -> tuple[list[_File], int]:
    """``_write`` in place of what was written before; also the bytes that have changed."""
    files: list[_File] = []
    changed = 0
    for number, shard in enumerate(_shards(tensors)):
        path = folder / f"{prefix}-{number:05d}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as before:
                changed += sum(_differ(before.get_tensor(n), t) for n, t in shard.items())
        else:
            changed += sum(t.nbytes for t in shard.values())
        with whole_file(path) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        files.append(_File(path.name, list(shard), sum(t.nbytes for t in shard.values())))
    return files, changed


def _shards(tensors: Iterator[Named]) -> Iterator[dict[str, Tensor]]:
    """Copies of the tensors, about ``SHARD_BYTES`` at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.cpu().contiguous().clone()
        size += tensor.nbytes
    if shard:
        yield shard


def _differ(before: Tensor, after: Tensor) -> int:
    """Bytes of the elements that differ."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[after.itemsize]
    return int((before.view(bits) != after.view(bits)).sum()) * after.itemsize


def _beside_weights(source: Path) -> list[Path]:
    """The tokenizer and the like in a model folder, or a tokenizer's one file."""
    if source.is_file():
        return [source]
    check_inside(source)
    found = (path for pattern in NOT_WEIGHTS for path in source.glob(pattern))
    return [path for path in found if path.name not in ("config.json", INDEX)]


def _write_index(files: list[_File], folder: Path) -> None:
    """Give the ranks' files their usual names, and say which tensor is where."""
    named = []
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / file.name).rename(folder / name)
        named.append(replace(file, name=name))
    _write_places(named, folder)


def _write_places(files: list[_File], folder: Path) -> None:
    """Say which tensor is where."""
    places = {tensor: file.name for file in files for tensor in file.tensors}
    index = {"metadata": {"total_size": sum(f.size for f in files)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _shared_folder(groups: ParallelGroups, folder: Path) -> Iterator[Path]:
    """``whole_folder`` of the first rank, on every rank. Collective over all ranks."""
    with ExitStack() as stack:
        yield parallel.on_first_rank(groups, lambda: stack.enter_context(whole_folder(folder)))
        # Over the world: the folder is whole once every rank has written its part,
        dist.barrier(groups.world)
    # and no rank goes on before it has its name.
    dist.barrier(groups.world)
