"""Time and peak memory of log-probs and entropies from logits, against other implementations.

    python -m benchmarks.logprob                 # two sizes and one fused case, some minutes
    python -m benchmarks.logprob --full          # every size; needs about 16 GB
    python -m benchmarks.logprob --device cuda --full --out results.json

Times of one size come from one process that takes turns between the implementations; the table
shows medians in milliseconds and the best of forward + backward, both with their ratio to
megatron-core's. Memory comes from a fresh process for each number: the peak during the first
forward + backward, beyond the logits themselves (for the fused entry and its rival: beyond hidden
states, weight and their gradients), as a share of the logits. On CPU that is the high-water mark of
the resident set.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import sapo_megatron.policy  # noqa: F401  before anything names Megatron
from benchmarks import measure
from sapo_megatron.objective.logprob import linear_logprobs, vocab_parallel_logprobs

QUICK = [("logits", (1024, 32768)), ("logits", (1024, 65536)), ("hidden", (1024, 65536))]
FULL = [
    *(("logits", (n, v)) for n in (1024, 4096) for v in (32768, 65536, 152064)),
    ("hidden", (1024, 65536)),
    ("hidden", (4096, 152064)),
]
Logprobs = Callable[..., list[Tensor]]


def torch_plain(logits: Tensor, targets: Tensor) -> list[Tensor]:
    logprobs = logits.log_softmax(-1)
    return [logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)]


def torch_with_entropy(logits: Tensor, targets: Tensor) -> list[Tensor]:
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return [logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy.detach()]


def megatron_core(logits: Tensor, targets: Tensor) -> list[Tensor]:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return [vocab_parallel_cross_entropy(logits, targets)]


def ours(logits: Tensor, targets: Tensor) -> list[Tensor]:
    return [vocab_parallel_logprobs(logits, targets)[0]]


def ours_with_entropy(logits: Tensor, targets: Tensor) -> list[Tensor]:
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, with_entropy=True)
    assert entropy is not None
    return [logprobs, entropy.detach()]


def ours_with_entropy_gradient(logits: Tensor, targets: Tensor) -> list[Tensor]:
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, with_entropy=True)
    assert entropy is not None
    return [logprobs, entropy]


def linear_then_ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    return ours_with_entropy(F.linear(hidden, weight), targets)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    logprobs, entropy = linear_logprobs(hidden, weight, targets, with_entropy=True)
    assert entropy is not None
    return [logprobs, entropy.detach()]


ON_LOGITS: dict[str, Logprobs] = {
    "torch log_softmax": torch_plain,
    "torch log_softmax, entropy": torch_with_entropy,
    "megatron-core cross-entropy": megatron_core,
    "sapo_megatron": ours,
    "sapo_megatron, entropy": ours_with_entropy,
    "sapo_megatron, entropy + its gradient": ours_with_entropy_gradient,
}
ON_HIDDEN: dict[str, Logprobs] = {
    "linear, then sapo_megatron, entropy": linear_then_ours,
    "fused, entropy": fused,
}
BASELINE = {"logits": "megatron-core cross-entropy", "hidden": next(iter(ON_HIDDEN))}


def inputs_of(job: dict) -> tuple[list[Tensor], Tensor]:
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


def measure_time(job: dict) -> dict[str, dict[str, float]]:
    inputs, targets = inputs_of(job)
    kept = inputs[0].detach().clone()

    def run(function: Logprobs) -> tuple[float, float]:
        inputs[0].detach().copy_(kept)
        return measure.forward_backward(lambda: function(*inputs, targets), inputs)

    functions = ON_LOGITS if job["on"] == "logits" else ON_HIDDEN
    turns = {name: functools.partial(run, function) for name, function in functions.items()}
    return measure.in_turns(turns, job["rounds"], BASELINE[job["on"]])


def measure_memory(job: dict) -> int:
    """Bytes at the peak of one forward + backward, beyond what the module docstring says."""
    function = (ON_LOGITS | ON_HIDDEN)[job["name"]]

    def run(inputs: list[Tensor], targets: Tensor) -> None:
        measure.forward_backward(lambda: function(*inputs, targets), inputs)

    # Code paths, thread pools and allocators warm up on a batch that is too small to matter.
    run(*inputs_of(job | {"size": (8, 256)}))
    inputs, targets = inputs_of(job)
    peak = measure.peak_bytes(lambda: run(inputs, targets), job["device"])
    if job["on"] == "hidden":
        peak -= sum(x.numel() * x.element_size() for x in inputs)
    return peak


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
    times = measure.in_fresh_process("benchmarks.logprob", job | {"what": "time"})
    logits_bytes = size[0] * size[1] * getattr(torch, args.dtype).itemsize
    rows = []
    for name, found in times.items():
        extra = measure.in_fresh_process(
            "benchmarks.logprob", job | {"what": "memory", "name": name}
        )
        rows.append(
            {"on": on, "tokens": size[0], "vocab": size[1], "name": name}
            | found
            | {"extra_bytes": extra, "extra_over_logits": extra / logits_bytes}
        )
    return rows


def show(rows: list[dict]) -> None:
    head = f"{rows[0]['tokens']} x {rows[0]['vocab']}"
    print(f"\n{head:40}{measure.TIMES}{'extra / logits':>16}")
    for row in rows:
        print(f"{row['name']:40}{measure.show_times(row)}{row['extra_over_logits']:16.3f}")


def main() -> None:
    parser = measure.parser(__doc__, rounds=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the fused cases")
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    rows = []
    for on, size in FULL if args.full else QUICK:
        found = compare(on, size, args)
        show(found)
        rows += found
    measure.write(args, rows)


if __name__ == "__main__":
    main()
