"""The same numbers of any model folder: c, e*, and the router's share by the size of a change.

    python -m benchmarks.studies.router_law.folder MODEL [--text FILE]
    torchrun --nproc-per-node 8 -m benchmarks.studies.router_law.folder MODEL --recipe RECIPE

Four Adam updates on text give the direction of a change (e = 1: learning rate 1e-4); other text is
read with the weights moved along it by several sizes. A recipe gives layout, dtype and tokenizer;
without one the model runs in fp32 on one process. Sizes with fewer than 400 swaps are marked and
left out of c.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.studies.router_law import changes
from benchmarks.studies.router_law.measure import Text, Weights, measured, point
from benchmarks.studies.router_law.models import opened, recipe_of
from benchmarks.studies.router_law.text import VOCABULARY, sequences, stdlib
from sapo_megatron.data.tokenizer import load_tokenizer
from sapo_megatron.errors import RunFailed, UserError, one_line
from sapo_megatron.files import write_whole
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.hf.folder import find_model
from sapo_megatron.recipe.check import check_world
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.routing.variance import LEAST_SWAPS
from sapo_megatron.sample import Sample

SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
SEQUENCES = 64
"""Of a block, which is what is read at once, and of all updates together."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--recipe", type=Path, help="layout, dtype and tokenizer")
    parser.add_argument("--text", type=Path, help="a text file; without it, Python's own library")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--blocks", type=int, default=16, help="most blocks of 64 sequences a size")
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    arguments = parser.parse_args(argv)
    try:
        found = of_folder(arguments)
    except (UserError, RunFailed, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2 if isinstance(error, UserError) else 1
    if found and arguments.out:
        write_whole(arguments.out, json.dumps(found, indent=1) + "\n")
    if found:
        print(told(found))
    return 0


def of_folder(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The numbers, on the first rank. Collective over all processes; raises UserError."""
    folder = find_model(str(arguments.model))
    recipe = recipe_for(folder, arguments.recipe, arguments.length)
    learned, read = texts(folder, recipe, arguments.text, arguments.length)
    with opened(folder, router="own", recipe=recipe, optimizer=changes.ADAM) as policy:
        weights = Weights(policy.model)
        part = SEQUENCES // changes.UPDATES
        direction = changes.update(
            policy,
            weights,
            recipe,
            [sequences(learned, part, arguments.length, seed=i) for i in range(changes.UPDATES)],
        )
        text = Text(policy, recipe, functools.partial(block, read, arguments.length))
        least = LEAST_SWAPS if policy.model.routers.moe_layers else 0
        points = {}
        for e in SIZES:
            sums = measured(weights, text, direction, e, (1, arguments.blocks), least)
            points[f"{e:g}"] = point(sums) | {"weights_moved": weights.changed(direction, e)}
        first = dist.get_rank() == 0
    return summary(str(arguments.model), points) if first else None


def block(text: Sequence[int], length: int, number: int) -> list[Sample]:
    return sequences(text, SEQUENCES, length, seed=number)


def recipe_for(folder: Path, path: Path | None, length: int) -> Recipe:
    """The recipe with this model, or one process in fp32. Raises UserError."""
    if path is None:
        recipe = recipe_of(folder)
    else:
        recipe = load(path, {"model.path": str(folder), "model.init": "pretrained"})
    started = int(os.environ.get("WORLD_SIZE", "1"))
    check_world(recipe, dist.get_world_size() if dist.is_initialized() else started)
    room = recipe.train.max_tokens_per_gpu * recipe.parallel.context_parallel_size
    if length > room:
        raise UserError(
            f"--length: expected at most the {room} tokens of a micro-batch of the recipe, got "
            f"{length}; raise train.max_tokens_per_gpu or shorten it"
        )
    routing = dataclasses.replace(recipe.routing, replay_threshold=0.0, prob_every=0)
    return dataclasses.replace(recipe, routing=routing)


def texts(
    folder: Path, recipe: Recipe, path: Path | None, length: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Tokens to update on, and others to read. Raises UserError."""
    vocabulary = read_architecture(folder).vocab_size
    named = recipe.model.tokenizer
    has_tokenizer = named or any(folder.glob("tokenizer*"))
    if not has_tokenizer and vocabulary != VOCABULARY:
        raise UserError(
            f"{folder}: expected a tokenizer, or a model of bytes with vocab_size {VOCABULARY}, "
            f"got none and {vocabulary}; put its tokenizer there or name one in a recipe"
        )
    if path is None:
        parts = [stdlib(held_out=held_out).decode(errors="replace") for held_out in (False, True)]
    else:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text: cannot read {path}: {one_line(error)}") from None
        parts = [text[: len(text) // 2], text[len(text) // 2 :]]
    parts = [part[: 2**22] for part in parts]
    encode: Callable[[str], Sequence[int]] = str.encode
    if has_tokenizer:
        encode = load_tokenizer(named or str(folder), vocabulary).encode
    learned, read = (encode(part) for part in parts)
    if min(len(learned), len(read)) <= 4 * length:
        raise UserError(
            f"--text: expected more than {8 * length} tokens for sequences of {length}, got "
            f"{len(learned) + len(read)}; name a longer text or give a smaller --length"
        )
    return learned, read


def summary(name: str, points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """c from the smallest change with enough swaps, and the change at which the shares are even."""
    found: dict[str, Any] = {"model": name, "points": points}
    kept = [e for e, p in points.items() if p["swaps"] >= LEAST_SWAPS]
    if kept:
        e, p = float(kept[0]), points[kept[0]]
        found["from"], found["c"] = kept[0], p["c"]
        found["even_var_a"] = p["c"][0] ** 2
        found["even_e"] = p["c"][0] * e / p["var_a"][0] ** 0.5
    return found


def told(found: dict[str, Any]) -> str:
    """The numbers as a table."""
    lines = [
        f"{'e':>6}{'swaps':>9}{'Var a':>10}{'Var b':>10}  {'share of the router':24}"
        f"{'router_flip':>12}  c"
    ]
    for e, p in found["points"].items():
        share, c = p["share"], p["c"]
        mark = "" if p["swaps"] >= LEAST_SWAPS else f"  (under {LEAST_SWAPS} swaps)"
        lines.append(
            f"{e:>6}{p['swaps']:>9}{p['var_a'][0]:>10.2e}{p['var_b'][0]:>10.2e}  "
            f"{f'{share[0]:.3f} ({share[1]:.3f} to {share[2]:.3f})':24}"
            f"{p['router_flip'][0]:>12.2e}  {c[0]:.2e} ({c[1]:.2e} to {c[2]:.2e}){mark}"
        )
    if "c" not in found:
        return "\n".join([*lines, "c: not told; no size has enough swaps"])
    c = found["c"]
    lines.append(
        f"c {c[0]:.3g} ({c[1]:.3g} to {c[2]:.3g}), of e = {found['from']}; the router makes half "
        f"of the variance where Var a = {found['even_var_a']:.2g}, at e* = {found['even_e']:.2g}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
