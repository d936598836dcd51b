"""Time and peak memory of log-probs and entropies from logits, against other implementations.

    python benchmarks/logprob.py                 # two sizes and one fused case, a minute or two
    python benchmarks/logprob.py --full          # every size; needs about 16 GB
    python benchmarks/logprob.py --device cuda --full --out results.json

Times of one size come from one process that takes turns between the implementations; the table
shows the best round in milliseconds and the ratio of its forward + backward to megatron-core's.
Memory comes from a fresh process for each number: the peak during the first forward + backward,
beyond the logits themselves (for the fused entry and its rival: beyond hidden states, weight and
their gradients), as a share of the logits. On CPU that is the high-water mark of the resident set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from sapo_megatron.objective.logprob import linear_logprobs, vocab_parallel_logprobs

QUICK = [("logits", (1024, 32768)), ("logits", (1024, 65536)), ("hidden", (1024, 65536))]
FULL = [
    *(("logits", (n, v)) for n in (1024, 4096) for v in (32768, 65536, 152064)),
    ("hidden", (1024, 65536)),
    ("hidden", (4096, 152064)),
]


def torch_plain(logits, targets):
    logprobs = logits.log_softmax(-1)
    return [logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)]


def torch_with_entropy(logits, targets):
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return [logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy.detach()]


def megatron_core(logits, targets):
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return [vocab_parallel_cross_entropy(logits, targets)]


def ours(logits, targets):
    return [vocab_parallel_logprobs(logits, targets)[0]]


def ours_with_entropy(logits, targets):
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, with_entropy=True)
    return [logprobs, entropy.detach()]


def ours_with_entropy_gradient(logits, targets):
    return list(vocab_parallel_logprobs(logits, targets, with_entropy=True))


def linear_then_ours(hidden, weight, targets):
    return ours_with_entropy(F.linear(hidden, weight), targets)


def fused(hidden, weight, targets):
    logprobs, entropy = linear_logprobs(hidden, weight, targets, with_entropy=True)
    return [logprobs, entropy.detach()]


ON_LOGITS = {
    "torch log_softmax": torch_plain,
    "torch log_softmax, entropy": torch_with_entropy,
    "megatron-core cross-entropy": megatron_core,
    "sapo_megatron": ours,
    "sapo_megatron, entropy": ours_with_entropy,
    "sapo_megatron, entropy + its gradient": ours_with_entropy_gradient,
}
ON_HIDDEN = {
    "linear, then sapo_megatron, entropy": linear_then_ours,
    "fused, entropy": fused,
}
BASELINE = {"logits": "megatron-core cross-entropy", "hidden": next(iter(ON_HIDDEN))}


def inputs_of(job: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Differentiable inputs and targets; every page of them touched."""
    tokens, vocab = job["size"]
    options = {"device": job["device"], "dtype": getattr(torch, job["dtype"])}
    targets = torch.randint(vocab, (tokens,), device=job["device"])
    if job["on"] == "logits":
        shapes = [(tokens, vocab)]
    else:
        shapes = [(tokens, job["hidden"]), (vocab, job["hidden"])]
    inputs = [torch.randn(s, **options) for s in shapes]
    inputs[-1] *= 1 if job["on"] == "logits" else job["hidden"] ** -0.5
    return [x.requires_grad_() for x in inputs], targets


def forward_backward(
    function: Callable, inputs: list[torch.Tensor], targets: torch.Tensor
) -> tuple[float, float]:
    """Seconds of the forward and of forward + backward."""
    ones = torch.ones_like(targets, dtype=torch.float32)
    start = clock(targets)
    outputs = function(*inputs, targets)
    middle = clock(targets)
    outputs = [o for o in outputs if o.requires_grad]
    torch.autograd.grad(outputs, inputs, [ones.to(o.dtype) for o in outputs])
    return middle - start, clock(targets) - start


def clock(like: torch.Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_time(job: dict) -> dict[str, list[float]]:
    functions = ON_LOGITS if job["on"] == "logits" else ON_HIDDEN
    inputs, targets = inputs_of(job)
    kept = inputs[0].detach().clone()
    best = {name: [float("inf")] * 2 for name in functions}
    for round_index in range(job["rounds"] + 1):
        for name, function in functions.items():
            inputs[0].detach().copy_(kept)
            seconds = forward_backward(function, inputs, targets)
            if round_index > 0:
                best[name] = [min(a, b) for a, b in zip(best[name], seconds, strict=True)]
    return best


def measure_memory(job: dict) -> int:
    """Bytes at the peak of one forward + backward, beyond what the module docstring says."""
    function = (ON_LOGITS | ON_HIDDEN)[job["name"]]
    # Code paths, thread pools and allocators warm up on a batch that is too small to matter.
    small, small_targets = inputs_of(job | {"size": (8, 256)})
    forward_backward(function, small, small_targets)
    inputs, targets = inputs_of(job)
    if targets.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(function, inputs, targets)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status_bytes("VmRSS")
        forward_backward(function, inputs, targets)
        peak = status_bytes("VmHWM") - before
    if job["on"] == "hidden":
        peak -= sum(x.numel() * x.element_size() for x in inputs)
    return peak


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def work(job: dict) -> None:
    """In a process of its own: one measurement, as JSON on the last line."""
    from megatron.core import parallel_state

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if job["device"] == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/s", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        print(json.dumps((measure_time if job["what"] == "time" else measure_memory)(job)))
        dist.destroy_process_group()


def in_fresh_process(job: dict):
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(on: str, size: tuple[int, int], args: argparse.Namespace) -> list[dict]:
    job = {
        "on": on,
        "size": size,
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "rounds": args.rounds,
        "hidden": args.hidden,
    }
    times = in_fresh_process(job | {"what": "time"})
    logits_bytes = size[0] * size[1] * getattr(torch, args.dtype).itemsize
    rows = []
    for name, (forward, both) in times.items():
        extra = in_fresh_process(job | {"what": "memory", "name": name})
        rows.append(
            {
                "on": on,
                "tokens": size[0],
                "vocab": size[1],
                "name": name,
                "forward_ms": forward * 1e3,
                "forward_backward_ms": both * 1e3,
                "time_ratio": both / times[BASELINE[on]][1],
                "extra_bytes": extra,
                "extra_over_logits": extra / logits_bytes,
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    head = f"{rows[0]['tokens']} x {rows[0]['vocab']}"
    print(f"\n{head:40}{'fwd ms':>10}{'fwd+bwd ms':>12}{'ratio':>8}{'extra / logits':>16}")
    for row in rows:
        print(
            f"{row['name']:40}{row['forward_ms']:10.1f}{row['forward_backward_ms']:12.1f}"
            f"{row['time_ratio']:8.2f}{row['extra_over_logits']:16.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every size, not the quick subset")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the fused cases")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(json.loads(args.job))
        return
    rows = []
    for on, size in FULL if args.full else QUICK:
        rows += compare(on, size, args)
        show(rows[-len(ON_LOGITS if on == "logits" else ON_HIDDEN) :])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"settings": vars(args) | {"out": None}, "rows": rows}))


if __name__ == "__main__":
    main()
