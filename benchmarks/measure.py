"""What the benchmarks share: clocks, peak memory, fresh processes, options, results."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forward_backward(
    function: Callable[[], Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """Seconds of the forward and of forward + backward, the outputs' gradients being ones."""
    device = inputs[0].device.type
    ones: dict[Any, torch.Tensor] = {}
    start = clock(device)
    outputs = [o for o in function() if o.requires_grad]
    middle = clock(device)
    for o in outputs:
        ones.setdefault((o.shape, o.dtype), torch.ones_like(o))
    torch.autograd.grad(outputs, inputs, [ones[o.shape, o.dtype] for o in outputs])
    return middle - start, clock(device) - start


def in_turns(
    functions: Mapping[str, Callable[[], tuple[float, float]]], rounds: int, baseline: str
) -> dict[str, dict[str, float]]:
    """Each function once a round, after a round that does not count.

    Medians of what they return, the best of the second number, and two ratios of that to the
    baseline's: the median over the rounds (what slows the machine down for a while slows down both)
    and best to best (for a machine that other programs use as well).
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            seconds[name].append(function())
    times = {}
    theirs = [both for _, both in seconds[baseline][1:]]
    for name, found in seconds.items():
        forward, both = zip(*found[1:], strict=True)
        times[name] = {
            "forward_ms": statistics.median(forward) * 1e3,
            "forward_backward_ms": statistics.median(both) * 1e3,
            "best_ms": min(both) * 1e3,
            "ratio": statistics.median(a / b for a, b in zip(both, theirs, strict=True)),
            "best_ratio": min(both) / min(theirs),
        }
    return times


TIMES = f"{'fwd ms':>10}{'fwd+bwd ms':>12}{'ratio':>8}{'best ms':>10}{'ratio':>8}"


def show_times(row: dict[str, Any]) -> str:
    """Columns under ``TIMES``."""
    return (
        f"{row['forward_ms']:10.2f}{row['forward_backward_ms']:12.2f}{row['ratio']:8.2f}"
        f"{row['best_ms']:10.2f}{row['best_ratio']:8.2f}"
    )


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Bytes at the peak of ``run()`` beyond what was there before; on a CPU, of resident memory.

    In a fresh process: malloc keeps what was freed before, and taking it again costs nothing.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_fresh_process(module: str, job: dict[str, Any], ranks: int | None = None) -> Any:
    """What ``python -m module --job JSON`` prints as its last line, from JSON.

    With ``ranks``, from as many processes, of which one prints.
    """
    launcher = [] if ranks is None else ["sapo_megatron.launcher", str(ranks)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, module, "--job", json.dumps(job)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--full", action="store_true", help="every size, not the quick subset")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--out", type=Path, help="write the rows as JSON")
    options.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return options


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """To ``--out``, where that was given."""
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "job", "keep")}
        settings["torch"] = torch.__version__
        args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
