"""The torch layers on one process; `test_matrix.py` has them in every layout."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.policy.layers import TorchAttention, _PackedLayout, rms_norm
from sapo_megatron.policy.machine import check_parallel
from sapo_megatron.policy.spec import transformer_config
from sapo_megatron.recipe.schema import ModelConfig, ParallelConfig
from tests.support.minibatches import MODELS


class _Alone:
    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.fixture
def attention():
    config = SimpleNamespace(kv_channels=8)
    return TorchAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(cp=_Alone())
    )


def _naive(q, k, v):
    """One sequence, ``q [T, N, D]``, ``k``, ``v [T, G, D]``, written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("snd,tnd->nst", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("nst,tnd->snd", weights, v).flatten(1)


def _qkv(rows, heads=4, groups=2):
    torch.manual_seed(0)
    return (
        torch.randn(rows, n, 8, dtype=torch.float64, requires_grad=True)
        for n in (heads, groups, groups)
    )


def test_packed_attention_is_that_of_each_sequence(attention):
    q, k, v = _qkv(12)
    bounds = [0, 5, 6, 12]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    got = attention(q, k, v, None, packed_seq_params=params)
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    expected = torch.cat([_naive(q[s], k[s], v[s]) for s in parts])
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    got, expected = (
        torch.autograd.grad(x, (q, k, v), upstream, retain_graph=True) for x in (got, expected)
    )
    torch.testing.assert_close(got, expected)


def test_padded_attention_is_causal(attention):
    q, k, v = _qkv(6)
    got = attention(*(x[:, None] for x in (q, k, v)), None, AttnMaskType.causal)
    torch.testing.assert_close(got[:, 0], _naive(q, k, v))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_parallel_ranks_see_what_they_should(cp_size):
    """Each query of each rank sees exactly its own sequence up to itself."""
    bounds = torch.tensor([0, 2 * cp_size, 6 * cp_size])
    rows, chunks = [], []
    for rank in range(cp_size):
        mine = []
        for start, end in itertools.pairwise(bounds):
            size = (end - start) // (2 * cp_size)
            for which in (rank, 2 * cp_size - 1 - rank):
                mine += range(start + which * size, start + (which + 1) * size)
        rows += mine
        chunks.append(mine)
    for rank in range(cp_size):
        layout = _PackedLayout(bounds, rank, cp_size, torch.device("cpu"))
        for s in range(2):
            for i in range(int(layout.valid[s].sum())):
                position = chunks[rank][int(layout.query_rows[s, i])]
                visible = layout.key_rows[s][layout.mask[s, 0, i]]
                seen = [rows[r] for r in visible.tolist()]
                assert seen == list(range(int(bounds[s]), position + 1))


def test_rms_norm_computes_wide():
    x = torch.tensor([[300.0, 400.0]], dtype=torch.bfloat16)
    weight = torch.ones(2, dtype=torch.bfloat16)
    got = rms_norm(x, weight, 0.0)
    assert got.dtype == torch.bfloat16
    expected = torch.tensor([[0.6, 0.8]]) * math.sqrt(2)
    torch.testing.assert_close(got, expected.bfloat16())
    assert rms_norm(x.double(), weight.double(), 0.0).dtype == torch.float64


def test_expert_tensor_parallelism_needs_a_gpu():
    with pytest.raises(UserError, match=r"expert_tensor_parallel_size: expected 1 .* got 2"):
        check_parallel(ParallelConfig(expert_tensor_parallel_size=2))


def test_what_megatron_refuses_is_one_line():
    refused = ParallelConfig(recompute_granularity="selective", recompute_modules=("mla_up_proj",))
    build = functools.partial(
        transformer_config, parse_architecture(MODELS["moe"]), ModelConfig(path="")
    )
    with pytest.raises(UserError, match="megatron-core refuses") as caught:
        build(refused)
    assert "\n" not in str(caught.value)
    assert build(ParallelConfig()).num_moe_experts == 8
