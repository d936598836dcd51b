"""SAPO in miles, by the seam that it has from slime:

    --loss-type custom_loss --custom-loss-function-path sapo_megatron.patches.miles.policy_loss

Everything that :mod:`sapo_megatron.patches.slime` says holds here too.
"""

import importlib
from argparse import Namespace
from typing import Any

from torch import Tensor

from sapo_megatron.patches.replace import Host, Symbol
from sapo_megatron.patches.slime import POLICY_LOSS, TOKEN_LOSS, Reducer, ready, sapo_policy_loss

_LOSS = "miles.backends.training_utils.loss_hub.losses"

HOST = Host(
    title="miles",
    distribution="miles",
    module="miles",
    verified="0.1.0",
    oldest="0.1.0",
    symbols=(
        Symbol(_LOSS, "policy_loss_function", POLICY_LOSS),
        Symbol(_LOSS, "compute_policy_loss", TOKEN_LOSS),
        Symbol(
            _LOSS,
            "get_local_response_loss_masks",
            "total_lengths, response_lengths, loss_masks, qkv_format, max_seq_lens",
        ),
        Symbol(_LOSS, "get_parallel_state", ""),
    ),
)


def policy_loss(
    args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> tuple[Tensor, dict[str, Tensor]]:
    """miles' policy loss with SAPO's token loss: its sum, which miles scales, and metrics."""
    ready(HOST)
    losses = importlib.import_module(_LOSS)
    masks = losses.get_local_response_loss_masks(
        batch["total_lengths"],
        batch["response_lengths"],
        batch["loss_masks"],
        args.qkv_format,
        batch.get("max_seq_lens"),
    )
    cp = losses.get_parallel_state().cp
    cp_group = cp.group if cp.size > 1 else None
    return sapo_policy_loss(losses, masks, cp_group, args, batch, logits, sum_of_sample_mean)
