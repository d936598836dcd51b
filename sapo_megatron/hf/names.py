"""Which Hugging Face tensors a Megatron weight is made of, and how.

One table for all families. A weight of a GPTModel with Transformer Engine's names is one tensor of
the Hugging Face model, or gate and up projection one below the other, or query, key and value
interleaved by key head; tensor parallelism cuts each along one dimension.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapo_megatron.hf.architecture import (
    Architecture,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
)

Read = Callable[..., Tensor]
"""(name, whole shape, *slices) -> that part of a Hugging Face tensor."""
Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Plain:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    """The dimension that tensor parallelism cuts; None: every rank holds the whole."""
    padded_rows: int = 0
    """Rows of zeros below it, where the vocabulary does not divide."""

    def load(self, read: Read, rank: int, size: int) -> Tensor:
        """The piece of ``rank`` of ``size``, reading no more than that."""
        if self.split is None:
            return read(self.name, self.shape)
        total = self.shape[self.split] + self.padded_rows
        assert total % size == 0, f"{self.name}: {total} over {size} ranks"
        count = total // size
        index = [slice(None)] * len(self.shape)
        index[self.split] = slice(
            *(min(row, self.shape[self.split]) for row in (rank * count, (rank + 1) * count))
        )
        part = read(self.name, self.shape, *index)
        missing = count - part.shape[self.split]
        return torch.cat((part, part.new_zeros(missing, *self.shape[1:]))) if missing else part

    def merge(self, pieces: Sequence[Tensor]) -> list[Named]:
        """The tensor, of the pieces of all ranks; of any one where it is not cut."""
        whole = pieces[0] if self.split is None else torch.cat(tuple(pieces), dim=self.split)
        return [(self.name, whole[: self.shape[0]])]

    def below(self, prefix: str) -> "Plain":
        """The same with ``prefix`` before the name."""
        return replace(self, name=prefix + self.name)


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: ``count`` of each of its ``runs`` equal runs, from ``first`` on."""

    name: str
    shape: tuple[int, ...]
    count: int
    first: int = 0
    runs: int = 1

    def load(self, read: Read, rank: int, size: int) -> Tensor:
        """Those of ``rank`` of ``size``: some of the runs, or of a single run some of the rows."""
        if self.runs == 1:
            count = self.count // size
            start = self.first + rank * count
            return read(self.name, self.shape, slice(start, start + count))
        runs, width = self.runs // size, self.shape[0] // self.runs
        rows = read(self.name, self.shape, slice(rank * runs * width, (rank + 1) * runs * width))
        part = rows.unflatten(0, (runs, width)).narrow(1, self.first, self.count)
        return part.flatten(0, 1)


@dataclass(frozen=True)
class Stacked:
    """Parts one below the other: each rank holds its rows of the first, of the second, ..."""

    parts: tuple[Rows, ...]
    """Those of one tensor cover it, in their order."""

    def load(self, read: Read, rank: int, size: int) -> Tensor:
        return torch.cat([part.load(read, rank, size) for part in self.parts])

    def merge(self, pieces: Sequence[Tensor]) -> list[Named]:
        sizes = [part.runs * part.count // len(pieces) for part in self.parts]
        found: dict[str, list[Tensor]] = {}
        for part, *held in zip(self.parts, *(p.split(sizes) for p in pieces), strict=True):
            by_run = torch.cat(held).unflatten(0, (part.runs, part.count))
            found.setdefault(part.name, []).append(by_run)
        return [(name, torch.cat(parts, dim=1).flatten(0, 1)) for name, parts in found.items()]

    def below(self, prefix: str) -> "Stacked":
        return Stacked(tuple(replace(part, name=prefix + part.name) for part in self.parts))


@dataclass(frozen=True)
class QueryKeyValue:
    """Three tensors, interleaved: the query heads of a key head, that key head, its value head.

    Where queries have gates, those of a key head's query heads stand behind these heads; in the
    tensor each stands behind its own.
    """

    names: tuple[str, str, str]
    shapes: tuple[tuple[int, ...], ...]
    kv_heads: int
    gated: bool = False

    def load(self, read: Read, rank: int, size: int) -> Tensor:
        rows = [shape[0] // self.kv_heads for shape in self.shapes]
        count = sum(rows) * self.kv_heads // size
        # A rank may have a part of what belongs to a key head: it reads all of what it touches.
        first, last = rank * count // sum(rows), -(-(rank + 1) * count // sum(rows))
        parts = [
            read(name, shape, slice(first * n, last * n)).unflatten(0, (last - first, n))
            for name, shape, n in zip(self.names, self.shapes, rows, strict=True)
        ]
        if self.gated:
            heads = rows[0] // (2 * rows[1])
            parts[0] = parts[0].unflatten(1, (heads, 2, -1)).transpose(1, 2).flatten(1, 3)
        before = rank * count - first * sum(rows)
        return torch.cat(parts, dim=1).flatten(0, 1)[before : before + count]

    def merge(self, pieces: Sequence[Tensor]) -> list[Named]:
        rows = [shape[0] // self.kv_heads for shape in self.shapes]
        by_head = torch.cat(tuple(pieces)).unflatten(0, (self.kv_heads, sum(rows)))
        parts = list(by_head.split(rows, dim=1))
        if self.gated:
            heads = rows[0] // (2 * rows[1])
            parts[0] = parts[0].unflatten(1, (2, heads, -1)).transpose(1, 2).flatten(1, 3)
        return [(n, part.flatten(0, 1)) for n, part in zip(self.names, parts, strict=True)]

    def below(self, prefix: str) -> "QueryKeyValue":
        q, k, v = (prefix + name for name in self.names)
        return replace(self, names=(q, k, v))


Entry = Plain | Stacked | QueryKeyValue


def entry(arch: Architecture, name: str, padded_vocab_size: int) -> Entry:
    """The entry of a Megatron weight.

    ``name`` as in ``GPTModel.named_parameters``, with the layer's number in the whole model and,
    of an expert's weight, the expert's: ``decoder.layers.5.mlp.experts.linear_fc1.weight17``.
    """
    vocabulary, hidden = (arch.vocab_size, arch.hidden_size), (arch.hidden_size,)
    extra = padded_vocab_size - arch.vocab_size
    embedding = Plain("model.embed_tokens.weight", vocabulary, 0, extra)
    head = Plain("lm_head.weight", vocabulary, 0, extra)
    whole_model = {
        "embedding.word_embeddings.weight": embedding,
        "output_layer.weight": embedding if arch.tied_embeddings else head,
        "decoder.final_layernorm.weight": Plain("model.norm.weight", hidden),
    }
    if name in whole_model:
        return whole_model[name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+?)(\d*)", name)
    assert match, f"{name}: not a weight of a GPTModel"
    layer, rest, expert = match.groups()
    table = {**_norms(arch), **_attention(arch), **_feed_forward(arch, expert)}
    return table[rest].below(f"model.layers.{layer}.")


def tensors_read(arch: Architecture) -> Callable[[str], bool]:
    """What says whether a Hugging Face tensor is one that a model of ``arch`` has, by its name."""
    e, a = arch.experts, arch.attention
    table = {**_norms(arch), **_attention(arch), **_feed_forward(arch, "0")}
    names = {name for found in table.values() for name in _names(found)}
    of_experts = {n for n in names if re.search(r"experts?\.|[._]gate\.|correction_bias", n)}
    of_dense = {n for n in names if n.startswith("mlp.") and n not in of_experts}
    of_attention = {n for n in names if n.startswith("self_attn.")}
    of_delta_net = {n for n in names if n.startswith("linear_attn.")}
    linear = arch.delta_net.layers if arch.delta_net else ()
    absent = {
        r"_proj\.bias$": isinstance(a, LatentAttention) or not a.qkv_bias,
        r"\.[qk]_norm\.": isinstance(a, LatentAttention) or not a.qk_norm,
        r"\.shared_experts?\.": e is None or not e.shared_hidden_size,
        r"correction_bias$": e is None or not e.bias,
    }
    names -= {n for n in names if any(x and re.search(form, n) for form, x in absent.items())}
    top = {"model.embed_tokens.weight", "model.norm.weight"}
    top |= set() if arch.tied_embeddings else {"lm_head.weight"}

    def read(name: str) -> bool:
        match = re.fullmatch(r"model\.layers\.(0|[1-9]\d*)\.(.+)", name)
        if match is None or int(match[1]) >= arch.num_layers:
            return name in top
        expert = re.search(r"\.experts\.(0|[1-9]\d*)\.", match[2])
        if expert and not (e and int(expert[1]) < e.number):
            return False
        sparse = e is not None and int(match[1]) in e.layers
        rest = re.sub(r"\.experts\.\d+\.", ".experts.0.", match[2])
        mixed = rest in names - (of_attention if int(match[1]) in linear else of_delta_net)
        return mixed and rest not in (of_dense if sparse else of_experts)

    return read


def _names(found: Entry) -> tuple[str, ...]:
    if isinstance(found, QueryKeyValue):
        return found.names
    if isinstance(found, Plain):
        return (found.name,)
    return tuple(dict.fromkeys(part.name for part in found.parts))


def _norms(arch: Architecture) -> dict[str, Entry]:
    before = Plain("input_layernorm.weight", (arch.hidden_size,))
    after = Plain("post_attention_layernorm.weight", (arch.hidden_size,))
    return {
        "input_layernorm.weight": before,
        "self_attention.linear_qkv.layer_norm_weight": before,
        "self_attention.in_proj.layer_norm_weight": before,
        "pre_mlp_layernorm.weight": after,
        "mlp.linear_fc1.layer_norm_weight": after,
    }


def _attention(arch: Architecture) -> dict[str, Entry]:
    if isinstance(arch.attention, LatentAttention):
        table = _latent_attention(arch.hidden_size, arch.attention)
    else:
        table = _grouped_query_attention(arch.hidden_size, arch.attention)
    found = {name: e.below("self_attn.") for name, e in table.items()}
    if arch.delta_net:
        own = _delta_net(arch.hidden_size, arch.delta_net, joined=arch.model_type == "qwen3_next")
        found |= {name: e.below("linear_attn.") for name, e in own.items()}
    return {f"self_attention.{name}": e for name, e in found.items()}


def _grouped_query_attention(hidden: int, a: GroupedQueryAttention) -> dict[str, Entry]:
    queries = 2 * a.num_heads if a.output_gate else a.num_heads
    heads = (queries, a.num_kv_heads, a.num_kv_heads)

    def qkv(kind: str, *width: int) -> QueryKeyValue:
        names = (f"q_proj.{kind}", f"k_proj.{kind}", f"v_proj.{kind}")
        shapes = tuple((n * a.head_dim, *width) for n in heads)
        return QueryKeyValue(names, shapes, a.num_kv_heads, gated=a.output_gate)

    q, k = (n * a.head_dim if a.joint_norm else a.head_dim for n in (a.num_heads, a.num_kv_heads))
    return {
        "linear_qkv.weight": qkv("weight", hidden),
        "linear_qkv.bias": qkv("bias"),
        "q_layernorm.weight": Plain("q_norm.weight", (q,)),
        "k_layernorm.weight": Plain("k_norm.weight", (k,)),
        "linear_proj.weight": Plain("o_proj.weight", (hidden, a.num_heads * a.head_dim), 1),
    }


def _delta_net(hidden: int, d: GatedDeltaNet, *, joined: bool) -> dict[str, Entry]:
    """``joined``: query, key, value and gate are one tensor, key head by key head (Qwen3-Next)."""
    heads, keys = d.num_value_heads, d.num_key_heads * d.key_head_dim
    values = heads * d.value_head_dim

    def rows(
        name: str, *counts: int, runs: int = 1, width: tuple[int, ...] = (hidden,)
    ) -> list[Rows]:
        shape, counts = (sum(counts), *width), tuple(count // runs for count in counts)
        firsts = itertools.accumulate(counts, initial=0)
        return [Rows(name, shape, n, first, runs) for n, first in zip(counts, firsts, strict=False)]

    if joined:
        inputs = rows("in_proj_qkvz.weight", keys, keys, values, values, runs=d.num_key_heads)
        inputs += rows("in_proj_ba.weight", heads, heads, runs=d.num_key_heads)
    else:
        inputs = rows("in_proj_qkv.weight", keys, keys, values)
        inputs += rows("in_proj_z.weight", values)
        inputs += rows("in_proj_b.weight", heads) + rows("in_proj_a.weight", heads)
    mixed = rows("conv1d.weight", keys, keys, values, width=(1, d.conv_size))
    return {
        "in_proj.weight": Stacked(tuple(inputs)),
        "conv1d.weight": Stacked(tuple(mixed)),
        "A_log": Plain("A_log", (heads,), 0),
        "dt_bias": Plain("dt_bias", (heads,), 0),
        "out_norm.weight": Plain("norm.weight", (d.value_head_dim,)),
        "out_proj.weight": Plain("out_proj.weight", (hidden, values), 1),
    }


def _latent_attention(hidden: int, a: LatentAttention) -> dict[str, Entry]:
    query = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    key_value = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    table: dict[str, Entry] = {
        "linear_kv_down_proj.weight": Plain(
            "kv_a_proj_with_mqa.weight", (a.kv_lora_rank + a.qk_rope_head_dim, hidden), 0
        ),
        "linear_kv_up_proj.layer_norm_weight": Plain("kv_a_layernorm.weight", (a.kv_lora_rank,)),
        "linear_kv_up_proj.weight": Plain("kv_b_proj.weight", (key_value, a.kv_lora_rank), 0),
        "linear_proj.weight": Plain("o_proj.weight", (hidden, a.num_heads * a.v_head_dim), 1),
    }
    if a.q_lora_rank is None:
        return table | {"linear_q_proj.weight": Plain("q_proj.weight", (query, hidden), 0)}
    return table | {
        "linear_q_down_proj.weight": Plain("q_a_proj.weight", (a.q_lora_rank, hidden), 0),
        "linear_q_up_proj.layer_norm_weight": Plain("q_a_layernorm.weight", (a.q_lora_rank,)),
        "linear_q_up_proj.weight": Plain("q_b_proj.weight", (query, a.q_lora_rank), 0),
    }


def _feed_forward(arch: Architecture, expert: str) -> dict[str, Entry]:
    usual, hidden = ("gate_proj", "up_proj", "down_proj"), arch.hidden_size

    def mlp(
        megatron: str, ours: str, width: int, parts: tuple[str, str, str] = usual
    ) -> dict[str, Entry]:
        gate, up = (Rows(f"{ours}.{name}.weight", (width, hidden), width) for name in parts[:2])
        down = Plain(f"{ours}.{parts[2]}.weight", (hidden, width), 1)
        return {
            f"{megatron}.linear_fc1.weight": Stacked((gate, up)),
            f"{megatron}.linear_fc2.weight": down,
        }

    table = mlp("mlp", "mlp", arch.ffn_hidden_size)
    if arch.experts is None:
        return table
    e = arch.experts
    block, parts, bias = "mlp", usual, "gate.e_score_correction_bias"
    if arch.model_type == "minimax_m2":  # as Mixtral calls them
        block, parts, bias = "block_sparse_moe", ("w1", "w3", "w2"), "e_score_correction_bias"
    shared = f"{block}.shared_expert{'' if e.shared_gate else 's'}"
    if e.shared_gate:
        table["mlp.shared_experts.gate_weight"] = Plain(f"{shared}_gate.weight", (1, hidden))
    return {
        **table,
        **mlp("mlp.experts", f"{block}.experts.{expert}", e.hidden_size, parts),
        **mlp("mlp.shared_experts", shared, e.shared_hidden_size),
        "mlp.router.weight": Plain(f"{block}.gate.weight", (e.number, hidden)),
        "mlp.router.expert_bias": Plain(f"{block}.{bias}", (e.number,)),
    }
