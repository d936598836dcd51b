"""Every gate over the tokens of a dump: how much gradient it keeps, and in which direction.

The gradient of a loss with respect to the log-prob of a token is ``-c w r A``: c the token's weight
in the aggregation (:func:`~sapo_megatron.objective.reduce.token_weights`), r the ratio, A the
advantage, and w what is left for the gate to decide; the plain policy gradient has w = 1. Here w
comes from the losses that train, by autograd, in fp64. Tokens with A = 0 have no gradient under any
gate and therefore no weight.

Shape legend: N valid tokens, S sequences, K gates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sapo_megatron.commands.gates.gate import Gate
from sapo_megatron.errors import UserError
from sapo_megatron.metrics import EffectiveSampleSize, Variance
from sapo_megatron.objective.ratio import safe_log_ratio
from sapo_megatron.objective.reduce import token_weights
from sapo_megatron.objective.sapo import sapo_weight
from sapo_megatron.runs.dump import Dump
from sapo_megatron.sample import Denominators

LARGEST_TAU = 2.0**20
"""Ratios that differ less than about 1e-6 from 1 are rounding: no temperature is fitted to them."""
BISECTIONS = 60


@dataclass(frozen=True)
class BySign:
    """A number over all tokens with an advantage, and by its sign; NaN where there is none."""

    all: float
    pos: float
    neg: float

    @classmethod
    def of(cls, number: Callable[[Tensor], float], advantages: Tensor) -> Self:
        """``number`` of each of the three masks over tokens, bool [N]."""
        return cls(number(advantages != 0), number(advantages > 0), number(advantages < 0))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one gate does."""

    gate: Gate
    weights: Tensor
    """w of each token, fp64 [N]; NaN where A = 0."""
    weight: BySign
    """Mean of w over tokens."""
    mass_kept: BySign
    """sum |c w r A| / sum |c r A|: the share of the gradient's mass that is left."""
    ess: float
    """Effective sample size of the tokens' factors w r, as a share of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tokens for which this many layers, from ``low`` to ``high``, chose other experts."""

    low: int
    high: int
    tokens: int
    log_ratio_var: float
    weight: tuple[float, ...]
    """Mean of w, for each gate."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Temperatures of SAPO at which the mean weight is ``attenuation``; None where none is."""

    attenuation: float
    tau_pos: float | None
    tau_neg: float | None
    tau_pos_small_variance: float | None
    """From the variance of log r alone, see :func:`small_variance_tau`."""
    tau_neg_small_variance: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What :func:`compare` found out about N tokens and K gates."""

    dump: Dump
    ratio: Tensor
    """fp64 [N]."""
    advantages: Tensor
    """fp64 [N]."""
    log_ratio_var: BySign
    """Population variance of log r; ``all`` includes tokens with A = 0."""
    effects: tuple[Effect, ...]
    cosine: Tensor
    """fp64 [K, K]: between the gradients of two gates in the space of log-probs; NaN for a gate
    that leaves no gradient."""
    buckets: tuple[Bucket, ...]
    """By layers changed, without empty ones; none where the dump does not know."""
    suggestion: Suggestion


def compare(dump: Dump, gates: Sequence[Gate], attenuation: float) -> Comparison:
    """Compare at least one gate on a dump, with ``attenuation`` in (0, 1) as the wanted weight.

    Tokens of several mini-batches count as one larger mini-batch. Raises UserError for a dump in
    which every advantage is 0, and for an aggregation that is not known.
    """
    valid = dump.rows.mask
    sequence_ids = dump.sequence_ids[valid]
    logprob, old_logprob = dump.rows.logprob[valid].double(), dump.rows.old_logprob[valid].double()
    advantages = dump.rows.advantage[valid].double()
    learns = advantages != 0
    if not learns.any():
        raise UserError(
            f"{dump.files} file(s): expected a token with an advantage, got 0 for all "
            f"{len(advantages)} (no gate has a gradient there); name the dumps of another step"
        )
    log_ratio = safe_log_ratio(logprob - old_logprob, None)
    ratio = log_ratio.exp()
    plain = _aggregation(dump) * ratio * advantages

    effects = []
    for gate in gates:
        weights = gate.weights(logprob, old_logprob, advantages, sequence_ids, dump.lengths)
        effects.append(_effect(gate, weights, ratio, advantages, plain))
    gradients = torch.stack([(effect.weights * plain)[learns] for effect in effects])
    norms = gradients.norm(dim=1)

    return Comparison(
        dump=dump,
        ratio=ratio,
        advantages=advantages,
        log_ratio_var=BySign(
            _variance(log_ratio),
            _variance(log_ratio[advantages > 0]),
            _variance(log_ratio[advantages < 0]),
        ),
        effects=tuple(effects),
        cosine=(gradients @ gradients.T / torch.outer(norms, norms)).clamp(-1, 1),
        buckets=_buckets(dump, log_ratio, effects),
        suggestion=_suggest(log_ratio, advantages, attenuation),
    )


def suggest_tau(ratio: Tensor, attenuation: float) -> float | None:
    """The temperature at which the mean of SAPO's weight over ``ratio`` [n] is ``attenuation``.

    The mean falls with the temperature, from 1 to the share of ratios that are exactly 1. None
    where no temperature up to ``LARGEST_TAU`` attenuates as much. By bisection.
    """

    def mean_weight(log_tau: float) -> float:
        return sapo_weight(ratio, math.exp(log_tau)).mean().item()

    high = math.log(LARGEST_TAU)
    if not ratio.numel() or mean_weight(high) > attenuation:
        return None
    low = -high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_weight(middle) > attenuation else (low, middle)
    return math.exp((low + high) / 2)


def small_variance_tau(log_ratio_var: float, attenuation: float) -> float | None:
    """The same to first order in the variance of log r: ``2 sqrt((1 - attenuation) / Var)``.

    For log r small and centred at 0, ``w = sech^2(tau (r - 1) / 2)`` is about ``1 - tau^2 / 4 (log
    r)^2``, so its mean is about ``1 - tau^2 / 4 Var``. None where the variance is 0 or unknown.
    """
    return 2 * math.sqrt((1 - attenuation) / log_ratio_var) if log_ratio_var > 0 else None


def _aggregation(dump: Dump) -> Tensor:
    """The weight of each valid token in the loss, fp64 [N]."""
    valid = dump.rows.mask
    try:
        return token_weights(
            valid,
            dump.sequence_ids,
            dump.lengths,
            Denominators(sequences=int((dump.lengths > 0).sum()), tokens=int(dump.lengths.sum())),
            dump.settings.loss_agg_mode,
            max_response_length=int(dump.lengths.max()),  # a common factor, which cancels
        )[valid]
    except ValueError as error:
        raise UserError(f"dump: {error}; read it with the release that wrote it") from None


def _effect(
    gate: Gate, weights: Tensor, ratio: Tensor, advantages: Tensor, plain: Tensor
) -> Effect:
    def kept(where: Tensor) -> float:
        mass = plain[where].abs()
        return ((weights[where].abs() * mass).sum() / mass.sum()).item()

    return Effect(
        gate=gate,
        weights=weights,
        weight=BySign.of(lambda where: weights[where].mean().item(), advantages),
        mass_kept=BySign.of(kept, advantages),
        ess=EffectiveSampleSize.of(weights * ratio, advantages != 0).value(),
    )


def _variance(log_ratio: Tensor) -> float:
    return Variance.of(log_ratio).value()


def _buckets(dump: Dump, log_ratio: Tensor, effects: Sequence[Effect]) -> tuple[Bucket, ...]:
    """0, 1, 2, 3 to 4, 5 to 8, ... layers."""
    changed = dump.rows.layers_changed[dump.rows.mask]
    tops = [0, *(2**i for i in range(16))]
    buckets = []
    for below, top in zip([-1, *tops], tops, strict=False):
        inside = (changed > below) & (changed <= top)
        if inside.any():
            bucket = Bucket(
                low=below + 1,
                high=top,
                tokens=int(inside.sum()),
                log_ratio_var=_variance(log_ratio[inside]),
                weight=tuple(effect.weights[inside].nanmean().item() for effect in effects),
            )
            buckets.append(bucket)
    return tuple(buckets)


def _suggest(log_ratio: Tensor, advantages: Tensor, attenuation: float) -> Suggestion:
    pos, neg = log_ratio[advantages > 0], log_ratio[advantages < 0]
    return Suggestion(
        attenuation=attenuation,
        tau_pos=suggest_tau(pos.exp(), attenuation),
        tau_neg=suggest_tau(neg.exp(), attenuation),
        tau_pos_small_variance=small_variance_tau(_variance(pos), attenuation),
        tau_neg_small_variance=small_variance_tau(_variance(neg), attenuation),
    )
