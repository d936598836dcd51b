"""``sapo-megatron doctor``: what is installed and what this machine has, and what to do about it.

A check is a function that returns a :class:`Finding`. None of them needs CUDA, Megatron or vLLM,
and none imports anything but torch: versions come from metadata, modules are looked for only, and
Transformer Engine, on a machine with GPUs, is imported in a process of its own. ``examine_host``
alone imports what it looks at.
"""

import dataclasses
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sapo_megatron.commands.doctor import machine, packages
from sapo_megatron.commands.doctor.finding import Finding
from sapo_megatron.commands.doctor.hosts import examine_host

__all__ = ["Finding", "examine", "examine_host", "show"]

WIDTH = 100


def examine(run_dir: Path) -> list[Finding]:
    """Every check; ``run_dir`` is where runs are to be written. Leaves nothing behind."""
    driver = machine.read_driver()
    torch = packages.import_torch()
    return [
        packages.python(),
        packages.torch(torch, driver),
        packages.nccl(torch),
        packages.required("megatron-core"),
        packages.required("transformers"),
        packages.required("safetensors"),
        packages.transformer_engine(torch, driver),
        packages.apex(),
        packages.flash_attention(driver),
        packages.vllm(),
        *packages.combinations(driver),
        machine.gpus(driver),
        machine.links(driver),
        machine.shared_memory(driver),
        machine.folder("run folder", run_dir, driver),
        machine.folder("hf cache", machine.hf_cache(), driver),
        machine.rendezvous(),
        machine.wandb(),
    ]


def show(findings: Sequence[Finding], *, as_json: bool) -> str:
    """A table of ``WIDTH`` columns, or a JSON list with an object for each finding."""
    if as_json:
        return json.dumps([dataclasses.asdict(f) for f in findings], indent=2) + "\n"
    column = max(len(f.name) for f in findings) + 2
    lines = []
    for finding in findings:
        lines += _wrap(f"{finding.status:<9}{finding.name:<{column}}", finding.found)
        if finding.todo:
            lines += _wrap(" " * (9 + column) + "-> ", finding.todo)
    counts = Counter(f.status for f in findings)
    total = ", ".join(f"{counts[s]} {s}" for s in ("ok", "warn", "fail", "skipped") if counts[s])
    return "\n".join([*lines, "", total]) + "\n"


def _wrap(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )
