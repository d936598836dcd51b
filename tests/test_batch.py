"""Micro-batches: what lies where, and that nothing depends on how the work is cut."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.batch import (
    cp_slice,
    denominators,
    micro_batches,
    pack,
    plan_micro_batches,
    split_mini_batches,
    zigzag_rows,
)
from sapo_megatron.sample import Group, Prompt, Sample


def _sample(uid, prompt, response, advantage=0.0):
    return Sample(
        uid=uid,
        prompt_tokens=tuple(prompt),
        response_tokens=list(response),
        rollout_logprobs=[-0.5 * (i + 1) for i in range(len(response))],
        truncated=False,
        advantage=advantage,
    )


TWO = [_sample(3, (5, 9), (8, 1), 0.5), _sample(4, (4,), (7, 1, 6), -1.0)]


def test_packed_by_hand():
    batch = pack(TWO)
    assert batch.tokens.tolist() == [5, 9, 8, 4, 7, 1]
    assert batch.targets.tolist() == [9, 8, 1, 7, 1, 6]
    assert batch.mask.tolist() == [False, True, True, True, True, True]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 6]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.advantages.tolist() == [0.5] * 3 + [-1.0] * 3
    assert batch.rollout_logprob.tolist() == [0, -0.5, -1.0, -0.5, -1.0, -1.5]
    assert batch.sample_uids == (3, 4)
    assert not batch.padded


def test_padded_sequences_have_one_length():
    batch = pack([*TWO, _sample(5, (2,), (3,))], tp_size=2, packing=False)
    assert batch.padded
    assert batch.tokens.view(3, -1).tolist() == [[5, 9, 8, 0], [4, 7, 1, 0], [2, 0, 0, 0]]
    assert batch.mask.view(3, -1).sum(1).tolist() == [2, 3, 1]
    assert batch.position_ids.view(3, -1).tolist() == [[0, 1, 2, 3]] * 3
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12]


def test_sizes_divide_by_context_and_tensor_parallel_sizes():
    batch = pack(TWO, cp_size=2, tp_size=4)
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    batch = pack([*TWO, _sample(5, (2,), (3,))], cp_size=2, tp_size=4)
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 16]
    assert batch.mask.sum() == 6


def test_context_parallel_slices_are_two_chunks_each():
    """Eight tokens on two ranks: chunks 0 and 3 here, 1 and 2 there."""
    sample = _sample(0, range(10, 18), (1,))
    whole = pack([sample], cp_size=2)
    first, second = (cp_slice(whole, rank, 2) for rank in range(2))
    assert first.tokens.tolist() == [10, 11, 16, 17]
    assert second.tokens.tolist() == [12, 13, 14, 15]
    assert first.position_ids.tolist() == [0, 1, 6, 7]
    assert first.mask.tolist() == [False, False, False, True]
    assert first.lengths.tolist() == second.lengths.tolist() == [1]


@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    cp_size=st.sampled_from([2, 4]),
)
@settings(max_examples=50, deadline=None)
def test_context_parallel_ranks_share_out_every_row_once(chunks, cp_size):
    sizes = torch.tensor([0, *(2 * cp_size * n for n in chunks)])
    bounds = sizes.cumsum(0)
    rows = torch.cat([zigzag_rows(bounds, rank, cp_size) for rank in range(cp_size)])
    assert rows.sort().values.tolist() == list(range(int(bounds[-1])))


@given(
    lengths=st.lists(st.integers(1, 20), max_size=24),
    dp_size=st.integers(1, 5),
    room=st.integers(20, 64),
    multiple=st.integers(1, 3),
    packing=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_plan_holds_every_sequence_once_and_fits(lengths, dp_size, room, multiple, packing):
    plan = plan_micro_batches(lengths, dp_size, room, multiple, packing=packing)
    bins = [bin_ for rank in plan for bin_ in rank]
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) % multiple == 0
    for bin_ in bins:
        sizes = [lengths[i] for i in bin_]
        assert (sum(sizes) if packing else len(sizes) * max(sizes, default=0)) <= room


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dp_size", [1, 3])
def test_every_token_is_somewhere_once(packing, dp_size):
    samples = [_sample(i, range(1, 2 + i % 3), range(3, 4 + i), 0.25 * i) for i in range(7)]
    layout = {"cp_rank": 0, "cp_size": 1, "tp_size": 1, "max_tokens": 12, "packing": packing}
    found = []
    for rank in range(dp_size):
        for batch in micro_batches(samples, dp_rank=rank, dp_size=dp_size, **layout):
            uids = torch.tensor(batch.sample_uids)[batch.sequence_ids]
            rows = torch.stack((uids, batch.position_ids, batch.tokens, batch.targets), dim=1)
            found += rows[batch.mask].tolist()
    assert len(found) == denominators(samples).tokens
    expected = []
    for s in samples:
        ids = [*s.prompt_tokens, *s.response_tokens]
        first = len(s.prompt_tokens) - 1
        expected += [[s.uid, t, ids[t], ids[t + 1]] for t in range(first, len(ids) - 1)]
    assert sorted(found) == sorted(expected)


def test_a_rank_without_work_gets_a_filler():
    layout = {"cp_rank": 0, "cp_size": 1, "tp_size": 2, "max_tokens": 12}
    (batch,) = micro_batches(TWO[:1], dp_rank=1, dp_size=2, **layout)
    assert batch.sample_uids == (-1,)
    assert not batch.mask.any()
    assert len(batch.tokens) % 2 == 0


def test_denominators_leave_out_empty_responses():
    sizes = denominators([*TWO, _sample(9, (1, 2), ())])
    assert dataclasses.astuple(sizes) == (2, 5)


def test_mini_batches_differ_by_at_most_one():
    prompt = Prompt(uid=0, text="", answer="", tokens=(1,))
    group = Group(prompt=prompt, samples=[_sample(i, (1,), (2,)) for i in range(7)])
    parts = split_mini_batches([group], 3)
    assert [[s.uid for s in part] for part in parts] == [[0, 1], [2, 3], [4, 5, 6]]
