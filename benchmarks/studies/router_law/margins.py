"""Swaps foretold from the margins of the routers, and what one swap does.

The margin m of a token and layer is the least selection score of its k experts above the best of
the others; g is its derivative along a change of weights, with all experts held. To first order a
swap needs 0 < m < -e g, so that its probability is e E[rho(0) g^-], with rho the density of m.
Where routers choose groups first, the margin between the last group that is chosen and the next
makes swaps as well.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from benchmarks.studies.router_law.measure import Read, Weights, interval, read
from sapo_megatron.data.batch import pack
from sapo_megatron.policy.model import Model
from sapo_megatron.sample import Sample

SMALL = 0.05
"""Share of the margins that are taken for those near 0."""
AT_ONCE = 32
"""Sequences of a pass."""
DELTA = 0.03
"""The move by which g is told."""


@contextmanager
def scored(model: Model) -> Iterator[list[list[Tensor]]]:
    """By layer, in the order of micro-batches: selection scores ``[N, E]``, while the block lasts.

    One process.
    """
    routers = [m for chunk in model.chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
    routers.sort(key=lambda router: router.layer_number)
    found: list[list[Tensor]] = [[] for _ in routers]

    def hook(router: TopKRouter, args: tuple, kept: list[Tensor]) -> None:
        scores = router.gating(args[0]).flatten(0, -2)
        if router.score_function == "sigmoid":
            scores = scores.sigmoid()
        kept.append(scores if router.expert_bias is None else scores + router.expert_bias)

    handles = [
        router.register_forward_pre_hook(lambda r, args, kept=kept: hook(r, args, kept))
        for router, kept in zip(routers, found, strict=True)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Boundary:
    """Who stands at the edge of the sets of one layer: the last inside and the first outside."""

    inside: Tensor
    outside: Tensor
    """int [N]."""
    groups: tuple[Tensor, Tensor] | None
    """The same of groups."""

    def margins(self, scores: Tensor, per_group: int, groups: int) -> list[Tensor]:
        """Of experts, and of groups where there are some: fp64 [N] each."""
        found = [_difference(scores, self.inside, self.outside)]
        if self.groups:
            found.append(_difference(_of_groups(scores, per_group, groups), *self.groups))
        return found


def _difference(scores: Tensor, one: Tensor, other: Tensor) -> Tensor:
    a, b = (scores.double().gather(1, index[:, None]) for index in (one, other))
    return (a - b)[:, 0]


def _of_groups(scores: Tensor, per_group: int, groups: int) -> Tensor:
    return scores.view(len(scores), groups, -1).topk(per_group, dim=-1).values.sum(-1)


def boundary(scores: Tensor, experts: Tensor, per_group: int, groups: int, chosen: int) -> Boundary:
    """Of scores ``[N, E]`` and the sets ``[N, k]`` that were chosen."""
    experts = experts.long()
    eligible, edges = scores, None
    if groups > 1:
        totals = _of_groups(scores, per_group, groups)
        order = totals.argsort(1, descending=True)
        edges = (order[:, chosen - 1], order[:, chosen])
        allowed = torch.zeros_like(totals, dtype=torch.bool).scatter(1, order[:, :chosen], True)
        size = scores.shape[1] // groups
        eligible = scores.masked_fill(~allowed.repeat_interleave(size, 1), -torch.inf)
    inside = experts.gather(1, scores.gather(1, experts).argmin(1, keepdim=True))[:, 0]
    outside = eligible.scatter(1, experts, -torch.inf).argmax(1)
    return Boundary(inside, outside, edges)


@dataclass(frozen=True)
class Margins:
    """All of a model's on some sequences, and their derivatives along a change."""

    margin: np.ndarray
    slope: np.ndarray
    """[layers, tokens] of experts, or [2 layers, tokens]: of experts, then of groups."""
    inside: np.ndarray
    outside: np.ndarray
    """[layers, tokens]."""
    sequence: np.ndarray
    """[tokens]."""
    layers: int

    def foretold(self, e: float) -> dict[str, Any]:
        """Share of token-layers that swap: to first order with its interval, by layer, and whole.

        ``whole`` counts margins with m < -e g instead of taking their density at 0.
        """
        near = self.near()
        down = np.maximum(-self.slope, 0.0)
        rate = np.where(self.margin < near[:, None], down, 0.0) / near[:, None]
        rows = len(rate) // self.layers
        by_layer = rate.mean(1).reshape(rows, self.layers).sum(0)
        by_token = rate.sum(0) / self.layers
        sums = np.zeros((self.sequence.max() + 1, 2))
        np.add.at(sums, self.sequence, np.stack([by_token, np.ones_like(by_token)], axis=1))
        count = len(sums)
        times = np.random.default_rng(1).multinomial(count, np.full(count, 1 / count), size=500)
        spread = times @ sums
        crossed = (self.margin < -e * self.slope).mean(1).reshape(rows, self.layers)
        return {
            "rate": [e * float(by_token.mean()), *interval(e * spread[:, 0] / spread[:, 1])],
            "rate_by_layer": (e * by_layer).tolist(),
            "whole": float(crossed.sum(0).mean()),
        }

    def near(self) -> np.ndarray:
        """Below what a row's margins are small."""
        return np.quantile(self.margin, SMALL, axis=1)

    def likely(self, count: int, seed: int = 3) -> list[tuple[int, int]]:
        """(layer, token) of swaps of experts as a small move makes them, drawn from the small."""
        margin, slope = self.margin[: self.layers], self.slope[: self.layers]
        near = self.near()[: self.layers, None]
        weight = np.where(margin < near, np.maximum(-slope, 0.0), 0.0) / near
        drawn = np.random.default_rng(seed).choice(
            weight.size, size=count, p=(weight / weight.sum()).ravel()
        )
        return [(int(i) // weight.shape[1], int(i) % weight.shape[1]) for i in drawn]


def margins(
    model: Model, weights: Weights, samples: Sequence[Sample], direction: Sequence[Tensor]
) -> tuple[Margins, Read]:
    """Of tokens laid end to end, and the pass at the start. One process."""
    batches = [pack(samples[i : i + AT_ONCE]) for i in range(0, len(samples), AT_ONCE)]
    config = model.config
    groups, chosen = config.moe_router_num_groups or 1, config.moe_router_group_topk or 1
    per_group = model.routers.topk // chosen
    with scored(model) as before:
        old = read(model, batches)
    with weights.moved(direction, DELTA), scored(model) as after:
        read(model, batches, held=old)
    edges, start, slope = [], [], []
    for layer, (was, now) in enumerate(zip(before, after, strict=True)):
        at, to = torch.cat(was), torch.cat(now)
        sets = torch.cat([experts[:, layer] for experts in old.experts if experts is not None])
        edge = boundary(at, sets, per_group, groups, chosen)
        m, n = (edge.margins(scores, per_group, groups) for scores in (at, to))
        edges.append(edge)
        start.append(m)
        slope.append([(y - x) / DELTA for x, y in zip(m, n, strict=True)])
    kinds = range(len(start[0]))
    uids = torch.cat([torch.tensor(b.sample_uids)[b.sequence_ids] for b in batches])
    return (
        Margins(
            margin=torch.stack([row[kind] for kind in kinds for row in start]).numpy(),
            slope=torch.stack([row[kind] for kind in kinds for row in slope]).numpy(),
            inside=torch.stack([edge.inside for edge in edges]).numpy(),
            outside=torch.stack([edge.outside for edge in edges]).numpy(),
            sequence=uids.numpy(),
            layers=len(before),
        ),
        old,
    )


@torch.no_grad()
def jumps(
    model: Model,
    samples: Sequence[Sample],
    old: Read,
    found: Margins,
    chosen: Sequence[tuple[int, int]],
    *,
    free: bool,
) -> np.ndarray:
    """What each of these swaps, made alone, does: the sum over tokens of squares of log-probs.

    ``samples``, all of one length, are those of which ``old`` and ``found`` tell. The routers of
    all other tokens and layers are ``free`` to follow, or held; they are ``routers.Told``.
    """
    experts = torch.cat([x for x in old.experts if x is not None])
    experts = experts.view(len(samples), -1, *experts.shape[1:])
    logprobs = torch.cat([x for x in old.logprobs if x is not None]).view(len(samples), -1)
    length = experts.shape[1]
    squares: list[Tensor] = []
    for first in range(0, len(chosen), AT_ONCE):
        part = chosen[first : first + AT_ONCE]
        which = [token // length for _, token in part]
        told = torch.full_like(experts[which], -1) if free else experts[which].clone()
        for i, (layer, token) in enumerate(part):
            swapped = experts[which[i], token % length, layer].clone()
            inside, outside = found.inside[layer, token], found.outside[layer, token]
            swapped[swapped == int(inside)] = int(outside)
            told[i, token % length, layer] = swapped
        batch = pack([samples[i] for i in which])
        (forward,) = model.forward([batch], replay=[told.flatten(0, 1)])
        assert forward.logprob is not None, "one process"
        difference = forward.logprob.view(len(part), length).double() - logprobs[which].double()
        squares.append((difference**2).sum(1))
    return torch.cat(squares).numpy()
