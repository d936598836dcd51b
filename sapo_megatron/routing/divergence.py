"""How far the routers' choices for the same tokens lie apart.

Two readings of the same tokens are compared: by the old and the current policy, or by the rollout
and the training engine. A piece of the batch (a micro-batch, a pipeline stage, a rank) contributes
sums over its tokens and layers, so nothing depends on how the batch was cut.

Shape legend: M layers with experts on this rank, N tokens that its routers see, P of them whose
router probabilities were kept, k experts per token, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo_megatron.metrics import Histogram, MaxViolation, Mean, Metrics
from sapo_megatron.sample import Routes


def flips(old: Tensor, new: Tensor) -> Tensor:
    """How many of the experts ``old [..., k]`` are not among ``new [..., k]``: int ``[...]``."""
    return (old.unsqueeze(-1) != new.unsqueeze(-2)).all(-1).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the L1 distance of distributions ``[..., E]``, in [0, 1]: ``[...]``."""
    return (p - q).abs().sum(-1) / 2


def router_shift(old_probs: Tensor, new_probs: Tensor, old_experts: Tensor) -> Tensor:
    """Mean over the old experts of ``|log p_new - log p_old|``, nats: ``[...]`` from ``[..., E]``.

    The exponent of RSPO's shift factor in one layer (arXiv 2510.23027).
    """
    experts = old_experts.long()
    tiny = torch.finfo(torch.float32).tiny
    old = old_probs.gather(-1, experts).clamp(min=tiny).log()
    new = new_probs.gather(-1, experts).clamp(min=tiny).log()
    return (new - old).abs().mean(-1)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What one rank's layers say of a micro-batch."""

    metrics: Metrics
    """``slot_flip``, the share of the k experts of a token and layer that differ, and ``tv``, over
    all layers and by layer; ``router_flip``, the share of tokens and layers whose set differs (the
    rate of arXiv 2510.11370), which is up to k times as large."""
    layers_flipped: Tensor
    """int32 [N]: layers of this rank in which a token's experts changed."""
    shift: Tensor | None
    """fp32 [P]: sum of ``router_shift`` over this rank's layers."""


def compare(
    old: Routes,
    new: Routes,
    *,
    layers: Sequence[int],
    mask: Tensor,
    kept: Tensor,
    prefix: str,
) -> Divergence:
    """What differs between two readings of the same micro-batch.

    ``layers``: numbers of the M layers. ``mask`` bool [N]: tokens that count. ``kept`` int [P]:
    the tokens (all of which count) of ``Routes.probs``.
    """
    metrics = Metrics()
    layers_flipped = torch.zeros(len(mask), dtype=torch.int32, device=mask.device)
    for i, layer in enumerate(layers):
        flipped = flips(old.experts[:, i], new.experts[:, i])
        layers_flipped += flipped > 0
        share = Mean.of(flipped / old.experts.shape[-1], mask)
        metrics.add(f"{prefix}/router_flip", Mean.of(flipped > 0, mask))
        metrics.add(f"{prefix}/slot_flip", share)
        metrics.add(f"{prefix}/slot_flip/layer_{layer}", share)
        if new.replaced is not None:
            replaced = Mean.of(new.replaced[:, i] / new.experts.shape[-1], mask)
            metrics.add(f"{prefix}/replay_replaced", replaced)
    if old.probs is None or new.probs is None:
        return Divergence(metrics=metrics, layers_flipped=layers_flipped, shift=None)
    shift = torch.zeros(len(kept), device=mask.device)
    for i, layer in enumerate(layers):
        tv = Mean.of(total_variation(old.probs[:, i], new.probs[:, i]))
        metrics.add(f"{prefix}/tv", tv)
        metrics.add(f"{prefix}/tv/layer_{layer}", tv)
        shift += router_shift(old.probs[:, i], new.probs[:, i], old.experts[kept, i])
    return Divergence(metrics=metrics, layers_flipped=layers_flipped, shift=shift)


def token_metrics(
    layers_flipped: Tensor, mask: Tensor, shift: Tensor | None, *, num_layers: int, prefix: str
) -> Metrics:
    """``token_flip_share``, ``layers_flipped`` and ``shift_factor``, once all layers are added up.

    ``layers_flipped`` [T] with ``mask`` bool [T]; ``shift`` fp32 [P], the sum of ``router_shift``
    over all ``num_layers`` layers with experts, of the tokens at which it is known.
    """
    metrics = Metrics()
    metrics.add(f"{prefix}/token_flip_share", Mean.of(layers_flipped > 0, mask))
    metrics.add(f"{prefix}/layers_flipped", Mean.of(layers_flipped, mask))
    edges = tuple(float(i) for i in range(num_layers + 2))
    metrics.add(f"{prefix}/hist_layers_flipped", Histogram.of(layers_flipped, edges, mask))
    if shift is not None:
        metrics.add(f"{prefix}/shift_factor", Mean.of((-shift / num_layers).exp()))
    return metrics


def load_metrics(
    routes: Routes,
    *,
    layers: Sequence[int],
    places: Sequence[int],
    num_layers: int,
    num_experts: int,
    mask: Tensor,
    prefix: str,
) -> Metrics:
    """``max_violation``: by how much the busiest expert exceeds the mean, of ``mask``'s tokens.

    ``places``: where this rank's ``layers`` stand among the ``num_layers`` with experts.
    """
    metrics = Metrics()
    counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=mask.device)
    # All layers at once, since the host waits for each count: expert e of layer i is i E + e.
    first = num_experts * torch.arange(len(layers), device=mask.device)[:, None]
    numbered = (routes.experts[mask] + first).flatten()
    found = torch.bincount(numbered, minlength=num_experts * len(layers))
    counts[list(places)] = found.view(len(layers), num_experts)
    for place, layer in zip(places, layers, strict=True):
        metrics.add(f"{prefix}/max_violation/layer_{layer}", MaxViolation(counts[place, None]))
    metrics.add(f"{prefix}/max_violation", MaxViolation(counts))
    return metrics
