"""SAPO in slime, by its seam for custom losses:

    --loss-type custom_loss --custom-loss-function-path sapo_megatron.patches.slime.policy_loss

with a dot before the function: slime's loader knows no colon. ``tau_pos`` and ``tau_neg`` come from
the YAML file of ``--custom-config-path``, whose keys slime puts among its arguments.

slime's custom loss takes the place of its whole policy loss. This one calls that policy loss, and
for the time of the call puts SAPO's token loss where it looks up its clipped one. So log-probs,
entropy, KL, importance-sampling correction, masks, reducers and debug dumps are the host's own.
"""

import functools
import importlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.errors import UserError
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.objective.sapo import sapo_gate, sapo_loss, sapo_weight, token_temperature
from sapo_megatron.patches.measure import PER_SEQUENCE, Part, measure
from sapo_megatron.patches.replace import Host, Symbol, check
from sapo_megatron.recipe.schema import AlgorithmConfig
from sapo_megatron.sample import Temperatures

logger = logging.getLogger(__name__)

POLICY_LOSS = "args, batch, logits, sum_of_sample_mean"
TOKEN_LOSS = "ppo_kl, advantages, eps_clip, eps_clip_high, eps_clip_c"
_LOSS = "slime.backends.megatron_utils.loss"
_CP_UTILS = "slime.backends.megatron_utils.cp_utils"

HOST = Host(
    title="slime",
    distribution="slime",
    module="slime",
    verified="0.3.1",
    oldest="0.3.1",
    symbols=(
        Symbol(_LOSS, "policy_loss_function", POLICY_LOSS),
        Symbol(_LOSS, "compute_policy_loss", TOKEN_LOSS),
        Symbol(_CP_UTILS, "slice_log_prob_with_cp", "log_prob, total_length, response_length"),
    ),
)

Reducer = Callable[[Tensor], Tensor]

ready = functools.cache(check)
"""Checks a host once per process. Raises UserError for one that does not fit."""


def policy_loss(
    args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's policy loss with SAPO's token loss: its sum, which slime scales, and metrics."""
    ready(HOST)
    loss = importlib.import_module(_LOSS)
    slice_with_cp = importlib.import_module(_CP_UTILS).slice_log_prob_with_cp
    samples = zip(
        batch["loss_masks"], batch["total_lengths"], batch["response_lengths"], strict=True
    )
    masks = [slice_with_cp(mask, total, response) for mask, total, response in samples]
    split = loss.mpu.get_context_parallel_world_size() > 1
    cp_group = loss.mpu.get_context_parallel_group() if split else None
    return sapo_policy_loss(loss, masks, cp_group, args, batch, logits, sum_of_sample_mean)


def sapo_policy_loss(
    module: ModuleType,
    masks: list[Tensor],
    cp_group: dist.ProcessGroup | None,
    args: Namespace,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Reducer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``module.policy_loss_function`` with SAPO in the place of its ``compute_policy_loss``.

    ``masks``: of each sample, the part of its loss mask whose tokens this rank has.
    """
    refuse(args)
    temperatures = temperatures_of(args)
    announce(temperatures)
    mask = torch.cat(masks).to(logits.device).bool()
    seen: list[Ratio] = []

    def token_loss(
        ppo_kl: Tensor,
        advantages: Tensor,
        eps_clip: float,
        eps_clip_high: float,
        eps_clip_c: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        r = Ratio.of(-ppo_kl, advantages, mask)
        seen.append(r)
        return sapo_loss(r, temperatures), 1 - token_values(r, temperatures)["sapo/weight_mean"]

    with exchanged(module, "compute_policy_loss", token_loss):
        loss, reported = module.policy_loss_function(args, batch, logits, sum_of_sample_mean)
    if len(seen) != 1:
        raise UserError(
            f"{module.__name__}.policy_loss_function: expected one call of compute_policy_loss, "
            f"got {len(seen)}; take the version that docs/patches/slime-miles.md names"
        )
    reported |= dashboard(
        seen[0], masks, batch["loss_masks"], sum_of_sample_mean, cp_group, temperatures
    )
    return loss, reported


def refuse(args: Namespace) -> None:
    """Raises UserError for arguments that make another loss than SAPO."""
    if args.advantage_estimator in ("gspo", "cispo"):
        raise UserError(
            f"--advantage-estimator: expected grpo or another estimator of advantages, got "
            f"{args.advantage_estimator}, which is a loss of its own; drop one of the two losses"
        )
    if (bound := vars(args).get("eps_clip_c")) is not None:
        raise UserError(
            f"--eps-clip-c: expected none, got {bound}; SAPO has no dual clip, leave it out"
        )


def temperatures_of(args: Namespace) -> Temperatures:
    """``tau_pos`` and ``tau_neg`` of the arguments, or SAPO's own. Raises UserError for others."""
    given = vars(args)
    pos = given.get("tau_pos", AlgorithmConfig.tau_pos)
    neg = given.get("tau_neg", AlgorithmConfig.tau_neg)
    try:
        return Temperatures(pos, neg)
    except (TypeError, ValueError):
        raise UserError(
            f"tau_pos, tau_neg: expected two numbers > 0 in --custom-config-path, got {pos!r}, "
            f"{neg!r}; write them as 1.0 and 1.05"
        ) from None


@torch.no_grad()
def token_values(r: Ratio, temperatures: Temperatures) -> dict[str, Tensor]:
    """The value of each token, of the ratio's shape, of every metric that is a mean over tokens."""
    tau = token_temperature(r.advantages, temperatures)
    return {
        "ratio/mean": r.ratio,
        "ratio/log_mean": r.log_ratio,
        "ratio/log_square": r.log_ratio.square(),
        "sapo/gate_mean": sapo_gate(r.ratio, tau),
        "sapo/weight_mean": sapo_weight(r.ratio, tau),
    }


@torch.no_grad()
def dashboard(
    r: Ratio,
    masks: list[Tensor],
    whole_masks: list[Tensor],
    sum_of_sample_mean: Reducer,
    cp_group: dist.ProcessGroup | None,
    temperatures: Temperatures,
) -> dict[str, Tensor]:
    """``ratio/*`` and ``sapo/*`` of a micro-batch, as the host adds and divides them.

    Tokens are weighed as in the host's loss. What is not a sum over tokens is made of the
    micro-batch and weighed with all its tokens: ``ratio/log_var`` is the variance within
    micro-batches. Collective over ``cp_group``, whose ranks hold parts of the same samples.
    """
    values = token_values(r, temperatures)
    reported = {name: sum_of_sample_mean(value) for name, value in values.items()}

    z = values["ratio/log_mean"]
    whole = torch.stack([sum_of_sample_mean(torch.ones_like(z)), reported["ratio/log_mean"]])
    if cp_group is not None:
        # Context-parallel group: its ranks hold slices of the same micro-batch, tokens or not.
        dist.all_reduce(whole, group=cp_group)
    weight, total = whole
    center = total / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    reported["ratio/log_var"] = sum_of_sample_mean((z - center).square())

    device = r.mask.device
    sizes = torch.tensor([len(part) for part in masks], device=device)
    measured = measure(
        r,
        temperatures,
        torch.arange(len(masks), device=device).repeat_interleave(sizes),
        torch.stack([part.sum() for part in whole_masks]).to(device).long(),
        cp_group,
    )
    parts = {name: measured.means[name] for name in PER_SEQUENCE}
    count = parts["sapo/bound_lhs"].count
    parts["sapo/bound_violation_share"] = Part(measured.violations, count)
    reported |= {name: weight * part.total / count.clamp(min=1) for name, part in parts.items()}
    return reported


@contextmanager
def exchanged(module: ModuleType, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """``ours`` is what ``module`` finds by ``name``, until the block ends."""
    original = getattr(module, name)
    setattr(module, name, ours)
    try:
        yield
    finally:
        setattr(module, name, original)


@functools.cache
def announce(temperatures: Temperatures) -> None:
    """Log them, once per process: a misspelt name in the YAML file leaves a default unnoticed."""
    logger.info("SAPO: tau_pos %s, tau_neg %s", temperatures.pos, temperatures.neg)
