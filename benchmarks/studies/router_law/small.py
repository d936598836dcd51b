"""What few swaps do to a share: one measurement, seen through windows of the size of a mini-batch.

    python -m benchmarks.studies.router_law.small

A small update of the model with 3 layers is measured on many tokens, and then as if there had been
only as many as hold two swaps on average, in pieces of 4 tokens, as short responses are: in one
window, and in the median of 3 means over 8 windows, which is what runs with few measurements were
judged by. Writes ``results/small.json``.
"""

import functools
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.router_law import RESULTS, changes
from benchmarks.studies.router_law.law import held_out_block
from benchmarks.studies.router_law.measure import Text, Weights, read
from benchmarks.studies.router_law.models import MODELS, folder_of, opened, recipe_of
from sapo_megatron.files import write_whole
from sapo_megatron.routing.divergence import flips

MODEL = "depth 3"
SIZES = {0.01: 12, 0.03: 6, 0.1: 3}
"""Sizes of the update, and blocks of 8192 tokens that it takes for 400 swaps."""
SWAPS, PIECE, ROUNDS, RUNS = 2, 4, 8, 3
WORLDS = 1000


def main() -> None:
    logging.basicConfig(format="%(message)s")
    path = RESULTS / "small.json"
    if path.exists():
        return
    variant, folder = MODELS[MODEL], folder_of(MODEL)
    recipe = recipe_of(folder)
    with opened(folder, router=variant.router, recipe=recipe, optimizer=changes.ADAM) as policy:
        weights = Weights(policy.model)
        text = Text(policy, recipe, functools.partial(held_out_block, variant.length))
        batches = changes.update_batches(variant.length)
        direction = changes.update(policy, weights, recipe, batches)
        found = {
            f"{e:g}": windows(tokens(weights, text, direction, e, blocks))
            for e, blocks in SIZES.items()
        }
    write_whole(path, json.dumps({"model": MODEL, "sizes": found}, indent=1) + "\n")


def tokens(
    weights: Weights, text: Text, direction: Sequence[Tensor], e: float, blocks: int
) -> np.ndarray:
    """a, b and swaps of each token, ``[3, tokens]``. One process."""
    rows: list[Tensor] = []
    for batches, old in itertools.islice(text.blocks(), blocks):
        with weights.moved(direction, e):
            held = read(text.policy.model, batches, held=old)
            free = read(text.policy.model, batches)
        for was, at, now, sets, new in zip(
            old.logprobs, held.logprobs, free.logprobs, old.experts, free.experts, strict=True
        ):
            a, b = at.double() - was.double(), now.double() - at.double()
            rows.append(torch.stack([a, b, (flips(sets, new) > 0).sum(1).double()]))
    return torch.cat(rows, dim=1).numpy()


def windows(found: np.ndarray) -> dict[str, Any]:
    """The share of all tokens, of one window, and the median of means over windows."""
    rate = found[2].mean()
    pieces = found[:, : found.shape[1] // PIECE * PIECE].reshape(3, -1, PIECE)
    count = max(1, round(SWAPS / rate / PIECE))
    rng = np.random.default_rng(4)
    one, runs = [], []
    for _ in range(WORLDS):
        chosen = rng.integers(pieces.shape[1], size=(RUNS, ROUNDS, count))
        a, b, _ = pieces[:, chosen].reshape(3, RUNS, ROUNDS, -1)
        var_z, part = (a + b).var(-1), (a + b).var(-1) - a.var(-1) - cov(a, b)
        one += list((part / var_z).ravel())
        runs.append(np.median(part.mean(1) / var_z.mean(1)))
    a, b, swaps = found
    return {
        "swaps": int(swaps.sum()),
        "tokens": found.shape[1],
        "var_a": float(a.var()),
        "share": float(1 - (a.var() + cov(a, b)) / (a + b).var()),
        "window": count * PIECE,
        "one": quantiles(one),
        "median_of_runs": quantiles(runs),
    }


def cov(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).mean(-1) - a.mean(-1) * b.mean(-1)


def quantiles(values: Sequence[float]) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])]


if __name__ == "__main__":
    main()
