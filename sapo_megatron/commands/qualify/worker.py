"""One process that measures: ``python -m sapo_megatron.commands.qualify.worker FOLDER``.

FOLDER holds ``request.json``; results are written beside it after every measurement, so that one
which ends the process takes none of the others with it.
"""

import importlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import sapo_megatron.policy  # noqa: F401  (makes Megatron importable without a GPU)

import torch  # isort: skip

from sapo_megatron.commands.qualify.policies import Setting
from sapo_megatron.launcher import join

ABSENT = "not installed: "
"""How the error of a measurement begins that wants a package which is not there."""
OURS = ("megatron", "sapo_megatron", "torch", "transformer_engine")
"""Packages without which nothing is qualified."""


def run(setting: Setting, names: list[str], results: Path | None) -> dict[str, Any]:
    """The results of measurements ``module.function``, or the error of each as ``{"error": ...}``.

    Written to ``results`` as they come. Collective over all ranks.
    """
    found: dict[str, Any] = {}
    for name in names:
        module, _, function = name.partition(".")
        try:
            measured = importlib.import_module(f"sapo_megatron.commands.qualify.{module}")
            found[name] = getattr(measured, function)(setting)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            absent = f"{ABSENT}{package}" if package not in OURS else traceback.format_exc()
            found[name] = {"error": absent}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        if results:
            torch.save(found, results)
    return found


def main(folder: Path) -> None:
    """Measure what ``request.json`` asks for, in this process or in each rank of its world.

    It has the ``names`` of measurements, and all of a :class:`Setting` but its folder.
    """
    join()
    logging.basicConfig(level=logging.ERROR)
    request = json.loads((folder / "request.json").read_text())
    rank = os.environ.get("RANK", "0")
    mine = folder / f"rank-{rank}"
    mine.mkdir()
    torch.manual_seed(0)
    names = request.pop("names")
    run(Setting(folder=mine, **request), names, folder / "results.pt" if rank == "0" else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
