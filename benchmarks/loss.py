"""Time and peak memory of the policy losses, against plain torch.

    python -m benchmarks.loss                    # up to 256k tokens, about a minute
    python -m benchmarks.loss --full             # up to 1M tokens

A loss takes log-probs of a packed batch and gives a scalar; the rows in plain torch are SAPO's
formula and PPO's clip as their papers write them, without masks and clamps. The rows
``policy_loss`` are what training calls: the loss, its weights and all its metrics.

Times come from one process that takes turns; the table shows medians in milliseconds and the best
of forward + backward, both with their ratio to PPO's clip in plain torch. Memory comes from a fresh
process for each number: the peak during the first forward + backward, in bytes a token (a number in
fp32 is 4 of them). On CPU that is the high-water mark of the resident set, which says nothing about
batches of less than 256k tokens.
"""

import argparse
import functools
import json
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import measure
from sapo_megatron.objective.baselines import cispo_loss, clipped_loss
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.objective.reduce import sequence_mean
from sapo_megatron.objective.sapo import sapo_token_loss
from sapo_megatron.recipe.schema import CLIP_DEFAULTS, AlgorithmConfig, LossType
from sapo_megatron.sample import Denominators, PackedBatch

QUICK = (2**14, 2**18)
FULL = (2**14, 2**18, 2**20)
SMALLEST_FOR_MEMORY = 2**18
SEQUENCE = 1024
PROMPT = 128
"""Tokens of each sequence, and how many of them belong to the prompt."""
TokenLoss = Callable[[Tensor, PackedBatch], Tensor]
Inputs = tuple[Tensor, PackedBatch, Tensor]
"""Log-probs, a batch of sequences of one length, and a weight for each token."""


def log_ratio(logprob: Tensor, batch: PackedBatch) -> Tensor:
    assert batch.old_logprob is not None
    return logprob - batch.old_logprob


def plain_ppo(logprob: Tensor, batch: PackedBatch) -> Tensor:
    ratio = log_ratio(logprob, batch).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.min(ratio * batch.advantages, clipped * batch.advantages)


def plain_sapo(logprob: Tensor, batch: PackedBatch) -> Tensor:
    ratio = log_ratio(logprob, batch).exp()
    tau = torch.where(batch.advantages > 0, 1.0, 1.05)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * batch.advantages


def ratio(logprob: Tensor, batch: PackedBatch) -> Ratio:
    return Ratio.of(log_ratio(logprob, batch), batch.advantages, batch.mask, logprob)


def grpo(logprob: Tensor, batch: PackedBatch) -> Tensor:
    return clipped_loss(ratio(logprob, batch), *CLIP_DEFAULTS["grpo"])


def sapo(logprob: Tensor, batch: PackedBatch) -> Tensor:
    return sapo_token_loss(log_ratio(logprob, batch), batch.advantages, mask=batch.mask)


def gspo(logprob: Tensor, batch: PackedBatch) -> Tensor:
    means = sequence_mean(log_ratio(logprob, batch), batch.mask, batch.sequence_ids, batch.lengths)
    r = ratio(logprob, batch).of_sequences(means[batch.sequence_ids])
    return clipped_loss(r, *CLIP_DEFAULTS["gspo"])


def cispo(logprob: Tensor, batch: PackedBatch) -> Tensor:
    return cispo_loss(ratio(logprob, batch), *CLIP_DEFAULTS["cispo"])


def weighed(token_loss: TokenLoss, logprob: Tensor, batch: PackedBatch, weights: Tensor) -> Tensor:
    return (weights * token_loss(logprob, batch)).sum()


def whole(loss_type: LossType, logprob: Tensor, batch: PackedBatch, weights: Tensor) -> Tensor:
    loss, _ = policy_loss(
        batch,
        logprob,
        None,
        algorithm=AlgorithmConfig(loss_type=loss_type),
        denominators=Denominators(sequences=len(batch.lengths), tokens=int(batch.lengths.sum())),
        max_response_length=SEQUENCE,
    )
    return loss


LOSSES = {
    "plain torch, PPO clip": functools.partial(weighed, plain_ppo),
    "plain torch, SAPO": functools.partial(weighed, plain_sapo),
    "sapo": functools.partial(weighed, sapo),
    "grpo": functools.partial(weighed, grpo),
    "gspo": functools.partial(weighed, gspo),
    "cispo": functools.partial(weighed, cispo),
    "policy_loss, sapo": functools.partial(whole, "sapo"),
    "policy_loss, grpo": functools.partial(whole, "grpo"),
    "policy_loss, gspo": functools.partial(whole, "gspo"),
    "policy_loss, cispo": functools.partial(whole, "cispo"),
}
BASELINE = next(iter(LOSSES))


def inputs_of(job: dict) -> Inputs:
    tokens, device = job["tokens"], job["device"]
    sequences = tokens // SEQUENCE
    ids = torch.arange(tokens, device=device) // SEQUENCE
    position_ids = torch.arange(tokens, device=device) % SEQUENCE
    mask = position_ids >= PROMPT
    old_logprob = -3 * torch.rand(tokens, device=device)
    logprob = old_logprob + 0.2 * torch.randn(tokens, device=device)
    batch = PackedBatch(
        tokens=ids,
        targets=ids,
        mask=mask,
        position_ids=position_ids,
        sequence_ids=ids,
        cu_seqlens=SEQUENCE * torch.arange(sequences + 1, dtype=torch.int32, device=device),
        max_seqlen=SEQUENCE,
        lengths=torch.full((sequences,), SEQUENCE - PROMPT, device=device),
        advantages=torch.randn(sequences, device=device)[ids],
        rollout_logprob=old_logprob,
        sample_uids=tuple(range(sequences)),
        old_logprob=old_logprob,
    )
    return logprob.requires_grad_(), batch, mask / mask.sum()


def work(job: dict) -> None:
    """In a process of its own: one measurement, as JSON on the last line."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)

    def run(loss: Callable[..., Tensor], inputs: Inputs) -> tuple[float, float]:
        return measure.forward_backward(lambda: [loss(*inputs)], inputs[:1])

    if job["what"] == "time":
        inputs = inputs_of(job)
        turns = {name: functools.partial(run, loss, inputs) for name, loss in LOSSES.items()}
        print(json.dumps(measure.in_turns(turns, job["rounds"], BASELINE)))
        return
    loss = LOSSES[job["name"]]
    run(loss, inputs_of(job | {"tokens": 2 * SEQUENCE}))
    inputs = inputs_of(job)
    print(measure.peak_bytes(lambda: run(loss, inputs), job["device"]))


def compare(tokens: int, args: argparse.Namespace) -> list[dict]:
    job = {
        "tokens": tokens,
        "device": args.device,
        "threads": args.threads,
        "rounds": args.rounds,
    }
    times = measure.in_fresh_process("benchmarks.loss", job | {"what": "time"})
    rows = []
    for name, found in times.items():
        row = {"tokens": tokens, "name": name} | found
        if args.device == "cuda" or tokens >= SMALLEST_FOR_MEMORY:
            extra = measure.in_fresh_process(
                "benchmarks.loss", job | {"what": "memory", "name": name}
            )
            row |= {"extra_bytes": extra, "extra_bytes_per_token": extra / tokens}
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    head = f"{rows[0]['tokens']} tokens"
    print(f"\n{head:28}{measure.TIMES}{'extra B/token':>16}")
    for row in rows:
        extra = f"{row['extra_bytes_per_token']:.0f}" if "extra_bytes" in row else "-"
        print(f"{row['name']:28}{measure.show_times(row)}{extra:>16}")


def main() -> None:
    parser = measure.parser(__doc__, rounds=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    rows = []
    for tokens in FULL if args.full else QUICK:
        found = compare(tokens, args)
        show(found)
        rows += found
    measure.write(args, rows)


if __name__ == "__main__":
    main()
