"""A stand-in for what the patch takes of NeMo-RL, with its signatures; not taken from it.

It stands in ``sys.modules`` under all names that the patch imports.
"""

import enum
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import torch


def stand_in(set_module):
    """Puts this file where NeMo-RL would be, by ``set_module(name, module)``."""
    top = ModuleType("nemo_rl")
    top.__version__ = "0.6.0+7ea279a"
    top.__path__ = []
    set_module("nemo_rl", top)
    set_module("nemo_rl.algorithms.grpo", sys.modules[__name__])
    for name in ("", ".loss", ".loss.loss_functions", ".loss.interfaces"):
        module = ModuleType(f"nemo_rl.algorithms{name}")
        module.ClippedPGLossFn = ClippedPGLossFn
        module.MetricNormalizer = MetricNormalizer
        set_module(module.__name__, module)


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


@dataclass
class ClippedPGLossConfig:
    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.0
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0

    def model_copy(self, *, update):
        return replace(self, **update)


class ClippedPGLossFn:
    input_type = LossInputType.LOGPROB

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        self.cfg = cfg
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.reference_policy_kl_penalty = cfg.reference_policy_kl_penalty
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        self.metric_normalizations = {"probs_ratio": MetricNormalizer.TOKENS}

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        cfg, logprob = self.cfg, next_token_logprobs
        token_mask, rows = data["token_mask"][:, 1:], data["sample_mask"]
        mask = token_mask * rows[:, None]
        advantages = data["advantages"][:, 1:]
        old = logprob.detach() if cfg.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        rollout = data["generation_logprobs"][:, 1:]

        def mean(x):
            if cfg.token_level_loss:
                return (x * mask).sum() / global_valid_toks
            by_row = (x * token_mask).sum(1) / token_mask.sum(1).clamp(min=1)
            return (by_row * rows).sum() / global_valid_seqs

        ratio = logprob if cfg.disable_ppo_ratio else (logprob - old).exp()
        clipped = ratio.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
        if cfg.disable_ppo_ratio:
            clipped = ratio
        policy = torch.maximum(-advantages * ratio, -advantages * clipped)
        if cfg.use_importance_sampling_correction:
            weights = (old - rollout).exp().nan_to_num(0.0, 0.0, 0.0)
            policy = policy * weights.clamp(max=cfg.truncated_importance_sampling_ratio)
        loss = mean(policy)
        kl = torch.zeros(())
        if cfg.reference_policy_kl_penalty:
            d = data["reference_policy_logprobs"][:, 1:] - logprob
            kl = mean(d.exp() - 1 - d)
            loss = loss + cfg.reference_policy_kl_penalty * kl
        if cfg.positive_example_nll_weight:
            right = mask * (data["rewards"] > 0)[:, None]
            nll = -(logprob * right).sum() / right.sum().clamp(min=1)
            loss = loss + cfg.positive_example_nll_weight * nll
        return loss, {
            "loss": loss.item(),
            "kl_penalty": kl.item(),
            "num_valid_samples": rows.sum().item(),
            "probs_ratio": ((ratio * mask).sum() / global_valid_toks).item(),
            "probs_ratio_clamped": ((clipped * mask).sum() / global_valid_toks).item(),
        }


class Logger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step, prefix="", step_metric=None, step_finished=False):
        self.logged.append((metrics, step, prefix))


def setup(
    master_config, tokenizer, dataset, val_dataset, processor=None, policy_factory=None
) -> tuple:
    loss_fn = ClippedPGLossFn(master_config.loss_fn, use_fused_linear_logprobs=True)
    return SimpleNamespace(), None, loss_fn, Logger(), master_config
