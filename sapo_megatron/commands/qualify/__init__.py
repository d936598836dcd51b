"""``sapo-megatron qualify``: whether a machine's GPUs compute what the CPU does.

Measurements run in processes of their own, one for each kind of layers and layout: the reference
has to see no GPU, and what ends one process must not end the table.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sapo_megatron.commands.qualify.checks import CHECKS, Check
from sapo_megatron.errors import UserError
from sapo_megatron.launcher import PARENT, STORE

TIMEOUT_S = 900.0
"""Seconds for all measurements of one kind of process."""
WIDTH = 100
NOT_RUN = "not run: "


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A line of the table. Not ``ok`` but None: not run, or a number that does not gate."""

    check: str
    section: str
    expected: str
    got: str
    ok: bool | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to qualify."""

    gpus: int
    transformer_engine: bool

    def lacks(self, check: Check) -> str | None:
        """Why a check cannot run here; None: it can."""
        if self.gpus == 0 and (check.gpu or "te" in check.where.split()):
            return "no GPU"
        if "te" in check.where.split() and not self.transformer_engine:
            return "no Transformer Engine"
        if "pair" in check.where and self.gpus == 1:
            return "one GPU"
        return None


def read_machine() -> Machine:
    return Machine(
        gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        transformer_engine=find_spec("transformer_engine") is not None,
    )


def chosen(section: str | None) -> list[Check]:
    """The checks of a section, or all."""
    return [check for check in CHECKS if section in (None, check.section)]


def qualify(section: str | None, machine: Machine) -> list[Outcome]:
    """Run the checks of ``section``, or all. Starts processes; leaves nothing behind.

    Raises UserError for a section of which nothing can run here.
    """
    checks = chosen(section)
    reasons = {check.name: machine.lacks(check) for check in checks}
    runnable = [check for check in checks if reasons[check.name] is None]
    if not runnable:
        raise UserError(
            f"--section: expected one that this machine can run, got {section}, for which it has "
            f"{reasons[checks[0].name]}; choose another"
        )
    full = machine.gpus > 0
    with tempfile.TemporaryDirectory(prefix="qualify-") as folder:
        found = {}
        names = {check.reference for check in runnable if check.reference}
        if names:
            found["reference"] = _measured(Path(folder), "reference", names, full=full)
        for where in dict.fromkeys(check.where for check in runnable):
            names = {check.measurement for check in runnable if check.where == where}
            found[where] = _measured(Path(folder), where, names, full=full)
    outcomes = []
    for check in checks:
        reason = reasons[check.name]
        got, ok = (NOT_RUN + reason, None) if reason else judged(check, found)
        name, section, expected = check.name, check.section, check.expected
        outcomes.append(Outcome(check=name, section=section, expected=expected, got=got, ok=ok))
    return outcomes


def judged(check: Check, found: dict[str, dict[str, Any]]) -> tuple[str, bool | None]:
    """What a check says of results, by process and measurement."""
    got = found[check.where][check.measurement]
    reference = found["reference"][check.reference] if check.reference else {}
    for result in (got, reference):
        if "error" in result:
            last = result["error"].strip().splitlines()[-1]
            absent = last.startswith("not installed: ")
            return (NOT_RUN + last, None) if absent else (last, False)
    return check.judge(got, reference)


def _measured(
    folder: Path, where: str, names: set[str], *, full: bool
) -> dict[str, dict[str, Any]]:
    """The results of measurements in a new process, or two; an error where there is none."""
    mine = folder / where.replace(" ", "-")
    mine.mkdir()
    request = {
        "layers": "transformer_engine" if "te" in where.split() else "torch",
        "full": full,
        "reference": where == "reference",
        "names": sorted(names),
    }
    (mine / "request.json").write_text(json.dumps(request))
    # A rank knows its place from its environment: these have one of their own.
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in (*outer, STORE, PARENT)}
    env |= {"OMP_NUM_THREADS": "1", "NCCL_SOCKET_IFNAME": "lo"}
    if where == "reference":
        env["CUDA_VISIBLE_DEVICES"] = ""
    module = ["sapo_megatron.commands.qualify.worker", str(mine)]
    words = [sys.executable, "-m", *module]
    if "pair" in where:
        words = [sys.executable, "-m", "sapo_megatron.launcher", "2", *module]
    with (mine / "log").open("w+") as log:
        try:
            done = subprocess.run(
                words, env=env, stdout=log, stderr=log, timeout=TIMEOUT_S, check=False
            )
            end = f"the process ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"no result within {TIMEOUT_S:g} s"
        log.seek(0)
        lines = log.read().strip().splitlines()
    results = mine / "results.pt"
    found = torch.load(results, weights_only=True) if results.exists() else {}
    shutil.rmtree(mine, ignore_errors=True)  # models and runs are large on a GPU
    missing = {"error": "\n".join([*lines[-20:], f"{end}: {lines[-1] if lines else 'no output'}"])}
    return {name: found.get(name, missing) for name in names}


def first_failure(outcomes: Sequence[Outcome]) -> Outcome | None:
    return next((outcome for outcome in outcomes if outcome.ok is False), None)


def show(outcomes: Sequence[Outcome], *, as_json: bool) -> str:
    """A table of ``WIDTH`` columns, or a JSON list with an object for each check."""
    if as_json:
        return json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n"
    marks = {True: "ok", False: "FAIL", None: "-"}
    lines = []
    for o in outcomes:
        head = f"{marks[o.ok]:<6}{o.check:<32}"
        text = f"{o.got} [{o.expected}]"
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=head, subsequent_indent=" " * 38, break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"


def listed(section: str | None) -> str:
    """The checks and what they expect."""
    return "".join(f"{c.section}  {c.name:<32}{c.expected}\n" for c in chosen(section))
