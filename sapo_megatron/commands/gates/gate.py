"""A gate by name: ``sapo:1.0,1.05`` and its rivals, each a token loss of the objective."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo_megatron.errors import UserError
from sapo_megatron.objective.baselines import cispo_token_loss, grpo_token_loss, gspo_token_loss
from sapo_megatron.objective.ratio import safe_log_ratio
from sapo_megatron.objective.reduce import sequence_mean
from sapo_megatron.objective.sapo import sapo_token_loss
from sapo_megatron.recipe.schema import CLIP_DEFAULTS
from sapo_megatron.runs.dump import DumpInfo

FORMS = {
    "sapo": "sapo:TAU_POS,TAU_NEG",
    "grpo": "grpo:CLIP_LOW,CLIP_HIGH",
    "gspo": "gspo:CLIP_LOW,CLIP_HIGH",
    "cispo": "cispo:CLIP_LOW,CLIP_HIGH",
}
"""What a gate looks like on the command line; both values are finite and > 0."""
CLIP_HIGHER = (0.2, 0.28)
"""The clip range of DAPO (arXiv 2503.14476), which grpo is compared with."""


@dataclass(frozen=True)
class Gate:
    """A policy loss with its settings. Example: ``Gate("sapo", 1.0, 1.05)``."""

    name: str
    """One of ``FORMS``."""
    first: float
    """tau_pos, or clip_ratio_low."""
    second: float
    """tau_neg, or clip_ratio_high."""

    def __str__(self) -> str:
        return f"{self.name}:{self.first:.9g},{self.second:.9g}"

    def weights(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        sequence_ids: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """w of each of N valid tokens, whose loss has the gradient ``-w r A`` to its log-prob.

        By autograd through :meth:`token_loss`, whose arguments it takes. NaN where A = 0.
        """
        leaf = logprob.detach().clone().requires_grad_()
        loss = self.token_loss(leaf, old_logprob, advantages, sequence_ids, lengths)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        ratio = safe_log_ratio(logprob - old_logprob, None).exp()
        return torch.where(advantages != 0, gradient / (-ratio * advantages), math.nan)

    def token_loss(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        sequence_ids: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """The loss of each of N valid tokens: [N], differentiable with respect to ``logprob``.

        All are [N] but ``lengths`` [S], the tokens of each whole sequence, into which
        ``sequence_ids`` points.
        """
        log_ratio = logprob - old_logprob
        clip = {"clip_ratio_low": self.first, "clip_ratio_high": self.second}
        match self.name:
            case "sapo":
                return sapo_token_loss(
                    log_ratio, advantages, tau_pos=self.first, tau_neg=self.second
                )
            case "grpo":
                return grpo_token_loss(log_ratio, advantages, **clip)
            case "gspo":
                valid = torch.ones_like(log_ratio, dtype=torch.bool)
                means = sequence_mean(log_ratio, valid, sequence_ids, lengths)
                return gspo_token_loss(log_ratio, means[sequence_ids], advantages, **clip)
            case "cispo":
                return cispo_token_loss(log_ratio, logprob, advantages, **clip)
            case _:
                raise ValueError(f"gate: expected one of {', '.join(FORMS)}, got {self.name!r}")


def parse_gate(text: str) -> Gate:
    """``NAME:VALUE,VALUE`` -> gate. Raises UserError that shows the form."""
    name, _, rest = text.partition(":")
    try:
        values = [float(value) for value in rest.split(",")]
    except ValueError:
        values = []
    if name not in FORMS or len(values) != 2 or not all(0 < v < math.inf for v in values):
        raise UserError(
            f"--gate: expected {FORMS.get(name, ' or '.join(FORMS.values()))}, two finite numbers "
            f"> 0 such as {default(name)}, got {text!r}; change it"
        )
    return Gate(name, *values)


def default(name: str) -> Gate:
    """A gate with the settings of its paper; sapo's for an unknown name."""
    match name:
        case "grpo":
            return Gate("grpo", *CLIP_HIGHER)
        case "gspo" | "cispo":
            return Gate(name, *CLIP_DEFAULTS[name])
        case _:
            return Gate("sapo", 1.0, 1.05)


def default_gates(settings: DumpInfo) -> list[Gate]:
    """One of each, sapo with the temperatures of the run."""
    sapo = Gate("sapo", settings.tau_pos, settings.tau_neg)
    return [sapo, *(default(name) for name in FORMS if name != "sapo")]
