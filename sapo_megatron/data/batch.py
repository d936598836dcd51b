"""Groups -> micro-batches (packed or padded), context-parallel slices, global denominators.

Every rank holds all samples of a step and computes the same plan, so a mini-batch does not depend
on the layout: only which rank works on a sequence does.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo_megatron.sample import Denominators, Group, PackedBatch, Sample

PAD_TOKEN = 0
"""What fills padded positions; no loss, metric or valid position ever sees it."""


def split_mini_batches(groups: Sequence[Group], count: int) -> list[list[Sample]]:
    """The samples in order, cut into ``count`` mini-batches whose sizes differ by at most one."""
    samples = [sample for group in groups for sample in group.samples]
    bounds = [len(samples) * i // count for i in range(count + 1)]
    return [samples[a:b] for a, b in itertools.pairwise(bounds)]


def denominators(samples: Sequence[Sample]) -> Denominators:
    """Sizes of a mini-batch: what its loss is averaged over."""
    lengths = [len(s.response_tokens) for s in samples]
    return Denominators(sequences=sum(n > 0 for n in lengths), tokens=sum(lengths))


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How this rank's part of a mini-batch is cut into micro-batches."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    tp_size: int
    max_tokens: int
    """Tokens of one micro-batch over all context-parallel ranks, padding included except for the
    few tokens that sequence parallelism asks for."""
    count_multiple: int = 1
    """What the number of micro-batches must divide by."""
    packing: bool = True
    """Lay sequences end to end; False: pad them to one length."""


def micro_batches(samples: Sequence[Sample], cut: MicroBatching) -> list[PackedBatch]:
    """This rank's micro-batches of a mini-batch.

    Their number is the same on every rank and a multiple of ``cut.count_multiple``; a rank with
    nothing to do gets a filler without valid tokens.
    """
    batches = []
    for bin_ in _plan(samples, cut)[cut.dp_rank]:
        batch = pack([samples[i] for i in bin_], cut.cp_size, cut.tp_size, packing=cut.packing)
        batches.append(cp_slice(batch, cut.cp_rank, cut.cp_size))
    return batches


def data_parallel_ranks(samples: Sequence[Sample], cut: MicroBatching) -> list[int]:
    """Which data-parallel rank trains on each sample of a mini-batch."""
    place = {
        i: rank for rank, bins in enumerate(_plan(samples, cut)) for bin_ in bins for i in bin_
    }
    return [place[i] for i in range(len(samples))]


def _plan(samples: Sequence[Sample], cut: MicroBatching) -> list[list[list[int]]]:
    lengths = [_padded(_length(s), cut.cp_size) for s in samples]
    return plan_micro_batches(
        lengths, cut.dp_size, cut.max_tokens, cut.count_multiple, packing=cut.packing
    )


def plan_micro_batches(
    lengths: Sequence[int],
    dp_size: int,
    max_tokens: int,
    count_multiple: int = 1,
    *,
    packing: bool = True,
) -> list[list[list[int]]]:
    """``plan[dp_rank][micro_batch]`` -> indices of sequences, loads balanced.

    Longest first into the emptiest bin; the smallest number of micro-batches that fits. Without
    ``packing`` each sequence takes as much room as the longest of its bin.
    """
    assert max(lengths, default=0) <= max_tokens, "the config bounds every sequence"
    count = max(1, -(-sum(lengths) // (dp_size * max_tokens)))
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        count = -(-count // count_multiple) * count_multiple
        loads = [0] * (count * dp_size)
        bins: list[list[int]] = [[] for _ in loads]
        for i in longest_first:
            emptiest = loads.index(min(loads))
            longest = i if packing or not bins[emptiest] else bins[emptiest][0]
            loads[emptiest] += lengths[longest]
            bins[emptiest].append(i)
        if max(loads) <= max_tokens:
            return [[sorted(b) for b in bins[rank::dp_size]] for rank in range(dp_size)]
        count += 1


def pack(
    samples: Sequence[Sample], cp_size: int = 1, tp_size: int = 1, *, packing: bool = True
) -> PackedBatch:
    """Lay sequences end to end, as the whole context-parallel group sees them.

    Each sequence is padded to a multiple of ``2 cp_size`` where ``cp_size > 1`` (the zigzag split),
    the last one further so that each rank's tokens divide by ``tp_size`` (sequence parallelism).
    Without ``packing`` all are padded to one length, which divides by ``tp_size``.
    """
    if not samples:
        samples = [_filler(2)]
    # The last token of a sequence predicts nothing and is not fed.
    fed = [list(s.prompt_tokens) + s.response_tokens for s in samples]
    sizes = [_padded(_length(s), cp_size) for s in samples]
    if not packing:
        assert cp_size == 1, "the config refuses context parallelism on padded sequences"
        sizes = [-(-max(sizes) // tp_size) * tp_size] * len(sizes)
    while sum(sizes) // cp_size % tp_size:
        sizes[-1] = _padded(sizes[-1] + 1, cp_size)
    total = sum(sizes)
    tokens = torch.full((total,), PAD_TOKEN)
    targets = torch.full((total,), PAD_TOKEN)
    mask = torch.zeros(total, dtype=torch.bool)
    rollout_logprob = torch.zeros(total)
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    for sample, ids, start in zip(samples, fed, starts, strict=False):
        end = start + len(ids) - 1
        tokens[start:end] = torch.tensor(ids[:-1])
        targets[start:end] = torch.tensor(ids[1:])
        response = slice(end - len(sample.response_tokens), end)
        mask[response] = True
        rollout_logprob[response] = torch.tensor(sample.rollout_logprobs)
    per_sequence = torch.tensor(sizes)
    experts, probs, probs_row = _lay_out_routes(samples, starts)
    return PackedBatch(
        tokens=tokens,
        targets=targets,
        mask=mask,
        position_ids=torch.cat([torch.arange(n) for n in sizes]),
        sequence_ids=torch.repeat_interleave(torch.arange(len(sizes)), per_sequence),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(sizes),
        lengths=torch.tensor([len(s.response_tokens) for s in samples]),
        advantages=torch.repeat_interleave(
            torch.tensor([s.advantage for s in samples]), per_sequence
        ),
        rollout_logprob=rollout_logprob,
        sample_uids=tuple(s.uid for s in samples),
        padded=not packing,
        rollout_experts=experts,
        rollout_probs=probs,
        rollout_probs_row=probs_row,
    )


def _lay_out_routes(
    samples: Sequence[Sample], starts: Sequence[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The rollout engine's routes in the order of the tokens, as far as there are some.

    ``rollout_experts``, ``rollout_probs`` and ``rollout_probs_row`` of a PackedBatch; ``starts``
    bounds the samples' sequences, as its ``cu_seqlens`` does.
    """
    first = next((s.routes for s in samples if s.routes), None)
    if first is None:
        return None, None, None
    experts = torch.full((starts[-1], *first.experts.shape[1:]), -1, dtype=torch.int16)
    rows = torch.full((starts[-1],), -1)
    probs: list[Tensor] = []
    kept = 0
    for sample, start in zip(samples, starts, strict=False):
        if sample.routes is None:
            continue
        fed = len(sample.routes.experts)
        assert fed == _length(sample), f"sample {sample.uid}: routes of {fed} tokens"
        experts[start : start + fed] = torch.from_numpy(sample.routes.experts)
        if sample.routes.probs is not None:
            positions = sample.routes.positions
            assert positions is not None, "probabilities come with their positions"
            rows[start + torch.from_numpy(positions)] = torch.arange(kept, kept + len(positions))
            probs.append(torch.from_numpy(sample.routes.probs))
            kept += len(positions)
    return (experts, torch.cat(probs), rows) if probs else (experts, None, None)


def cp_slice(batch: PackedBatch, cp_rank: int, cp_size: int) -> PackedBatch:
    """One rank's tokens: chunks r and 2c - 1 - r of the 2c chunks of every sequence."""
    if cp_size == 1:
        return batch
    rows = zigzag_rows(batch.cu_seqlens, cp_rank, cp_size)
    by_token = [
        "tokens",
        "targets",
        "mask",
        "position_ids",
        "sequence_ids",
        "advantages",
        "rollout_logprob",
    ]
    by_token += ["rollout_experts"] if batch.rollout_experts is not None else []
    by_token += ["rollout_probs_row"] if batch.rollout_probs_row is not None else []
    return dataclasses.replace(batch, **{name: getattr(batch, name)[rows] for name in by_token})


def router_rows(batch: PackedBatch, tp_rank: int, tp_size: int) -> Tensor:
    """Which tokens the routers of a tensor-parallel rank see, in their order: int [T / tp_size].

    Sequence parallelism gives each rank an equal part of the tokens, position by position where
    sequences lie side by side.
    """
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    if batch.padded:
        rows = rows.view(len(batch.lengths), -1).T.flatten()
    return rows.chunk(tp_size)[tp_rank]


def zigzag_rows(cu_seqlens: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """Rows of the whole packed batch that a context-parallel rank holds, in its order."""
    rows = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        chunk = (end - start) // (2 * cp_size)
        for which in (cp_rank, 2 * cp_size - 1 - cp_rank):
            rows.append(torch.arange(start + which * chunk, start + (which + 1) * chunk))
    return torch.cat(rows)


def _length(sample: Sample) -> int:
    """Tokens that are fed: all but the last."""
    return len(sample.prompt_tokens) + len(sample.response_tokens) - 1


def _padded(length: int, cp_size: int) -> int:
    multiple = 2 * cp_size if cp_size > 1 else 1
    return -(-length // multiple) * multiple


def _filler(length: int) -> Sample:
    return Sample(
        uid=-1,
        prompt_tokens=(PAD_TOKEN,) * length,
        response_tokens=[],
        rollout_logprobs=[],
        truncated=False,
    )
