"""Which tensors a weight is made of: every rank's piece, and all of them together again."""

import pytest
import torch

from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.hf.names import Plain, QueryKeyValue, Rows, Stacked, entry
from tests.support.families import FAMILIES


class Stored:
    """Tensors by name that count how many rows of theirs are read."""

    def __init__(self, *entries):
        parts = [part for e in entries for part in (e.parts if isinstance(e, Stacked) else (e,))]
        shapes = {}
        for part in parts:
            many = isinstance(part, QueryKeyValue)
            shapes |= (
                zip(part.names, part.shapes, strict=True) if many else [(part.name, part.shape)]
            )
        generator = torch.Generator().manual_seed(1)
        self.tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        self.rows = 0

    def read(self, name, shape, *index):
        assert self.tensors[name].shape == tuple(shape)
        part = self.tensors[name][index or (...,)]
        self.rows += len(part)
        return part


def pieces(e, stored, size):
    return [e.load(stored.read, rank, size) for rank in range(size)]


def holds(merged, stored):
    assert sorted(name for name, _ in merged) == sorted(stored.tensors)
    return all(torch.equal(tensor, stored.tensors[name]) for name, tensor in merged)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("split", [0, 1])
def test_one_tensor(split, size):
    e = Plain("w", (8, 4), split)
    stored = Stored(e)
    found = pieces(e, stored, size)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, stored.tensors["w"].chunk(size, split), strict=True)
    )
    assert holds(e.merge(found), stored)


def test_a_tensor_that_is_not_cut():
    e = Plain("w", (3, 4))
    stored = Stored(e)
    found = pieces(e, stored, 4)
    assert all(torch.equal(piece, stored.tensors["w"]) for piece in found)
    assert holds(e.merge(found), stored)


@pytest.mark.parametrize(
    ("rows", "padding", "size"),
    [(101, 0, 1), (101, 3, 1), (101, 3, 2), (101, 3, 4), (101, 11, 16), (5, 11, 4)],
)
def test_padded_rows_are_zeros_and_do_not_come_back(rows, padding, size):
    e = Plain("w", (rows, 4), 0, padding)
    stored = Stored(e)
    found = pieces(e, stored, size)
    whole = torch.cat(found)
    assert {len(piece) for piece in found} == {(rows + padding) // size}
    assert torch.equal(whole[:rows], stored.tensors["w"])
    assert not whole[rows:].any()
    assert stored.rows == rows
    assert holds(e.merge(found), stored)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up(size):
    e = Stacked((Rows("gate", (8, 4), 8), Rows("up", (8, 4), 8)))
    stored = Stored(e)
    found = pieces(e, stored, size)
    for piece, gate, up in zip(
        found, *(stored.tensors[n].chunk(size) for n in ("gate", "up")), strict=True
    ):
        assert torch.equal(piece, torch.cat((gate, up)))
    assert holds(e.merge(found), stored)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_one_tensor_in_runs_and_of_another_in_one(size):
    """``a`` has 4 heads of 1 + 2 rows, ``b`` 4 rows and then 8: each rank gets its quarter."""
    e = Stacked(
        (
            Rows("a", (12, 3), 1, 0, runs=4),
            Rows("a", (12, 3), 2, 1, runs=4),
            Rows("b", (12, 3), 4),
            Rows("b", (12, 3), 8, 4),
        )
    )
    stored = Stored(e)
    found = pieces(e, stored, size)
    heads, b = stored.tensors["a"].unflatten(0, (4, 3)), stored.tensors["b"]
    wholes = (heads[:, 0], heads[:, 1:].flatten(0, 1), b[:4], b[4:])
    expected = [torch.cat(parts) for parts in zip(*(w.chunk(size) for w in wholes), strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert holds(e.merge(found), stored)


def interleaved(stored, query_heads, kv_heads, width):
    """Head by head, as Megatron has them; every head ``width`` rows."""
    q, k, v = (stored.tensors[name].split(width) for name in "qkv")
    per_head = query_heads // kv_heads
    rows = []
    for head in range(kv_heads):
        rows += [*q[head * per_head : (head + 1) * per_head], k[head], v[head]]
    return torch.cat(rows)


@pytest.mark.parametrize("shape", [(6,), ()], ids=["weight", "bias"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "size"),
    [
        (8, 4, 1),
        (8, 4, 2),
        (8, 4, 4),
        (4, 4, 2),
        (8, 2, 4),  # half of what belongs to a key head
        (4, 1, 2),
        (6, 2, 8),  # five quarters of a head, across the borders of heads
        (16, 2, 8),
    ],
)
def test_query_key_value(query_heads, kv_heads, size, shape):
    width = 4
    heads = (query_heads, kv_heads, kv_heads)
    e = QueryKeyValue(("q", "k", "v"), tuple((n * width, *shape) for n in heads), kv_heads)
    stored = Stored(e)
    found = pieces(e, stored, size)
    expected = interleaved(stored, query_heads, kv_heads, width).chunk(size)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert holds(e.merge(found), stored)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_queries_whose_gates_stand_behind_each_are_behind_all_of_a_key_head(size):
    heads, kv_heads, width = 8, 2, 4
    shapes = ((2 * heads * width, 6), (kv_heads * width, 6), (kv_heads * width, 6))
    e = QueryKeyValue(("q", "k", "v"), shapes, kv_heads, gated=True)
    stored = Stored(e)
    found = pieces(e, stored, size)
    q, k, v = (stored.tensors[name].split(width) for name in "qkv")
    rows = []
    for head in range(kv_heads):
        mine = range(head * 4, head * 4 + 4)
        rows += [q[2 * i] for i in mine] + [q[2 * i + 1] for i in mine] + [k[head], v[head]]
    expected = torch.cat(rows).chunk(size)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert holds(e.merge(found), stored)


def test_a_rank_reads_what_belongs_to_its_key_heads_only():
    e = QueryKeyValue(("q", "k", "v"), ((32, 6), (16, 6), (16, 6)), 4)
    stored = Stored(e)
    e.load(stored.read, 1, 4)
    assert stored.rows == 64 // 4


@pytest.mark.parametrize(
    ("family", "weight", "tensors"),
    [
        ("qwen3", "output_layer.weight", ["model.embed_tokens.weight"]),  # tied
        ("qwen3-moe", "output_layer.weight", ["lm_head.weight"]),
        (
            "qwen3-moe",
            "decoder.layers.2.self_attention.linear_qkv.weight",
            [f"model.layers.2.self_attn.{n}_proj.weight" for n in "qkv"],
        ),
        (
            "qwen3-moe",
            "decoder.layers.3.mlp.experts.linear_fc1.weight17",
            [f"model.layers.3.mlp.experts.17.{n}_proj.weight" for n in ("gate", "up")],
        ),
        (
            "deepseek-v3",
            "decoder.layers.11.mlp.shared_experts.linear_fc2.weight",
            ["model.layers.11.mlp.shared_experts.down_proj.weight"],
        ),
        (
            "minimax-m2",
            "decoder.layers.3.mlp.experts.linear_fc1.weight7",
            [f"model.layers.3.block_sparse_moe.experts.7.{n}.weight" for n in ("w1", "w3")],
        ),
        (
            "minimax-m2",
            "decoder.layers.0.mlp.router.expert_bias",
            ["model.layers.0.block_sparse_moe.e_score_correction_bias"],
        ),
        (
            "qwen3.5-moe",
            "decoder.layers.0.self_attention.in_proj.weight",
            [f"model.layers.0.linear_attn.in_proj_{n}.weight" for n in ("qkv", "z", "b", "a")],
        ),
        (
            "qwen3-next",
            "decoder.layers.0.self_attention.in_proj.weight",
            [f"model.layers.0.linear_attn.in_proj_{n}.weight" for n in ("qkvz", "ba")],
        ),
        (
            "qwen3-next",
            "decoder.layers.3.mlp.shared_experts.gate_weight",
            ["model.layers.3.mlp.shared_expert_gate.weight"],
        ),
        (
            "moonlight",
            "decoder.layers.1.self_attention.linear_q_proj.weight",
            ["model.layers.1.self_attn.q_proj.weight"],
        ),
    ],
)
def test_the_tensors_of_a_weight(family, weight, tensors):
    assert list(Stored(entry(parse_architecture(FAMILIES[family]), weight, 104)).tensors) == tensors


def test_the_embedding_is_padded_to_the_models_rows():
    e = entry(parse_architecture(FAMILIES["qwen3"]), "embedding.word_embeddings.weight", 104)
    assert (e.shape, e.split, e.padded_rows) == ((101, 32), 0, 3)
