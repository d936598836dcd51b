"""SAPO in NeMo-RL: a loss function of its protocol, and the swap that ``setup`` hands out.

    python -m sapo_megatron.patches nemo_rl -- examples/run_grpo.py --config ... --loss_type sapo

:class:`SapoLoss` has two of the host's ``ClippedPGLossFn``, and no formula of its own. One gets no
advantages: what is left of it is the KL, the log-likelihood of positive examples, and the host's
metrics. The other gets SAPO's token loss: with ``disable_ppo_ratio`` the host's policy term is
linear in what it takes for log-probs, so with advantages of -1 it is the mean of the token losses,
with the host's importance-sampling correction, masks and denominators.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapo_megatron.errors import UserError
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.objective.sapo import sapo_loss
from sapo_megatron.patches.measure import PER_SEQUENCE, PER_TOKEN, log_variance, measure_rows
from sapo_megatron.patches.replace import Host, Symbol, check, replace, restore
from sapo_megatron.recipe.schema import AlgorithmConfig

logger = logging.getLogger(__name__)

_LOSS = "nemo_rl.algorithms.loss.loss_functions"
SETUP = Symbol(
    "nemo_rl.algorithms.grpo",
    "setup",
    "master_config, tokenizer, dataset, val_dataset, processor, policy_factory",
)
INIT = Symbol(_LOSS, "ClippedPGLossFn.__init__", "self, cfg, use_fused_linear_logprobs")
HOST = Host(
    title="NeMo-RL",
    distribution="nemo-rl",
    module="nemo_rl",
    verified="0.6.0",
    oldest="0.6.0",
    symbols=(
        SETUP,
        INIT,
        Symbol(
            _LOSS,
            "ClippedPGLossFn.__call__",
            "self, next_token_logprobs, data, global_valid_seqs, global_valid_toks",
        ),
    ),
)

REFUSED = {
    "disable_ppo_ratio": (False, "SAPO's gate is a function of that ratio"),
    "use_cispo": (False, "CISPO is another loss"),
    "sequence_level_importance_ratios": (False, "SAPO's ratio is a token's"),
    "ratio_clip_c": (None, "SAPO has no dual clip"),
}
"""Options of the host's loss that contradict SAPO: what they must be, and why."""


class SapoLoss:
    """NeMo-RL's ``LossFunction``: SAPO's token loss in the place of the clipped one.

    ``cfg``: the host's ``ClippedPGLossConfig``, whose ``ratio_clip_min`` and ``ratio_clip_max``
    have no meaning here. With ``token_level_loss`` off it is the paper's mean over sequences of
    token means. Ray pickles it; the workers need this package too.
    """

    def __init__(
        self, cfg: Any, use_fused_linear_logprobs: bool = False, *, algorithm: AlgorithmConfig
    ) -> None:
        refuse(cfg)
        self.temperatures = algorithm.temperatures
        clipped = importlib.import_module(_LOSS).ClippedPGLossFn
        rest = cfg.model_copy(update={"disable_ppo_ratio": True})
        alone = {
            "force_on_policy_ratio": False,
            "reference_policy_kl_penalty": 0.0,
            "positive_example_nll_weight": 0.0,
        }
        with _building():
            self.rest = clipped(rest, use_fused_linear_logprobs)
            self.mean = clipped(rest.model_copy(update=alone))
        self.force_on_policy_ratio = cfg.force_on_policy_ratio
        # What the host reads of a loss.
        self.loss_type = self.rest.loss_type
        self.input_type = self.rest.input_type
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.reference_policy_kl_penalty = self.rest.reference_policy_kl_penalty
        normalizer = importlib.import_module("nemo_rl.algorithms.loss.interfaces").MetricNormalizer
        self.metric_normalizations = {
            **self.rest.metric_normalizations,
            **dict.fromkeys(PER_TOKEN, normalizer.TOKENS),
            **dict.fromkeys(PER_SEQUENCE, normalizer.SEQUENCES),
            "sapo/bound_violations": normalizer.NONE,
        }

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """This piece's share of the global loss, 0-dim, and metrics that add up over pieces."""
        denominators = (global_valid_seqs, global_valid_toks)
        logprob = next_token_logprobs
        mask = (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)).bool()
        advantages = data["advantages"][:, 1:]
        old = logprob.detach() if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        r = Ratio.of(logprob - old, advantages, mask)
        token_loss = sapo_loss(r, self.temperatures)

        without = {**data, "advantages": torch.zeros_like(data["advantages"])}
        rest, metrics = self.rest(torch.where(mask, logprob, 0.0), without, *denominators)
        of_losses = {
            "token_mask": data["token_mask"],
            "sample_mask": data["sample_mask"],
            "generation_logprobs": data["generation_logprobs"],
            "prev_logprobs": F.pad(old, (1, 0)),
            "advantages": torch.full_like(data["advantages"], -1),
        }
        policy, _ = self.mean(token_loss, of_losses, *denominators)
        loss = rest + policy
        metrics |= self._measured(r, *denominators)
        for name in [name for name in metrics if name.startswith("probs_ratio_clamped")]:
            del metrics[name]
        return loss, {**metrics, "loss": loss.item()}

    def _measured(
        self, r: Ratio, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> dict[str, float]:
        """``ratio/*``, ``sapo/*``, and the host's names for the ratio, as its driver adds them."""
        found = measure_rows(r, self.temperatures)
        tokens, sequences = global_valid_toks.clamp(min=1), global_valid_seqs.clamp(min=1)
        numbers = {
            **{name: found.means[name].total / tokens for name in PER_TOKEN},
            **{name: found.means[name].total / sequences for name in PER_SEQUENCE},
            "sapo/bound_violations": found.violations,
            "probs_ratio_min": found.ratio_min,
            "probs_ratio_max": found.ratio_max,
        }
        numbers["probs_ratio"] = numbers["ratio/mean"]
        return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def install(algorithm: AlgorithmConfig) -> None:
    """From now on ``nemo_rl.algorithms.grpo.setup`` hands out SAPO's loss.

    A ``ClippedPGLossFn`` that is built anywhere else in this process raises UserError.
    """
    check(HOST)
    replace(HOST, SETUP, functools.partial(_with_sapo, algorithm=algorithm))
    replace(HOST, INIT, _guarded)


def uninstall() -> None:
    """Put NeMo-RL's own functions back."""
    restore(SETUP, INIT)


def refuse(cfg: Any) -> None:
    """Raises UserError for options of the host's loss that contradict SAPO."""
    for name, (expected, why) in REFUSED.items():
        found = getattr(cfg, name)
        if found != expected:
            raise UserError(
                f"loss_fn.{name}: expected {expected} with --loss_type sapo, got {found}; {why}, "
                f"set it to {expected}"
            )


def _with_sapo(
    setup: Callable[..., tuple],
    master_config: Any,
    *args: Any,
    algorithm: AlgorithmConfig,
    **kwargs: Any,
) -> tuple:
    cfg = master_config.loss_fn
    SapoLoss(cfg, algorithm=algorithm)  # refuses before anything is started
    if cfg.token_level_loss:
        logger.warning(
            "loss_fn.token_level_loss is on: SAPO's token losses are averaged over tokens, "
            "the paper's over sequences"
        )
    with _building():
        parts = setup(master_config, *args, **kwargs)
    clipped = importlib.import_module(_LOSS).ClippedPGLossFn
    if sum(isinstance(part, clipped) for part in parts) != 1:
        raise UserError(
            f"{SETUP}: expected one ClippedPGLossFn in what it returns, got "
            f"{[type(part).__name__ for part in parts]}; take {HOST.verified}"
        )
    ours = []
    for part in parts:
        if isinstance(part, clipped):
            part = SapoLoss(cfg, part.use_fused_linear_logprobs, algorithm=algorithm)
        elif hasattr(part, "log_metrics"):
            part.log_metrics = functools.partial(_with_variance, part.log_metrics)
        ours.append(part)
    return tuple(ours)


def _with_variance(
    log_metrics: Callable[..., None], metrics: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """The host's logger, which gets ``ratio/log_var`` made of the reduced moments."""
    if "ratio/log_square" in metrics:
        metrics = {**metrics, "ratio/log_var": log_variance(metrics)}
    log_metrics(metrics, *args, **kwargs)


def _guarded(
    init: Callable[..., None], self: Any, cfg: Any, use_fused_linear_logprobs: bool = False
) -> None:
    if not _allowed:
        raise UserError(
            f"--loss_type sapo: expected a script that takes its loss from {SETUP}, got one "
            f"that builds a ClippedPGLossFn; run examples/run_grpo.py or its like"
        )
    init(self, cfg, use_fused_linear_logprobs)


_allowed: list[None] = []


@contextmanager
def _building() -> Iterator[None]:
    """Where a ClippedPGLossFn may be built although SAPO is installed."""
    _allowed.append(None)
    try:
        yield
    finally:
        _allowed.pop()
