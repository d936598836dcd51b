"""How a change of weights moves log-probs at held experts (a), and what free ones add (b).

    z = log p(moved, free) - log p(old) = a + b      a = log p(moved, old experts) - log p(old)

All passes are the policy's own, collective over its ranks; what they leave is summed by sequence,
since tokens of a sequence are not independent, and intervals come of drawing sequences anew.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.data.batch import micro_batches
from sapo_megatron.objective.correction import EXTREME
from sapo_megatron.policy.model import Forward, Model
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.routing.divergence import flips
from sapo_megatron.routing.variance import LEAST_SWAPS
from sapo_megatron.sample import PackedBatch, Sample

DRAWS = 500
COLUMNS = (
    "tokens",
    "token_layers",
    "swaps",  # token-layers whose set is another, everything free
    "first_swaps",  # token-layers that would choose another set while all experts are held
    "slots",  # experts that are others
    "flipped",  # tokens with a swap in any layer
    "a",
    "b",
    "aa",
    "bb",
    "ab",
    "k3_z",
    "k3_a",
    "extreme_z",
    "extreme_a",
)
C = {name: i for i, name in enumerate(COLUMNS)}


@dataclass(frozen=True)
class Read:
    """One pass over micro-batches, as this rank has it."""

    logprobs: list[Tensor | None]
    experts: list[Tensor | None]
    """[N, M, k] that the routers chose, or while held would have chosen."""


def read(model: Model, batches: Sequence[PackedBatch], held: "Read | None" = None) -> Read:
    """Log-probs and routes with the present weights; ``held``: at the experts of that pass."""
    replay = None
    if held is not None and model.routers.layers:
        replay = [experts for experts in held.experts if experts is not None]
    return of_forwards(model.forward(batches, replay=replay, record=True))


def of_forwards(forwards: Sequence[Forward]) -> Read:
    return Read(
        [forward.logprob for forward in forwards],
        [None if f.routes is None else f.routes.experts for f in forwards],
    )


def summed(
    model: Model, batches: Sequence[PackedBatch], old: Read, held: Read, free: Read
) -> np.ndarray:
    """``[sequences, COLUMNS]`` in the order of uids. Collective over all ranks.

    Every rank has other tokens and layers of the routers, and leaders the log-probs.
    """
    groups = model.groups
    mine: dict[int, np.ndarray] = {}
    for i, batch in enumerate(batches):
        rows = torch.zeros(
            len(batch.tokens), len(COLUMNS), dtype=torch.float64, device=groups.device
        )
        _count_swaps(model, batch, rows, old.experts[i], held.experts[i], free.experts[i])
        # A model-parallel block: its ranks have the layers and the tokens of one micro-batch.
        dist.all_reduce(rows, group=groups.megatron.mp)
        if groups.is_leader:
            rows[:, C["flipped"]] = (rows[:, C["swaps"]] > 0).double()
            _add_logprobs(rows, old.logprobs[i], held.logprobs[i], free.logprobs[i])
            rows[~batch.mask] = 0
            by_sequence = rows.new_zeros(len(batch.lengths), len(COLUMNS))
            by_sequence.index_add_(0, batch.sequence_ids, rows)
            for uid, row in zip(batch.sample_uids, by_sequence.cpu().numpy(), strict=True):
                if uid >= 0:
                    mine[uid] = row
    found: list[Any] = [None] * dist.get_world_size()
    # Over the world: each leader brings its sequences, or its piece of them.
    dist.all_gather_object(found, mine, group=groups.world)
    uids = sorted({uid for part in found for uid in part})
    return np.array([sum(part[uid] for part in found if uid in part) for uid in uids])


def _count_swaps(
    model: Model,
    batch: PackedBatch,
    rows: Tensor,
    old: Tensor | None,
    held: Tensor | None,
    free: Tensor | None,
) -> None:
    """Into the rows of the tokens that this rank's routers see."""
    if old is None or held is None or free is None:
        return
    seen = model.view.rows(batch)
    slots = flips(old, free)
    rows[seen, C["token_layers"]] = float(old.shape[1])
    rows[seen, C["swaps"]] = (slots > 0).sum(1).double()
    rows[seen, C["first_swaps"]] = (flips(old, held) > 0).sum(1).double()
    rows[seen, C["slots"]] = slots.sum(1).double()


def _add_logprobs(rows: Tensor, *of: Tensor | None) -> None:
    """Of the old, the held and the free pass."""
    old, held, free = (x for x in of if x is not None)
    a, z = held.double() - old.double(), free.double() - old.double()
    b = z - a
    values = {"tokens": torch.ones_like(a), "a": a, "b": b, "aa": a * a, "bb": b * b, "ab": a * b}
    for name, d in (("z", z), ("a", a)):
        values[f"k3_{name}"] = d.expm1() - d
        values[f"extreme_{name}"] = (d.abs() > math.log(EXTREME)).double()
    for name, value in values.items():
        rows[:, C[name]] = value


def by_layer(batches: Sequence[PackedBatch], old: Read, new: Read) -> list[float]:
    """The share of tokens whose set differs. One process."""
    changed = [
        (flips(was, now) > 0)[batch.mask]
        for was, now, batch in zip(old.experts, new.experts, batches, strict=True)
        if was is not None and now is not None
    ]
    return torch.cat(changed).double().mean(0).tolist() if changed else []


def numbers(sums: np.ndarray) -> dict[str, np.ndarray]:
    """What follows from sums ``[..., COLUMNS]`` over sequences. ``c`` is Var b / sqrt(Var a)."""
    at = {name: sums[..., i] for name, i in C.items()}
    n = at["tokens"]
    layers = np.maximum(at["token_layers"], 1)
    mean_a, mean_b = at["a"] / n, at["b"] / n
    var_a, var_b = at["aa"] / n - mean_a**2, at["bb"] / n - mean_b**2
    cov = at["ab"] / n - mean_a * mean_b
    var_z = var_a + var_b + 2 * cov
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "var_a": var_a,
            "var_b": var_b,
            "cov": cov,
            "var_z": var_z,
            "share": (var_b + cov) / var_z,
            "share_without_cov": var_b / (var_a + var_b),
            "replay_removes": 1 - var_a / var_z,
            "c": var_b / np.sqrt(var_a),
            "router_flip": at["swaps"] / layers,
            "first_flip": at["first_swaps"] / layers,
            "slot_flip": at["slots"] / layers,
            "tokens_flipped": at["flipped"] / n,
            "kl": -(mean_a + mean_b),
            "kl_held": -mean_a,
            "k3": at["k3_z"] / n,
            "k3_held": at["k3_a"] / n,
            "extreme": at["extreme_z"] / n,
            "extreme_held": at["extreme_a"] / n,
        }


def drawn(sums: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums over as many sequences as there are, drawn with replacement: ``[DRAWS, COLUMNS]``."""
    count = len(sums)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return times @ sums


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 percent."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def point(sums: np.ndarray) -> dict[str, Any]:
    """Every number with its interval; ``swaps``, ``tokens`` as counted."""
    values, spread = numbers(sums.sum(0)), numbers(drawn(sums))
    found: dict[str, Any] = {
        name: [float(value), *interval(spread[name])] for name, value in values.items()
    }
    found["swaps"] = int(sums[:, C["swaps"]].sum())
    found["tokens"] = int(sums[:, C["tokens"]].sum())
    found["sequences"] = len(sums)
    return found


class Weights:
    """The weights of a policy, and moves away from them."""

    def __init__(self, model: Model, *, in_bf16: bool = False) -> None:
        """``in_bf16``: weights, and where they are moved, are such as bf16 holds."""
        named = [item for chunk in model.chunks for item in chunk.named_parameters()]
        self.names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._in_bf16 = in_bf16 or named[0][1].dtype == torch.bfloat16
        held = [p.detach().to("cpu", torch.float32, copy=True) for p in self._parameters]
        self.start = [self._as_held(w) for w in held]
        self.restore()

    def _as_held(self, weight: Tensor) -> Tensor:
        return weight.bfloat16().float() if self._in_bf16 else weight

    def changed(self, direction: Sequence[Tensor], e: float) -> float:
        """The share of the weights that are others after a move."""
        moved = [self._as_held(w + e * d) != w for w, d in zip(self.start, direction, strict=True)]
        return sum(int(m.sum()) for m in moved) / sum(m.numel() for m in moved)

    def direction(self) -> list[Tensor]:
        """From the start to where the weights are now."""
        return [
            p.detach().to("cpu", torch.float32) - w
            for p, w in zip(self._parameters, self.start, strict=True)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for p, w in zip(self._parameters, self.start, strict=True):
            p.copy_(w)

    @contextmanager
    def moved(self, direction: Sequence[Tensor], e: float) -> Iterator[None]:
        """At start + e direction, rounded to the dtype of the weights, while the block lasts."""
        with torch.no_grad():
            for p, w, d in zip(self._parameters, self.start, direction, strict=True):
                p.copy_(self._as_held(w + e * d))
        try:
            yield
        finally:
            self.restore()


class Text:
    """Blocks of sequences, and how the model reads them with the weights of its start."""

    def __init__(
        self, policy: Policy, recipe: Recipe, draw: Callable[[int], Sequence[Sample]]
    ) -> None:
        """``draw``: the sequences of a block, from its number."""
        self.policy = policy
        self._cut = policy.groups.micro_batching(recipe)
        self._draw = draw
        self._blocks: list[tuple[list[PackedBatch], Read]] = []

    def blocks(self) -> Iterator[tuple[list[PackedBatch], Read]]:
        """One after the other, without end; the weights are at their start where one is drawn."""
        for number in itertools.count():
            if number == len(self._blocks):
                device = self.policy.groups.device
                found = micro_batches(self._draw(number), self._cut)
                batches = [batch.to(device) for batch in found]
                self._blocks.append((batches, read(self.policy.model, batches)))
            yield self._blocks[number]


def measured(
    weights: Weights,
    text: Text,
    direction: Sequence[Tensor],
    e: float,
    blocks: tuple[int, int],
    least_swaps: int = LEAST_SWAPS,
) -> np.ndarray:
    """Sums by sequence at a move of ``e``, of as many blocks as it takes to see enough swaps.

    ``blocks``: how many at least, and at most. Collective over all ranks.
    """
    model, found = text.policy.model, []
    least, most = blocks
    for number, (batches, old) in enumerate(text.blocks(), 1):
        with weights.moved(direction, e):
            held, free = read(model, batches, held=old), read(model, batches)
        found.append(summed(model, batches, old, held, free))
        swaps = sum(sums[:, C["swaps"]].sum() for sums in found)
        if number >= most or (number >= least and swaps >= least_swaps):
            break
    return np.concatenate(found)
