"""Settings that may be combined: which are, the runs that have every pair of them, and a table."""

import itertools
import math
from pathlib import Path
from typing import Any, get_args

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import LossType
from sapo_megatron.training import observe
from tests.support.tiny import write_recipe
from tests.support.whole_runs import run, without_reports_and_checkpoints

CORRECTIONS = {
    "none": {},
    "tis": {"correction.rollout_is": "tis"},
    "icepop": {"correction.rollout_is": "icepop"},
    "mask": {"correction.sequence_mask_kl": "0.01"},
}
AXES = {
    "rollout.async_steps": ("0", "2"),
    "algorithm.old_policy": ("recompute", "rollout"),
    "routing.router_replay": ("disabled", "R2", "R3"),
    "correction": tuple(CORRECTIONS),
    "algorithm.loss_type": get_args(LossType),
}
ENGINES = {
    "in process": {},
    "servers": {"rollout.engine": "vllm", "rollout.servers": "[http://a]"},
    "servers that sleep": {
        "rollout.engine": "vllm",
        "rollout.vllm_python": "python",
        "rollout.colocate": "true",
    },
}


def allowed(recipe: Path, cell: dict[str, str]) -> bool:
    """Whether the recipe can be loaded with a value of each axis."""
    settings = {k: v for k, v in cell.items() if k != "correction"}
    try:
        load(recipe, settings | CORRECTIONS[cell["correction"]])
    except UserError:
        return False
    return True


def cells(recipe: Path) -> list[dict[str, str]]:
    """All that run in process."""
    every = (dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values()))
    return [cell for cell in every if allowed(recipe, cell)]


def pairs(cell: dict[str, str]) -> set[Any]:
    """What of a cell a run has covered: each pair of its settings."""
    return set(itertools.combinations(cell.items(), 2))


def chosen(every: list[dict[str, str]]) -> list[dict[str, str]]:
    """Few of these cells that have every pair which any of them has; the same each time."""
    left, found = set().union(*map(pairs, every)), []
    while left:
        found.append(max(every, key=lambda cell: len(pairs(cell) & left)))
        left -= pairs(found[-1])
    return found


def runs(folder: Path, found: list[dict[str, str]], **sections: dict[str, Any]) -> None:
    """Two steps of each cell, of one update each, below ``folder`` by number.

    ``sections`` are merged into the recipe; a cell may have any key of it beside the axes.
    """
    without_reports_and_checkpoints()
    observe.BOTH_ORDERS = 1
    small = {"rollout_batch_size": 2, "num_generations": 4, "max_response_length": 4}
    write_recipe(
        folder,
        arch=sections.get("arch"),
        rollout={**small, **sections.get("rollout", {})},
        routing={"decompose_every": 1, **sections.get("routing", {})},
        train={"steps": 2, "num_mini_batches": 1},
        eval={"num_problems": 1, "k": 1},
    )
    for number, cell in enumerate(found):
        settings = {k: v for k, v in cell.items() if k != "correction"}
        settings |= CORRECTIONS[cell["correction"]] | {"train.run_dir": str(folder / str(number))}
        run(folder, **{k.replace(".", "__"): v for k, v in settings.items()})


def check_trained(every: list[dict[str, str]], done: list[tuple[dict[str, str], Any]]) -> None:
    """``done``, (cell, its metrics by step), have every pair of ``every``; each cell has learnt."""
    assert set().union(*map(pairs, every)) == set().union(*(pairs(cell) for cell, _ in done))
    for cell, lines in done:
        for line in lines:
            assert math.isfinite(line["actor/pg_loss"]), cell
            assert line["actor/grad_norm"] > 0, cell
        ahead = cell["rollout.async_steps"] == "2"
        assert [line["rollout/staleness_max"] for line in lines] == [0, float(ahead)], cell


def table(recipe: Path) -> str:
    """Markdown: corrections by engine, old policy and replay; losses by correction."""
    columns = list(itertools.product(AXES["algorithm.old_policy"], AXES["routing.router_replay"]))
    heads = " | ".join(f"`{policy}`, {replay}" for policy, replay in columns)
    lines = [f"| | K | {heads} |", "| --- | --- |" + " --- |" * len(columns)]
    for (name, engine), ahead in itertools.product(ENGINES.items(), ("0", "1", "2")):
        entries = []
        for policy, replay in columns:
            cell = {"rollout.async_steps": ahead, "algorithm.old_policy": policy, **engine}
            cell["routing.router_replay"] = replay
            fit = [allowed(recipe, cell | {"correction": kind}) for kind in CORRECTIONS]
            entries.append({4: "any", 1: "none", 0: "refused"}[sum(fit)])
        lines.append(f"| {name} | {'> 1' if ahead == '2' else ahead} | {' | '.join(entries)} |")
    lines += ["", f"| | {' | '.join(CORRECTIONS)} |", "| --- |" + " --- |" * len(CORRECTIONS)]
    for loss in AXES["algorithm.loss_type"]:
        cell = {"algorithm.loss_type": loss}
        fit = [allowed(recipe, cell | {"correction": kind}) for kind in CORRECTIONS]
        lines.append(f"| {loss} | {' | '.join('yes' if ok else 'refused' for ok in fit)} |")
    return "\n".join(lines) + "\n"
