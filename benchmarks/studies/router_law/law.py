"""The law: Var a goes with the square of a change, Var b with the change itself.

    python -m benchmarks.studies.router_law.law [MODEL ...]

Measures every model of ``models.py``, along updates and roundings of several sizes, on sequences
that no update has seen, and writes ``results/law-*.json``. What is there is not measured again.
"""

import argparse
import functools
import itertools
import json
import logging
import platform
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.router_law import RESULTS, changes
from benchmarks.studies.router_law.margins import jumps, margins
from benchmarks.studies.router_law.measure import (
    DRAWS,
    Text,
    Weights,
    by_layer,
    drawn,
    interval,
    measured,
    numbers,
    point,
    read,
    summed,
)
from benchmarks.studies.router_law.models import MODELS, folder_of, opened, recipe_of
from benchmarks.studies.router_law.routers import Rounded
from benchmarks.studies.router_law.text import sequences, stdlib
from sapo_megatron.files import write_whole
from sapo_megatron.policy.model import Model
from sapo_megatron.routing.variance import LEAST_SWAPS
from sapo_megatron.sample import Sample

logger = logging.getLogger(__name__)

BLOCK = 8192
"""Tokens that are measured at once."""
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "base": {
        "update": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        "noise": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        "bf16 weights": (1.0,),
        "fp8 weights": (0.03, 0.3, 1.0),
    },
    "bf16 router": {"update": (0.003, 0.01, 0.03, 0.1, 0.3)},
    "": {"update": (0.03, 0.1, 0.3, 1.0), "noise": (0.3, 1.0, 3.0)},
}
BLOCKS = {"base": (3, 16), "": (1, 6)}
"""Fewest and most blocks of a point."""
WITHOUT_MARGINS = ("bf16 router", "bf16 weights")
"""Where scores, or weights, do not change with e as a derivative tells."""
FORCED = 400
"""Swaps that are made alone."""
MARGIN_SEED = 500_000
MARGIN_BLOCKS = {"base": 2, "": 1}
RARE = 0.01
"""Share of sets that change below which swaps are rare."""


def of_model(name: str) -> dict[str, Any]:
    """All that is told of one model."""
    variant, folder = MODELS[name], folder_of(name)
    recipe = recipe_of(folder)
    with opened(folder, router=variant.router, recipe=recipe, optimizer=changes.ADAM) as policy:
        weights = Weights(policy.model, in_bf16=variant.bf16_weights)
        text = Text(policy, recipe, functools.partial(held_out_block, variant.length))
        experts = bool(policy.model.routers.layers)
        found: dict[str, Any] = {
            "model": name,
            "layers": len(policy.model.routers.layers),
            "loss": loss(text),
            "python": platform.python_version(),
            "kinds": {},
        }
        for kind, sizes in GRID.get(name, GRID[""]).items():
            if kind == "update":
                batches = changes.update_batches(variant.length)
                direction = changes.update(policy, weights, recipe, batches)
            else:
                direction = changes.ROUNDINGS[kind](weights)
            few, many = BLOCKS.get(name, BLOCKS[""])
            least = LEAST_SWAPS if experts else 0
            points = {e: measured(weights, text, direction, e, (few, many), least) for e in sizes}
            found["kinds"][kind] = curve(points)
            found["kinds"][kind]["changed"] = {
                f"{e:g}": weights.changed(direction, e) for e in sizes
            }
            if experts and len(sizes) > 1 and name not in WITHOUT_MARGINS:
                samples = margin_samples(name)
                said = foretold(policy.model, weights, samples, direction, sizes)
                found["kinds"][kind]["foretold"] = said
                middle = sizes[len(sizes) // 2]
                found["kinds"][kind]["first_flip_by_layer"] = {
                    f"{middle:g}": layers(weights, text, direction, middle)
                }
            logger.info("%s: %s", name, kind)
        if variant.router == "rounded":
            found["ties"] = ties(text)
    return found


def layers(weights: Weights, text: Text, direction: Sequence[Tensor], e: float) -> list[float]:
    """By layer, the share of tokens that would choose another set, of two blocks."""
    found = []
    for batches, old in itertools.islice(text.blocks(), 2):
        with weights.moved(direction, e):
            found.append(by_layer(batches, old, read(text.policy.model, batches, held=old)))
    return np.mean(found, axis=0).tolist()


def ties(text: Text) -> dict[str, Any]:
    """The same weights in a router that breaks ties the other way."""
    batches, old = next(text.blocks())
    model = text.policy.model
    with patch.object(Rounded, "last_first", True):
        held, free = read(model, batches, held=old), read(model, batches)
    return point(summed(model, batches, old, held, free))


def held_out_block(length: int, number: int) -> list[Sample]:
    return sequences(stdlib(held_out=True), BLOCK // length, length, seed=number)


def loss(text: Text) -> float:
    """Nats a token on the first held-out block. One process."""
    batches, old = next(text.blocks())
    logprobs = [x[b.mask] for x, b in zip(old.logprobs, batches, strict=True) if x is not None]
    return -float(torch.cat(logprobs).double().mean())


def margin_samples(name: str) -> list[Sample]:
    """Those whose margins foretell, which are not those on which swaps are counted."""
    length = MODELS[name].length
    count = MARGIN_BLOCKS.get(name, MARGIN_BLOCKS[""]) * BLOCK // length
    return sequences(stdlib(held_out=True), count, length, seed=MARGIN_SEED)


def foretold(
    model: Model,
    weights: Weights,
    samples: Sequence[Sample],
    direction: Sequence[Tensor],
    sizes: Sequence[float],
) -> dict[str, Any]:
    """Swaps and Var b from the margins, slopes and forced swaps of these sequences alone."""
    found, old = margins(model, weights, samples, direction)
    chosen = found.likely(FORCED)
    result: dict[str, Any] = {"swaps": {f"{e:g}": found.foretold(e) for e in sizes}}
    for how, free in (("free", True), ("held", False)):
        squares = jumps(model, samples, old, found, chosen, free=free)
        rng = np.random.default_rng(2)
        means = rng.choice(squares, size=(DRAWS, len(squares))).mean(1)
        result[f"jump_{how}"] = [float(squares.mean()), *interval(means)]
        spread = np.sort(squares)[::-1].cumsum() / squares.sum()
        result[f"jump_{how}_of_top_tenth"] = float(spread[len(squares) // 10])
        if free:
            rate = found.foretold(1.0)["rate"]
            jump = result["jump_free"]
            kappa = [found.layers * r * j for r, j in zip(rate, jump, strict=True)]
            result["kappa"] = kappa
    return result


def curve(points: dict[float, np.ndarray]) -> dict[str, Any]:
    """The points of one kind of change by size, and how their variances grow with it.

    Points with too few swaps are shown, and left out of everything else.
    """
    shown = {f"{e:g}": point(sums) for e, sums in points.items()}
    kept = [e for e in points if shown[f"{e:g}"]["swaps"] >= LEAST_SWAPS]
    rare = [e for e in kept if shown[f"{e:g}"]["router_flip"][0] < RARE]
    result: dict[str, Any] = {"points": shown, "kept": [f"{e:g}" for e in kept]}
    for label, sizes in (("", kept), ("_rare", rare)):
        if len(sizes) >= 2:
            draws = [numbers(drawn(points[e], seed=i)) for i, e in enumerate(sizes)]
            for name in ("var_a", "var_b"):
                logs = np.log([draw[name] for draw in draws])
                slopes = np.polyfit(np.log(sizes), logs, 1)[0]
                value = float(np.median(slopes))
                result[f"exponent_{name}{label}"] = [value, *interval(slopes)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="MODEL")
    names = parser.parse_args().names or list(MODELS)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    for name in names:
        path = RESULTS / f"law-{name.replace(', ', '-').replace(' ', '-')}.json"
        if path.exists():
            continue
        began = time.process_time()
        found = of_model(name)
        found["cpu_s"] = round(time.process_time() - began, 1)
        write_whole(path, json.dumps(found, indent=1) + "\n")
        logger.info("%s: %.0f s", path.name, found["cpu_s"])


if __name__ == "__main__":
    main()
