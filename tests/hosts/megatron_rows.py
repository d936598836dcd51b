"""Sequences for Megatron-LM's GRPO, as its loss takes them, and what our own loss makes of them.

Rows are sequences; a micro-batch is some of them, padded or packed into one bin.
"""

from dataclasses import dataclass

import torch

from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.loss import gate_metrics, policy_loss, ratio_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig
from sapo_megatron.sample import Denominators, PackedBatch

SAPO = AlgorithmConfig(tau_pos=1.1, tau_neg=1.4, kl_coef=0.03)
LENGTH = 12
"""Tokens of the longest sequence."""
GAP = 2
"""Padding behind each sequence of a bin."""
CAP = 1.5


@dataclass
class Rows:
    """N sequences; entry t of ``[N, LENGTH - 1]`` speaks of token t + 1."""

    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    inference: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    tokens: list[int]
    """How many each sequence has, prompt and response."""

    def select(self, rows):
        picked = [getattr(self, n)[rows] for n in self.__annotations__ if n != "tokens"]
        return Rows(*picked, [self.tokens[i] for i in rows])


def some_rows(n=6, seed=0, spread=0.4):
    torch.manual_seed(seed)
    tokens = [LENGTH - i % 4 for i in range(n)]
    mask = torch.zeros(n, LENGTH - 1, dtype=torch.bool)
    for i, length in enumerate(tokens):
        mask[i, 2 + i % 3 : length - 1] = True
    mask[3] = False  # a failed episode: nothing to train
    logprobs = -torch.rand(n, LENGTH - 1, dtype=torch.float64) * 4 - 0.01
    noise = torch.randn(3, n, LENGTH - 1, dtype=torch.float64) * spread
    return Rows(
        logprobs.requires_grad_(),
        *(logprobs.detach() + noise),
        torch.randn(n).double(),
        mask,
        tokens,
    )


def ours(rows, algorithm, with_correction):
    """Loss, gradient to ``rows.logprobs`` and metrics of all rows as one batch."""
    count, width = rows.mask.shape
    ids = torch.arange(count).repeat_interleave(width)
    nothing = torch.zeros(count * width, dtype=torch.int64)
    batch = PackedBatch(
        tokens=nothing,
        targets=nothing,
        mask=rows.mask.flatten(),
        position_ids=nothing,
        sequence_ids=ids,
        cu_seqlens=torch.arange(0, count * width + 1, width, dtype=torch.int32),
        max_seqlen=width,
        lengths=rows.mask.sum(1),
        advantages=rows.advantages[ids],
        rollout_logprob=rows.inference.flatten(),
        sample_uids=(),
        old_logprob=rows.old.flatten(),
        ref_logprob=rows.ref.flatten(),
    )
    sizes = Denominators(sequences=int(rows.mask.any(1).sum()), tokens=int(rows.mask.sum()))
    correction = CorrectionConfig(rollout_is="tis", tis_cap=CAP) if with_correction else None
    loss, _ = policy_loss(
        batch,
        rows.logprobs.flatten(),
        None,
        algorithm=algorithm,
        denominators=sizes,
        max_response_length=width,
        correction=correction,
    )
    (gradient,) = torch.autograd.grad(loss, rows.logprobs)
    log_ratio = (rows.logprobs - rows.old).detach().flatten()
    r = Ratio.of(log_ratio, batch.advantages, batch.mask)
    metrics = Metrics()
    metrics.update(ratio_metrics(r))
    metrics.update(gate_metrics(r, algorithm.temperatures))
    metrics.update(bound_metrics(r, algorithm.temperatures, ids, batch.lengths))
    return loss.detach(), gradient, metrics.values()


@dataclass
class Batch:
    """A micro-batch as the host's loss takes it."""

    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    inference: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor
    starts: list[int] | None = None
    lengths: list[int] | None = None


def padded(rows, corrected):
    inference = rows.inference if corrected else None
    return Batch(rows.logprobs, rows.old, rows.ref, inference, rows.advantages, rows.mask)


def packed(rows, corrected):
    """One bin, a gap behind each sequence, garbage that is finite where no sequence is."""
    size = sum(rows.tokens) + GAP * len(rows.tokens) - 1
    starts = [0]
    for tokens in rows.tokens:
        starts.append(starts[-1] + tokens + GAP)

    def lay(x, filler):
        laid = torch.full((1, size), filler, dtype=x.dtype)
        pieces, at = [], 0
        for i, (start, tokens) in enumerate(zip(starts, rows.tokens, strict=False)):
            pieces += [laid[:, at:start], x[i : i + 1, : tokens - 1]]
            at = start + tokens - 1
        return torch.cat([*pieces, laid[:, at:]], 1)

    inference = lay(rows.inference, -1.0) if corrected else None
    return Batch(
        lay(rows.logprobs, -1.0),
        lay(rows.old, -2.0),
        lay(rows.ref, -1.0),
        inference,
        rows.advantages,
        lay(rows.mask, False),
        starts,
        rows.tokens,
    )
