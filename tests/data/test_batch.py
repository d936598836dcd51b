"""Micro-batches: what lies where, and that nothing depends on how the work is cut."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.data.batch import (
    MicroBatching,
    cp_slice,
    denominators,
    micro_batches,
    pack,
    plan_micro_batches,
    router_rows,
    split_mini_batches,
    zigzag_rows,
)
from sapo_megatron.sample import Group, Prompt, Sample, SampleRoutes


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
        for batch in micro_batches(samples, MicroBatching(dp_rank=rank, dp_size=dp_size, **layout)):
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
    (batch,) = micro_batches(TWO[:1], MicroBatching(dp_rank=1, dp_size=2, **layout))
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


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_routers_share_out_the_tokens(packing, tp_size):
    batch = pack([*TWO, _sample(5, (2,), (3,))], tp_size=tp_size, packing=packing)
    shares = [router_rows(batch, rank, tp_size) for rank in range(tp_size)]
    assert {len(share) for share in shares} == {len(batch.tokens) // tp_size}
    rows = torch.cat(shares)
    assert rows.sort().values.tolist() == list(range(len(batch.tokens)))
    if packing:
        assert rows.tolist() == list(range(len(batch.tokens)))
    else:
        assert batch.position_ids[rows].tolist() == sorted(batch.position_ids.tolist())


def test_routers_see_padded_sequences_position_by_position():
    batch = pack(TWO, tp_size=2, packing=False)
    assert batch.tokens.view(2, -1).tolist() == [[5, 9, 8, 0], [4, 7, 1, 0]]
    first, second = (batch.tokens[router_rows(batch, rank, 2)].tolist() for rank in range(2))
    assert first == [5, 4, 9, 7]
    assert second == [8, 1, 0, 0]


def _routed(sample, every=2):
    """With routes that say whose they are: uid, position, layer; probabilities at some positions.

    Two layers with experts, two of three experts a token.
    """
    position = np.arange(len(sample.prompt_tokens) + len(sample.response_tokens) - 1)
    layer, experts = np.arange(2), np.zeros(2)
    of_token = 100 * sample.uid + 10 * position[:, None, None] + layer[:, None] + experts
    routes = SampleRoutes(experts=of_token.astype(np.int16))
    if every:
        kept = position[::every]
        probs = sample.uid + 0.125 * kept[:, None, None] + np.zeros((2, 3))
        routes = dataclasses.replace(routes, probs=probs.astype(np.float32), positions=kept)
    return dataclasses.replace(sample, routes=routes)


ROUTED = [_routed(s) for s in TWO]


def test_routes_lie_with_their_tokens():
    """Each sequence of three tokens is padded by one; probabilities at positions 0 and 2."""
    batch = pack(ROUTED, cp_size=2)
    assert batch.rollout_experts.dtype == torch.int16
    assert batch.rollout_experts.shape == (8, 2, 2)
    assert batch.rollout_experts[:, 0, 0].tolist() == [300, 310, 320, -1, 400, 410, 420, -1]
    assert batch.rollout_experts[:, 1, 1].tolist() == [301, 311, 321, -1, 401, 411, 421, -1]
    assert batch.rollout_probs.shape == (4, 2, 3)
    assert batch.rollout_probs[:, 1, 2].tolist() == [3.0, 3.25, 4.0, 4.25]
    assert batch.rollout_probs_row.tolist() == [0, -1, 1, -1, 2, -1, 3, -1]


def test_context_parallel_slices_keep_their_routes():
    whole = pack(ROUTED, cp_size=2)
    first, second = (cp_slice(whole, rank, 2) for rank in range(2))
    assert first.rollout_experts[:, 0, 0].tolist() == [300, -1, 400, -1]
    assert second.rollout_experts[:, 0, 0].tolist() == [310, 320, 410, 420]
    assert first.rollout_probs_row.tolist() == [0, -1, 2, -1]
    assert second.rollout_probs_row.tolist() == [-1, 1, -1, 3]
    for part in (first, second):
        kept = part.rollout_probs_row >= 0
        probs = part.rollout_probs[part.rollout_probs_row[kept]]
        uids = torch.tensor(part.sample_uids)[part.sequence_ids]
        assert probs[:, 0, 0].tolist() == (uids + 0.125 * part.position_ids)[kept].tolist()


def test_padded_sequences_keep_their_routes():
    batch = pack([*ROUTED, _routed(_sample(5, (2,), (3,)))], tp_size=2, packing=False)
    grid = batch.rollout_experts[:, 0, 0].view(3, -1)
    assert grid.tolist() == [[300, 310, 320, -1], [400, 410, 420, -1], [500, -1, -1, -1]]
    assert batch.rollout_probs_row.view(3, -1).tolist() == [
        [0, -1, 1, -1],
        [2, -1, 3, -1],
        [4, -1, -1, -1],
    ]


def test_samples_without_routes():
    none = pack(TWO)
    assert none.rollout_experts is none.rollout_probs is none.rollout_probs_row is None
    some = pack([TWO[0], ROUTED[1]])
    assert some.rollout_experts[:, 0, 0].tolist() == [-1, -1, -1, 400, 410, 420]
    assert some.rollout_probs_row.tolist() == [-1, -1, -1, 0, -1, 1]
    bare = pack([_routed(s, every=0) for s in TWO], cp_size=2)
    assert bare.rollout_probs is bare.rollout_probs_row is None
    assert cp_slice(bare, 0, 2).rollout_experts[:, 0, 0].tolist() == [300, -1, 400, -1]


def test_a_filler_has_no_routes():
    layout = {"cp_rank": 0, "cp_size": 2, "tp_size": 1, "max_tokens": 12}
    (batch,) = micro_batches(ROUTED[:1], MicroBatching(dp_rank=1, dp_size=2, **layout))
    assert batch.sample_uids == (-1,)
    assert batch.rollout_experts is None
