"""The nouns that travel between the stages of a training step.

Shape legend: T tokens of a packed micro-batch, S sequences in it, R tokens of one response. Routes
are ``[tokens, layers, experts]`` everywhere: N tokens, M layers with experts, k experts per token
of E; router probabilities, kept at P of the tokens, are ``[P, M, E]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reward workers read samples and do without torch
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem.

    Example: ``Prompt(uid=7, text="Calculate 3 + 4.", answer="7", tokens=(5, 9, 2), task="arith")``.
    """

    uid: int
    text: str
    answer: str
    tokens: tuple[int, ...]
    task: str = ""
    entry: dict[str, Any] = field(default_factory=dict)
    """The source's own record, as its scorer wants it back (a JSONL row, a reasoning-gym item)."""
    thinking: bool = False
    """Whether it ends with ``<think>``, as some chat templates do: the response begins inside."""


@dataclass(frozen=True, kw_only=True)
class SampleRoutes:
    """The experts that the rollout engine chose for a sample's tokens.

    Of the N = prompt + response - 1 tokens that are fed, in all M layers with experts.
    """

    experts: npt.NDArray[np.int16]
    """[N, M, k]."""
    probs: npt.NDArray[np.float32] | None = None
    """[P, M, E] router probabilities, kept at some positions."""
    positions: npt.NDArray[np.int64] | None = None
    """[P] the positions, from 0, at which they were kept."""


@dataclass(frozen=True, kw_only=True)
class DecodedRoutes:
    """The experts of every token that a batch was fed: L positions, M layers with experts."""

    experts: npt.NDArray[np.int16]
    """[B, L, M, k]."""
    probs: npt.NDArray[np.float32] | None
    """[B, P, M, E] router probabilities."""
    positions: npt.NDArray[np.int64]
    """[P] the positions at which they were kept."""

    def of(self, row: int, fed: int) -> SampleRoutes:
        """Those of one sequence, of which ``fed`` tokens count."""
        kept = self.positions < fed
        return SampleRoutes(
            experts=self.experts[row, :fed].copy(),
            probs=None if self.probs is None else self.probs[row, kept],
            positions=None if self.probs is None else self.positions[kept],
        )


@dataclass(kw_only=True)
class Sample:
    """One response to a prompt; the later stages fill in ``text``, ``reward``, ``advantage``.

    Example: ``Sample(uid=57, prompt_tokens=(5, 9, 2), response_tokens=[8, 1],
    rollout_logprobs=[-0.1, -0.02], truncated=False)``.
    """

    uid: int
    prompt_tokens: tuple[int, ...]
    response_tokens: list[int]
    """R token ids; the last one is a stop token unless ``truncated``."""
    rollout_logprobs: list[float]
    """R log-probs of the sampled tokens under the distribution they were sampled from
    (temperature applied, top-p not), nats."""
    truncated: bool
    versions: list[int] = field(default_factory=list)
    """R numbers: the training steps behind the weights that each token was sampled with."""
    text: str = ""
    reward: float = 0.0
    """NaN where it could not be scored: then it is no sample of its group."""
    problem: str = ""
    """Why it could not be scored, on the rank that tried."""
    advantage: float = 0.0
    routes: SampleRoutes | None = None

    @property
    def scored(self) -> bool:
        return not math.isnan(self.reward)


@dataclass(kw_only=True)
class Group:
    """A prompt and its G responses: the unit over which advantages are computed."""

    prompt: Prompt
    samples: list[Sample]


@dataclass(frozen=True)
class Temperatures:
    """How steep SAPO's gate is, by the sign of a token's advantage.

    Raises ValueError unless both are finite and > 0. Example: ``Temperatures(1.0, 1.05)``.
    """

    pos: float
    """tau of a token with a positive advantage."""
    neg: float
    """tau of every other token."""

    def __post_init__(self) -> None:
        for name, tau in (("tau_pos", self.pos), ("tau_neg", self.neg)):
            if not (math.isfinite(tau) and tau > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {tau}")


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Sizes of the whole global mini-batch, over every rank and micro-batch.

    Example: two responses of 3 and 5 tokens: ``Denominators(sequences=2, tokens=8)``.
    """

    sequences: int
    """Sequences that hold at least one valid token."""
    tokens: int
    """Valid response tokens."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The experts of a micro-batch as one rank's routers see it.

    M layers with experts on this rank, N tokens that its routers see (sequence parallelism gives
    each tensor-parallel rank a part), k experts per token, E experts.
    """

    experts: Tensor
    """int16 [N, M, k]."""
    probs: Tensor | None = None
    """fp32 [P, M, E]: router probabilities of the P tokens at which they are kept."""
    replaced: Tensor | None = None
    """uint8 [N, M]: of k replayed experts, those that the router's own took the place of; None
    unless the replay is graded (``routing.replay_threshold``)."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A micro-batch as one context-parallel rank sees it: sequences laid end to end.

    ``padded`` sequences are all of one length, so that ``[T]`` is also a ``[S, T / S]`` grid.

    Vectors are ``[T]`` and aligned with ``tokens``: entry t speaks of the prediction of
    ``targets[t]`` from ``tokens[t]`` and what precedes it in its sequence. ``cu_seqlens`` bounds
    the sequences of the whole micro-batch (all context-parallel ranks together).

    Example: prompts (5, 9), (4,) with responses (8, 1), (7, 1) on one rank, no padding:
    ``tokens=[5, 9, 8, 4, 7]``, ``targets=[9, 8, 1, 7, 1]``, ``mask=[F, T, T, T, T]``,
    ``position_ids=[0, 1, 2, 0, 1]``, ``sequence_ids=[0, 0, 0, 1, 1]``, ``cu_seqlens=[0, 3, 5]``,
    ``lengths=[2, 2]``.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    """True where the target is a valid response token."""
    position_ids: Tensor
    sequence_ids: Tensor
    """Index of each token's sequence in this micro-batch, 0 .. S-1 (padding included)."""
    cu_seqlens: Tensor
    """int32 [S + 1]."""
    max_seqlen: int
    lengths: Tensor
    """[S] valid response tokens of each whole sequence, counted over all context-parallel ranks."""
    advantages: Tensor
    rollout_logprob: Tensor
    sample_uids: tuple[int, ...]
    """uid of each sequence; -1 marks a filler that holds no valid token."""
    padded: bool = False
    old_logprob: Tensor | None = None
    """fp32, or fp64 for fp64 weights; set on the last pipeline stage before the first update."""
    ref_logprob: Tensor | None = None
    rollout_experts: Tensor | None = None
    """int16 [T, M, k] of the rollout engine, all M layers with experts; -1 on padding."""
    rollout_probs: Tensor | None = None
    """fp32 [P, M, E]: router probabilities of the rollout engine, where they were kept."""
    rollout_probs_row: Tensor | None = None
    """Row of ``rollout_probs`` that belongs to each token; -1 where none was kept."""
    old_routes: Routes | None = None
    """What this rank's routers chose, or under replay would have chosen, in the pass that computed
    ``old_logprob``."""
    old_experts: Tensor | None = None
    """int16 [N, M, k]: the experts of this rank that ``old_logprob`` was computed with."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: x.to(device) for name, x in values.items() if hasattr(x, "to")}
        )
