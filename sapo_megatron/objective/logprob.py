"""Log-probs and entropies of tokens from vocab-parallel logits.

Two entries, one arithmetic: :func:`vocab_parallel_logprobs` takes logits that exist,
:func:`linear_logprobs` takes hidden states and the output weight and never holds the logits whole.

Shape legend: T tokens, V columns of this rank's shard, N ranks that hold a shard, H hidden size.

Everything inside is in bits: with ``c = log2(e) / temperature`` and a shift of each row by its
``peak = c max(x)``, ``z = c x - peak`` is one fused multiply-add on the logits, ``2^z`` is the
fastest exponential there is, and the statistics of a shard are

    total = sum 2^z        moment = sum z 2^z

Shards (blocks of columns, then ranks) combine by moving to a common peak. The forward only reads
the logits; the backward recomputes ``2^z`` chunk by chunk from them, which costs less than a trip
of the softmax through memory, keeps bf16 logits from being rounded twice, and leaves the logits
intact until their gradient takes their place. With p the softmax, the gradient of
``g logprob + h entropy`` to the logits is

    1 / temperature (g onehot(target) - p (g + h (log p + entropy)))
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

LN2 = math.log(2)
ZERO_BITS = -1100.0
"""2^-1100 is 0 even in fp64. Entropy takes 0 log 0 = 0: where z meets its power it is cut here, so
that a logit of -inf gives 0 * -1100 and not 0 * -inf."""

CHUNK_NUMEL = {"cpu": 2**20, "cuda": 2**24}
"""Numbers in a chunk of logits: on a CPU it stays in cache, on a GPU it outweighs the launches."""
BLOCK_NUMEL = {"cpu": 2**22, "cuda": 2**24}
"""Numbers in a block of the fused entry: large enough for an efficient product."""


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_size: int | None = None,
    inplace: bool = True,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``log softmax(logits / temperature)[targets]`` and the entropy of that softmax.

    ``logits`` [..., V]: rank r of ``tp_group`` holds columns ``r V .. (r + 1) V - 1`` of the
    vocabulary (None: all of them are here). ``targets`` int [...]: global indices in
    [0, vocab_size), the same on every rank; where another index stands (-100 on padding), the
    result is finite and means nothing. ``vocab_size``: columns at or beyond it are padding without
    probability. ``chunk_size``: rows handled at once; None: sized to stay in cache.

    Returns (logprobs [...], entropy [...] or None) in nats, fp32, or fp64 for fp64 logits, the same
    on every rank, both differentiable. Logits of -inf have probability 0 and are no special case.

    With ``inplace`` the backward pass writes the gradient over the logits: they must be contiguous
    and nothing else may need them afterwards. A second backward pass then raises RuntimeError.

    Raises ValueError for shapes that do not fit, a temperature that is not finite and > 0, and
    logits that are not contiguous with ``inplace``.

    Collective over ``tp_group``: its ranks hold the shards of the same tokens.
    """
    _check(logits.shape[:-1], targets, temperature, chunk_size)
    if inplace and not logits.is_contiguous():
        raise ValueError(
            f"logits: expected a contiguous tensor to work in place, got strides "
            f"{logits.stride()} for shape {list(logits.shape)}; pass inplace=False"
        )
    vocab = _Vocab.of(logits.shape[-1], vocab_size, tp_group)
    logprobs, entropy = _LogprobsOfLogits.apply(
        logits, targets, vocab, temperature, with_entropy, chunk_size, inplace
    )
    return logprobs, entropy


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    *,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`vocab_parallel_logprobs` of ``hidden @ weight.T``, which never exists whole.

    ``hidden`` [T, H], or with ``sequence_parallel`` this rank's [T / N, H]; ``weight`` [V, H], this
    rank's rows of the output layer; ``targets`` int [T]. Works through blocks of vocabulary columns
    for all tokens; the backward pass computes the logits of each block again. ``chunk_size``: rows'
    worth of logits held at once, that is ``chunk_size * V`` numbers; None: see ``BLOCK_NUMEL``.

    The products are in the dtype of ``hidden`` and ``weight``, as the output layer's would be, and
    all that follows in fp32 (fp64 stays fp64). Gradients are exact: that of ``weight`` is this
    rank's shard, that of ``hidden`` is summed over ``tp_group`` (and scattered over it with
    ``sequence_parallel``). Returns and raises as :func:`vocab_parallel_logprobs`.

    Collective over ``tp_group``, forward and backward.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, H] and weight [V, H], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    ranks = dist.get_world_size(tp_group) if tp_group is not None else 1
    tokens = hidden.shape[0] * (ranks if sequence_parallel else 1)
    _check((tokens,), targets, temperature, chunk_size)
    vocab = _Vocab.of(weight.shape[0], vocab_size, tp_group)
    logprobs, entropy = _LogprobsOfHidden.apply(
        hidden, weight, targets, vocab, sequence_parallel, temperature, with_entropy, chunk_size
    )
    return logprobs, entropy


def _check(
    shape: tuple[int, ...], targets: Tensor, temperature: float, chunk_size: int | None
) -> None:
    if targets.shape != shape:
        raise ValueError(f"targets: expected shape {list(shape)}, got {list(targets.shape)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")


@dataclass(frozen=True)
class _Vocab:
    """This rank's share of the vocabulary."""

    start: int
    """Global index of the first column."""
    valid: int
    """Columns that are not padding; they come first."""
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, columns: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> "_Vocab":
        rank = dist.get_rank(group) if group is not None else 0
        ranks = dist.get_world_size(group) if group is not None else 1
        if vocab_size is None:
            vocab_size = columns * ranks
        if not 0 < vocab_size <= columns * ranks:
            raise ValueError(
                f"vocab_size: expected 1 to {columns * ranks} ({columns} columns on each of "
                f"{ranks} ranks), got {vocab_size}"
            )
        start = rank * columns
        return cls(start, min(max(vocab_size - start, 0), columns), group)


class _LogprobsOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        vocab: _Vocab,
        temperature: float,
        with_entropy: bool,
        chunk_size: int | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = logits.reshape(targets.numel(), logits.shape[-1])
        here, column = _locate(targets.flatten(), vocab.start, vocab.valid)
        bits = _bits(temperature)
        chunk_rows = min(chunk_size or _rows_in_cache(rows), max(len(rows), 1))
        scratch = _scratch(rows, 2 if with_entropy else 1, chunk_rows * max(vocab.valid, 1))
        stats = torch.cat(
            [_stats(x[:, : vocab.valid], bits, scratch) for x in rows.split(chunk_rows)], dim=1
        )
        target = rows.gather(1, column.unsqueeze(1)).squeeze(1).to(stats.dtype)
        logprobs, entropy, row_stats = _finish(stats, target, here, bits, vocab.group)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, here, column, *row_stats)
        ctx.settings = vocab, temperature, chunk_rows, inplace
        ctx.consumed = False
        shape = targets.shape
        return logprobs.view(shape), None if entropy is None else entropy.view(shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError(
                "vocab_parallel_logprobs: a second backward pass, but the first one wrote the "
                "gradient over the logits; pass inplace=False to keep them"
            )
        vocab, temperature, chunk_rows, inplace = ctx.settings
        logits, here, column, *row_stats = ctx.saved_tensors
        rows = logits.detach().reshape(here.numel(), logits.shape[-1])
        grad = rows if inplace else torch.empty_like(rows)
        factors = _gradient_factors(grad_logprobs, grad_entropy, here, temperature, *row_stats)
        ctx.consumed = inplace
        scratch = _scratch(rows, 2, chunk_rows * max(vocab.valid, 1))
        for start in range(0, len(rows), chunk_rows):
            cut = slice(start, start + chunk_rows)
            _gradient(
                rows[cut, : vocab.valid],
                grad[cut, : vocab.valid],
                column[cut],
                factors[:, cut],
                _bits(temperature),
                scratch,
            )
        grad[:, vocab.valid :] = 0
        return grad.view(logits.shape), *[None] * 6


class _LogprobsOfHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab: _Vocab,
        sequence_parallel: bool,
        temperature: float,
        with_entropy: bool,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        full = _gather(hidden, vocab.group, sequence_parallel)
        here, column = _locate(targets, vocab.start, vocab.valid)
        bits = _bits(temperature)
        budget = chunk_size * len(weight) if chunk_size else _numel(BLOCK_NUMEL, hidden)
        columns = max(min(budget // max(len(full), 1), vocab.valid), 1)
        buffer = full.new_empty(len(full) * columns)
        scratch = _scratch(full, 2 if with_entropy else 1, len(full) * columns)
        target = scratch.new_zeros(len(full))
        parts = []
        for start in range(0, max(vocab.valid, 1), columns):
            block = weight[start : min(start + columns, vocab.valid)]
            x = torch.mm(full, block.t(), out=_part(buffer, len(full), len(block)))
            parts.append(_stats(x, bits, scratch))
            if len(block):
                inside, local = _locate(column, start, len(block))
                found = x.gather(1, local.unsqueeze(1)).squeeze(1)
                target = torch.where(inside, found.to(target.dtype), target)
        stats = torch.stack(parts)
        peak = stats[:, 0].amax(0)
        stats = torch.cat([peak.unsqueeze(0), _rebase(stats.transpose(0, 1), peak).sum(1)])
        logprobs, entropy, row_stats = _finish(stats, target, here, bits, vocab.group)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, here, column, *row_stats)
        ctx.settings = vocab, sequence_parallel, temperature, columns
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        vocab, sequence_parallel, temperature, columns = ctx.settings
        hidden, weight, here, column, *row_stats = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        full = _gather(hidden, vocab.group, sequence_parallel)
        factors = _gradient_factors(grad_logprobs, grad_entropy, here, temperature, *row_stats)
        buffer = full.new_empty(len(full) * columns)
        scratch = _scratch(full, 2, len(full) * columns)
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_hidden = scratch.new_zeros(full.shape) if needs_hidden else None
        for start in range(0, vocab.valid, columns):
            block = weight[start : min(start + columns, vocab.valid)]
            x = torch.mm(full, block.t(), out=_part(buffer, len(full), len(block)))
            inside, local = _locate(column, start, len(block))
            of_block = torch.cat([torch.where(inside, factors[:1], 0.0), factors[1:]])
            _gradient(x, x, local, of_block, _bits(temperature), scratch)
            if grad_weight is not None:
                torch.mm(x.t(), full, out=grad_weight[start : start + len(block)])
            if grad_hidden is not None:
                _add_product(grad_hidden, x, block)
        if grad_hidden is not None:
            grad_hidden = _reduce(grad_hidden, vocab.group, sequence_parallel).to(hidden.dtype)
        return grad_hidden, grad_weight, *[None] * 6


def _stats(x: Tensor, bits: float, scratch: Tensor) -> Tensor:
    """peak, total and, if ``scratch`` has two layers, moment of each row of ``x``: [2 or 3, R]."""
    lowest = torch.finfo(scratch.dtype).min
    if x.shape[1] == 0:
        stats = scratch.new_zeros(1 + len(scratch), len(x))
        stats[0] = lowest
        return stats
    # A row of -inf gets a finite peak, below that of any row that holds probability.
    peak = (x.amax(1).to(scratch.dtype) * bits).clamp_(min=lowest)
    z = torch.add(-peak.unsqueeze(1), x, alpha=bits, out=_part(scratch[0], *x.shape))
    if len(scratch) == 1:
        return torch.stack([peak, z.exp2_().sum(1)])
    power = torch.exp2(z.clamp_(min=ZERO_BITS), out=_part(scratch[1], *x.shape))
    return torch.stack([peak, power.sum(1), power.mul_(z).sum(1)])


def _rebase(stats: Tensor, peak: Tensor) -> Tensor:
    """total and moment relative to a higher peak: [2 or 3, ...] -> [1 or 2, ...]."""
    shift = (stats[0] - peak).clamp_(min=ZERO_BITS)
    sums = stats[1:] * shift.exp2()
    if len(sums) == 2:
        sums[1] += shift * sums[0]
    return sums


def _finish(
    stats: Tensor, target: Tensor, here: Tensor, bits: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor | None]]:
    """Statistics of this rank's columns and the target's logit (where it is ``here``) -> log-probs,
    entropy, and (peak, total, mean of z) over the whole vocabulary. Two collectives in all.
    """
    peak = stats[0].clone()
    if group is not None:
        # Tensor-parallel group, here and below: its ranks hold the other columns of these tokens,
        # and all of them compute these tokens' log-probs, so all reach both reductions.
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    target_z = torch.where(here, torch.add(-peak, target, alpha=bits), 0.0)
    sums = torch.cat([_rebase(stats, peak), target_z.unsqueeze(0)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, target_z = sums[0], sums[-1]
    log_total = total.log2()
    logprobs = (target_z - log_total) * LN2
    if len(sums) == 2:
        return logprobs, None, (peak, total, None)
    mean = sums[1] / total
    return logprobs, (log_total - mean) * LN2, (peak, total, mean)


def _gradient_factors(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    here: Tensor,
    temperature: float,
    peak: Tensor,
    total: Tensor,
    mean: Tensor | None,
) -> Tensor:
    """``at_target, peak, constant, slope`` of each row: [3 or 4, T], without entropy no slope.

    The gradient of the logits is ``2^z (constant + slope z)``, plus ``at_target`` at the target.
    """
    g = torch.zeros_like(total) if grad_logprobs is None else grad_logprobs.flatten() / temperature
    at_target = torch.where(here, g, 0.0)
    constant = -g / total
    if grad_entropy is None:
        return torch.stack([at_target, peak, constant])
    assert mean is not None, "a gradient of an entropy that was computed"
    # log p + entropy = ln2 (z - mean)
    slope = grad_entropy.flatten() * (-LN2 / temperature) / total
    return torch.stack([at_target, peak, constant - slope * mean, slope])


def _gradient(
    x: Tensor, grad: Tensor, column: Tensor, factors: Tensor, bits: float, scratch: Tensor
) -> None:
    """The gradient of logits ``x`` [R, V] into ``grad``, which may be ``x`` itself."""
    if x.shape[1] == 0:
        return
    at_target, peak, constant, *slope = factors.unsqueeze(2)
    # Rounded to the dtype of the logits once, at the end.
    wide = grad if grad.dtype == scratch.dtype else _part(scratch[1], *x.shape)
    torch.add(-peak, x, alpha=bits, out=wide)
    if not slope:
        wide.exp2_().mul_(constant)
    else:
        power = torch.exp2(wide.clamp_(min=ZERO_BITS), out=_part(scratch[0], *x.shape))
        torch.addcmul(constant, wide, slope[0], out=wide).mul_(power)
    wide.scatter_add_(1, column.unsqueeze(1), at_target)
    if wide is not grad:
        grad.copy_(wide)


def _bits(temperature: float) -> float:
    return 1 / (LN2 * temperature)


def _numel(sizes: dict[str, int], x: Tensor) -> int:
    return sizes.get(x.device.type, sizes["cuda"])


def _rows_in_cache(rows: Tensor) -> int:
    """Rows of a chunk: 1/64 of the logits at most (unless tiny), so that scratch stays small."""
    numel = min(_numel(CHUNK_NUMEL, rows), max(rows.numel() // 64, 2**16))
    return max(numel // rows.shape[1], 1)


def _scratch(like: Tensor, layers: int, numel: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(layers, numel, dtype=dtype, device=like.device)


def _part(flat: Tensor, rows: int, columns: int) -> Tensor:
    return flat[: rows * columns].view(rows, columns)


def _locate(index: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which indices [T] lie in the columns from ``start``, and their column (0 for the others)."""
    column = index - start
    inside = (column >= 0) & (column < columns)
    return inside, torch.where(inside, column, 0)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """``total += x @ y``, where ``total`` may be wider than the product."""
    if total.dtype == x.dtype:
        total.addmm_(x, y)
    else:
        total.add_(x @ y)


def _gather(hidden: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """The hidden states of all tokens, of which each rank has a slice if they are split."""
    if group is None or not sequence_parallel:
        return hidden
    full = hidden.new_empty(len(hidden) * dist.get_world_size(group), hidden.shape[1])
    # Tensor-parallel group: sequence parallelism gave each of its ranks a slice of the tokens
    # whose log-probs all of them compute.
    dist.all_gather_into_tensor(full, hidden.contiguous(), group=group)
    return full


def _reduce(grad: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum over the shards of the vocabulary; each rank keeps its own tokens if they are split."""
    if group is None:
        return grad
    # Tensor-parallel group: its ranks hold the same tokens' log-probs, so their backward passes
    # all come here, once.
    if not sequence_parallel:
        dist.all_reduce(grad, group=group)
        return grad
    mine = grad.new_empty(len(grad) // dist.get_world_size(group), grad.shape[1])
    dist.reduce_scatter_tensor(mine, grad, group=group)
    return mine
