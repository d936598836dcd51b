"""A gate by name: ``sapo:1.0,1.05`` and its rivals, each a token loss of the objective."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapo_megatron.errors import UserError
from sapo_megatron.objective.loss import LOSSES
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.recipe.schema import CLIP_DEFAULTS, AlgorithmConfig, LossType
from sapo_megatron.runs.dump import DumpInfo

FORMS = {
    name: f"{name}:CLIP_LOW,CLIP_HIGH" if name in CLIP_DEFAULTS else name for name in LOSSES
} | {"sapo": "sapo:TAU_POS,TAU_NEG"}
"""What a gate looks like on the command line; values are finite and > 0."""
CLIP_HIGHER = (0.2, 0.28)
"""The clip range of DAPO (arXiv 2503.14476), which grpo is compared with."""


@dataclass(frozen=True)
class Gate:
    """A policy loss with its settings. Example: ``Gate("sapo", 1.0, 1.05)``."""

    name: LossType
    first: float | None = None
    """tau_pos, or clip_ratio_low; None for a loss without settings."""
    second: float | None = None
    """tau_neg, or clip_ratio_high."""

    def __str__(self) -> str:
        if self.first is None:
            return self.name
        return f"{self.name}:{self.first:.9g},{self.second:.9g}"

    @property
    def algorithm(self) -> AlgorithmConfig:
        """The recipe's settings for this loss."""
        low, high = "clip_ratio_low", "clip_ratio_high"
        if self.name == "sapo":
            low, high = "tau_pos", "tau_neg"
        settings: dict[str, Any] = {low: self.first, high: self.second}
        return AlgorithmConfig(loss_type=self.name, **settings)

    def weights(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        sequence_ids: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """w of each of N valid tokens, whose loss has the gradient ``-w r A`` to its log-prob.

        By autograd; NaN where A = 0. All are [N] but ``lengths`` [S], the tokens of each whole
        sequence, into which ``sequence_ids`` points.
        """
        leaf = logprob.detach().clone().requires_grad_()
        kind = LOSSES[self.name]
        own = r = Ratio.of(leaf - old_logprob, advantages, logprob=leaf)
        if kind.of_sequences:
            of_sequences = kind.of_sequences(r.log_ratio, r.mask, sequence_ids, lengths)
            own = r.of_sequences(of_sequences[sequence_ids])
        (gradient,) = torch.autograd.grad(kind.of_tokens(own, self.algorithm).sum(), leaf)
        return torch.where(advantages != 0, gradient / (-r.ratio.detach() * advantages), math.nan)


def parse_gate(text: str) -> Gate:
    """``NAME:VALUE,VALUE``, or a bare name -> gate. Raises UserError that shows the form."""
    word, _, rest = text.partition(":")
    name = next((known for known in FORMS if known == word), None)
    if name and FORMS[name] == name:
        if text != name:
            raise UserError(f"--gate: expected {name}, which has no values, got {text!r}; fix it")
        return Gate(name)
    try:
        values = [float(value) for value in rest.split(",")]
    except ValueError:
        values = []
    if name is None or len(values) != 2 or not all(0 < v < math.inf for v in values):
        raise UserError(
            f"--gate: expected {FORMS[name] if name else ' or '.join(FORMS.values())}, two finite "
            f"numbers > 0 such as {default(name or 'sapo')}, got {text!r}; change it"
        )
    return Gate(name, *values)


def default(name: LossType) -> Gate:
    """A gate with the settings of its paper."""
    match name:
        case "sapo":
            return Gate(name, AlgorithmConfig.tau_pos, AlgorithmConfig.tau_neg)
        case "grpo":
            return Gate(name, *CLIP_HIGHER)
        case _:
            return Gate(name, *CLIP_DEFAULTS.get(name, ()))


def default_gates(settings: DumpInfo) -> list[Gate]:
    """One of each, sapo with the temperatures of the run."""
    sapo = Gate("sapo", settings.tau_pos, settings.tau_neg)
    return [sapo, *(default(name) for name in FORMS if name != "sapo")]
