"""Samples of the ranks that generated them -> samples on every rank; routes where they are needed.

Tokens, log-probs and rewards go to every rank, rank by rank. Routes are a thousand times as large:
only their sizes are told, and they are sent, once the mini-batches are known, to the ranks that
train on them. All of it travels as tensors; a rank holds at no time more than what it keeps and one
rank's tokens.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapo_megatron.errors import RunFailed, UserError, one_line
from sapo_megatron.sample import Sample, SampleRoutes


@dataclass(frozen=True, kw_only=True)
class HeldRoutes:
    """Where a sample's routes are, and how large; letters as in :class:`SampleRoutes`."""

    rank: int
    experts: tuple[int, int, int]
    """N, M, k."""
    probs: tuple[int, int, int] | None
    """P, M, E."""


@dataclass(frozen=True)
class _Header:
    """What a rank says before it sends."""

    error: UserError | RunFailed | None
    samples: int
    tokens: int
    responses: int
    """Tokens of all responses."""
    texts: int
    """Bytes of all texts."""
    held: dict[int, HeldRoutes]
    """The places of routes, by uid of the sample."""


def exchange_samples(
    mine: Sequence[Sample] | UserError | RunFailed, world: dist.ProcessGroup
) -> tuple[list[Sample], dict[int, HeldRoutes]]:
    """The samples of all ranks, by uid, and where the routes of those that have some are.

    Samples of other ranks come without ``routes``. Raises, on every rank, the first
    error that a rank brings in the place of samples. Collective over ``world``, every rank, which
    carries tensors of the host.
    """
    rank = dist.get_rank(world)
    own: Sequence[Sample] = [] if isinstance(mine, Exception) else mine
    header = _Header(
        error=mine if isinstance(mine, Exception) else None,
        samples=len(own),
        tokens=sum(len(s.prompt_tokens) + len(s.response_tokens) for s in own),
        responses=sum(len(s.response_tokens) for s in own),
        texts=sum(len(_bytes(s.text)) for s in own),
        held={s.uid: _held(s.routes, rank) for s in own if s.routes is not None},
    )
    headers: list[Any] = [None] * dist.get_world_size(world)
    # Over the world: all ranks come here, with samples, without, or with an error.
    dist.all_gather_object(headers, header, group=world)
    for found in headers:
        if found.error is not None:
            raise found.error
    samples = list(own)
    for source, found in enumerate(headers):
        if found.samples == 0:
            continue
        columns = _columns(own) if source == rank else _empty_columns(found)
        for column in columns:
            # Over the world: all know from the headers who sends how much, and in which order.
            dist.broadcast(column, dist.get_global_rank(world, source), group=world)
        if source != rank:
            samples += _samples(*columns)
    held = {uid: where for found in headers for uid, where in found.held.items()}
    return sorted(samples, key=lambda s: s.uid), held


def deliver_routes(
    samples: Sequence[Sample],
    readers: Sequence[Collection[int]],
    held: Mapping[int, HeldRoutes],
    world: dist.ProcessGroup,
) -> None:
    """Bring each sample's routes to the ranks of ``world`` that read them; others let them go.

    Collective over ``world``: all ranks come with the same samples, readers and places.
    """
    rank = dist.get_rank(world)
    for sample, ranks in zip(samples, readers, strict=True):
        where = held.get(sample.uid)
        if where is None:
            continue
        for reader in sorted(set(ranks) - {where.rank}):
            # Between two ranks, which come to the samples and readers in the same order.
            if rank == where.rank:
                assert sample.routes is not None, f"sample {sample.uid}: its routes are gone"
                for part in _parts(sample.routes):
                    dist.send(part, dist.get_global_rank(world, reader), group=world)
            elif rank == reader:
                sample.routes = _empty_routes(where)
                # From the rank that made them, in the order of its sends.
                for part in _parts(sample.routes):
                    dist.recv(part, dist.get_global_rank(world, where.rank), group=world)
        if rank not in ranks:
            sample.routes = None


COLUMNS = ("rows", "rewards", "tokens", "logprobs", "versions", "texts")
"""What a file calls them."""
ROUTES = ("experts", "probs", "positions")


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Samples and their routes as tensors of a file; advantages are not kept."""
    tensors = dict(zip(COLUMNS, _columns(samples), strict=True))
    for s in samples:
        for name, array in vars(s.routes).items() if s.routes else ():
            if array is not None:
                tensors[f"{name}.{s.uid}"] = torch.from_numpy(array)
    save_file(tensors, path)


def read_samples(path: Path) -> list[Sample]:
    """What :func:`write_samples` wrote. Raises UserError where the file is damaged."""
    try:
        tensors = load_file(path)
        samples = _samples(*(tensors[name] for name in COLUMNS))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected responses that were generated ahead, got a damaged file "
            f"({one_line(error)}); resume from another checkpoint"
        ) from None
    for s in samples:
        arrays = {name: tensors.get(f"{name}.{s.uid}") for name in ROUTES}
        found = {name: array.numpy() for name, array in arrays.items() if array is not None}
        s.routes = SampleRoutes(**found) if found else None
    return samples


def _held(routes: SampleRoutes, rank: int) -> HeldRoutes:
    tokens, layers, topk = routes.experts.shape
    probs = None
    if routes.probs is not None:
        kept, _, experts = routes.probs.shape
        probs = kept, layers, experts
    return HeldRoutes(rank=rank, experts=(tokens, layers, topk), probs=probs)


def _empty_routes(where: HeldRoutes) -> SampleRoutes:
    experts = torch.empty(where.experts, dtype=torch.int16).numpy()
    if where.probs is None:
        return SampleRoutes(experts=experts)
    return SampleRoutes(
        experts=experts,
        probs=torch.empty(where.probs, dtype=torch.float32).numpy(),
        positions=torch.empty(where.probs[0], dtype=torch.int64).numpy(),
    )


def _parts(routes: SampleRoutes) -> Iterator[Tensor]:
    """The arrays of routes as tensors on the same memory."""
    for array in (routes.experts, routes.probs, routes.positions):
        if array is not None and array.size:
            yield torch.from_numpy(array)


def _bytes(text: str) -> bytes:
    """UTF-8, also of the half characters that a decoder may leave."""
    return text.encode(errors="surrogatepass")


def _columns(samples: Sequence[Sample]) -> list[Tensor]:
    """Samples as tensors: [n, 5] whole numbers, rewards [n]; tokens, log-probs, versions, bytes of
    texts."""
    assert all(len(s.versions) == len(s.response_tokens) for s in samples)
    texts = [_bytes(s.text) for s in samples]
    rows = [
        (s.uid, len(s.prompt_tokens), len(s.response_tokens), s.truncated, len(text))
        for s, text in zip(samples, texts, strict=True)
    ]
    tokens = [t for s in samples for t in (*s.prompt_tokens, *s.response_tokens)]
    return [
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor([s.reward for s in samples], dtype=torch.float64),
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor([x for s in samples for x in s.rollout_logprobs], dtype=torch.float64),
        torch.tensor([x for s in samples for x in s.versions], dtype=torch.int32),
        torch.tensor(list(b"".join(texts)), dtype=torch.uint8),
    ]


def _empty_columns(header: _Header) -> list[Tensor]:
    return [
        torch.empty(header.samples, 5, dtype=torch.int64),
        torch.empty(header.samples, dtype=torch.float64),
        torch.empty(header.tokens, dtype=torch.int32),
        torch.empty(header.responses, dtype=torch.float64),
        torch.empty(header.responses, dtype=torch.int32),
        torch.empty(header.texts, dtype=torch.uint8),
    ]


def _samples(
    rows: Tensor,
    rewards: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    versions: Tensor,
    texts: Tensor,
) -> list[Sample]:
    """The inverse of :func:`_columns`."""
    numbers = rows.tolist()
    words = iter(tokens.tolist())
    values = iter(logprobs.tolist())
    made = iter(versions.tolist())
    letters = iter(texts.tolist())
    return [
        Sample(
            uid=uid,
            prompt_tokens=tuple(itertools.islice(words, prompt)),
            response_tokens=list(itertools.islice(words, response)),
            rollout_logprobs=list(itertools.islice(values, response)),
            versions=list(itertools.islice(made, response)),
            truncated=bool(truncated),
            text=bytes(itertools.islice(letters, length)).decode(errors="surrogatepass"),
            reward=reward,
        )
        for (uid, prompt, response, truncated, length), reward in zip(
            numbers, rewards.tolist(), strict=True
        )
    ]
