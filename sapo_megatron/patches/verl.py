"""SAPO in verl: the policy loss ``sapo_megatron``, beside verl's own.

verl imports this module in every worker, with ``VERL_USE_EXTERNAL_MODULES`` or
``actor_rollout_ref.model.external_lib`` set to ``sapo_megatron.patches.verl``, and so registers the
loss; ``actor_rollout_ref.actor.policy_loss.loss_mode=sapo_megatron`` chooses it. Nothing of verl is
replaced: its KL and entropy terms and its importance weights come from where they always come.
"""

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor

from sapo_megatron.errors import UserError
from sapo_megatron.objective.ratio import Ratio, masked
from sapo_megatron.objective.sapo import sapo_loss
from sapo_megatron.patches.measure import Measured, log_variance, measure_rows
from sapo_megatron.patches.replace import Host, Symbol, check
from sapo_megatron.sample import Temperatures

logger = logging.getLogger(__name__)

LOSS_MODE = "sapo_megatron"
SEQUENCE_MEAN = "seq-mean-token-mean"

_ALGOS = "verl.trainer.ppo.core_algos"

HOST = Host(
    title="verl",
    distribution="verl",
    module="verl",
    verified="0.9.1",
    oldest="0.9.0",
    symbols=(
        Symbol(_ALGOS, "register_policy_loss", "name"),
        Symbol(_ALGOS, "get_policy_loss_fn", "name"),
        Symbol(
            _ALGOS,
            "compute_policy_loss_vanilla",
            "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, "
            "rollout_is_weights",
        ),
        Symbol(
            _ALGOS,
            "agg_loss",
            "loss_mat, loss_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, "
            "loss_scale_factor",
        ),
        Symbol("verl.workers.utils.losses", "ppo_loss", "config, model_output, data, dp_group"),
    ),
)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = SEQUENCE_MEAN,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss of a micro-batch, and what its dashboard gets of it.

    Tensors [B, L], one response per row. The temperatures are ``config.tau_pos`` and
    ``config.tau_neg``; the token losses are those of
    :func:`~sapo_megatron.objective.sapo.sapo_token_loss` times ``rollout_is_weights``, and verl's
    own ``agg_loss`` reduces them, so every ``loss_agg_mode`` of verl means what it means for its
    other losses.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    if loss_agg_mode != SEQUENCE_MEAN:
        _warn_of_mode(loss_agg_mode)
    temperatures = Temperatures(config.tau_pos, config.tau_neg)
    mask = response_mask.bool()
    r = Ratio.of(log_prob - old_log_prob, advantages, mask)
    token_loss = sapo_loss(r, temperatures)
    if rollout_is_weights is not None:
        token_loss = token_loss * masked(rollout_is_weights, mask)
    loss = agg_loss(
        loss_mat=token_loss, loss_mask=mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
    )
    return loss, _report(measure_rows(r, temperatures), temperatures)


def install() -> None:
    """Register the loss; twice is as once.

    Raises UserError for a verl that does not fit, and where another loss has the name.
    """
    check(HOST)
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss

    found = POLICY_LOSS_REGISTRY.get(LOSS_MODE, policy_loss)
    if found is not policy_loss:
        raise UserError(
            f"{LOSS_MODE}: expected no policy loss of that name in verl, got that of "
            f"{found.__module__}; register one of the two"
        )
    register_policy_loss(LOSS_MODE)(policy_loss)


def uninstall() -> None:
    """Take the loss out of verl's registry; nothing happens where it is not there."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    if POLICY_LOSS_REGISTRY.get(LOSS_MODE) is policy_loss:
        del POLICY_LOSS_REGISTRY[LOSS_MODE]


@functools.cache
def _warn_of_mode(mode: str) -> None:
    """Warn, once per process: verl's own ``sapo`` takes the sequence mean whatever the mode."""
    logger.warning("loss_agg_mode %s: SAPO's own average is %s", mode, SEQUENCE_MEAN)


def _report(measured: Measured, temperatures: Temperatures) -> dict[str, float]:
    """One finite number per name for every micro-batch.

    verl averages over data-parallel ranks and micro-batches with equal weights, needs the same
    names from all of them, and a NaN of one would be the NaN of all. So what has no token here
    gets the value it has at a ratio of 1.
    """
    at_rest = {
        "ratio/mean": 1.0,
        "sapo/gate_mean": 2 / temperatures.pos,
        "sapo/gate_pos_mean": 2 / temperatures.pos,
        "sapo/gate_neg_mean": 2 / temperatures.neg,
        "sapo/weight_mean": 1.0,
    }
    names = sorted(measured.means)
    parts = [measured.means[name] for name in names]
    others = torch.stack([measured.violations, measured.ratio_min, measured.ratio_max])
    # One transfer from the device for all.
    totals, counts = torch.stack([part.pair() for part in parts]).T.tolist()
    violations, smallest, largest = others.tolist()
    report = {
        name: total / count if count else at_rest.get(name, 0.0)
        for name, total, count in zip(names, totals, counts, strict=True)
    }
    some = counts[names.index("ratio/mean")] > 0
    report["ratio/log_var"] = log_variance(report)
    report["ratio/min"] = smallest if some else 1.0
    report["ratio/max"] = largest if some else 1.0
    report["sapo/bound_violations"] = violations
    report["actor/ppo_kl"] = -report["ratio/log_mean"]
    return report


# Imported by verl, rather than by someone who asks what it needs.
if "verl" in sys.modules:
    install()
