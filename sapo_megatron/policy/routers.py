"""Record and replay the experts that routers choose, through megatron-core's RouterReplay.

Each router of a model gets a :class:`LayerRouter`, which answers the question that a router puts to
upstream's ``RouterReplay``. Upstream keeps a list for the whole process, in which a reference model
stands beside the trained one, and wants to be told when the forward passes are over and the
recomputation of activations begins. Here a model has its own routers, and a router counts its
calls: the n-th forward of a pass belongs to the n-th micro-batch, and so does the n-th
recomputation, which is known by the autograd engine being at work.

R2 replays what the routers of the training engine chose for the old policy; R3 what those of the
rollout engine chose (arXiv 2510.11370, 2512.01374), all of it or as far as the current scores bear
it out (:func:`graded`). The weights of the replayed experts are those of the current scores, so the
router still learns.

Shape legend: M layers with experts on this rank, N tokens that its routers see, k experts a token,
E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sapo_megatron.data.batch import router_rows
from sapo_megatron.errors import UserError
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.sample import PackedBatch, Routes

KeptRows = Callable[[int], Tensor]
"""Number of a micro-batch -> the rows whose router probabilities are kept."""


class LayerRouter(RouterReplay):
    """What one router chooses, or is made to choose."""

    def __init__(self, router: TopKRouter, threshold: float = 0.0) -> None:
        """``threshold``: that of :func:`graded`; 0 replays whatever it is told."""
        # Not upstream's: that would enter this router in the list of the process.
        self.layer = router.layer_number - 1
        self._router = router
        self._threshold = threshold
        self._replay: Sequence[Tensor] | None
        self._keep: KeptRows | None
        self.reset()

    def begin(self, replay: Sequence[Tensor] | None, record: bool, keep: KeptRows | None) -> None:
        """The next pass replays these experts (``[N, k]`` for each micro-batch), if any."""
        self.reset()
        self._active = record or replay is not None
        self._replay, self._recording, self._keep = replay, record, keep

    def reset(self) -> None:
        """Back to a router that is neither watched nor told what to choose."""
        self._active = self._recording = False
        self._replay = None
        self._keep = None
        self._forwards = self._recomputations = 0
        self.experts: list[Tensor] = []
        self.probs: list[Tensor] = []
        self.replaced: list[Tensor] = []

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Called by the router with ``scores [N, E]``: values and indices ``[N, k]``."""

        def choose(among: Tensor) -> tuple[Tensor, Tensor]:
            assert default_compute_topk is not None, "upstream's router passes its own"
            return default_compute_topk(among, topk, num_groups=num_groups, group_topk=group_topk)

        if not self._active:
            return choose(scores)
        recording = self._recording
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass: a recomputation
            batch, self._recomputations = self._recomputations, self._recomputations + 1
            recording = False
        else:
            batch, self._forwards = self._forwards, self._forwards + 1
        if self._replay is None:
            used = choose(scores)
            own = used[1]
        else:
            # Outside the graph: a recomputation, which records nothing, must build the same.
            own = choose(scores.detach())[1]
            experts = self._told(scores, batch, own, recording)
            used = scores.gather(1, experts), experts
        if recording:
            self._record(scores.detach(), own, batch)
        return used

    def _told(self, scores: Tensor, batch: int, own: Tensor, recording: bool) -> Tensor:
        """The experts to replay; ``own`` are those that the router chooses."""
        assert self._replay is not None
        experts = self._replay[batch].to(scores.device, torch.int64)
        assert len(experts) == len(scores), (
            f"layer {self.layer}, micro-batch {batch}: routes of {len(experts)} tokens for "
            f"{len(scores)}"
        )
        if self._threshold:
            probs = self._probabilities(scores.detach())
            experts, replaced = graded(experts, own, probs, self._threshold)
            if recording:
                self.replaced.append(replaced)
        return experts

    def _record(self, scores: Tensor, experts: Tensor, batch: int) -> None:
        self.experts.append(experts.to(torch.int16))
        if self._keep is not None:
            self.probs.append(self._probabilities(scores[self._keep(batch)]))

    def _probabilities(self, scores: Tensor) -> Tensor:
        """fp32 ``[P, E]`` that add up to 1, without the bias that only chooses."""
        config = self._router.config
        scores = scores.float()
        if config.moe_router_score_function == "softmax":
            return scores if config.moe_router_pre_softmax else scores.softmax(-1)
        if self._router.expert_bias is not None:
            scores = scores - self._router.expert_bias
        return scores / scores.sum(-1, keepdim=True)


class ModelRouters:
    """The routers of one model on this rank, in the order of their layers."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        config: TransformerConfig,
        moe_layers: Sequence[int],
        *,
        threshold: float = 0.0,
    ) -> None:
        """``moe_layers``: numbers, from 0, of all layers with experts, on whichever rank;
        ``threshold``: that of :func:`graded` in every replay.
        """
        self._routers: list[LayerRouter] = []
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.router_replay = LayerRouter(module, threshold)
                    self._routers.append(module.router_replay)
        self._routers.sort(key=lambda router: router.layer)
        self.moe_layers = tuple(moe_layers)
        self.num_experts = config.num_moe_experts or 0
        self.topk = config.moe_router_topk

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of this rank's layers with experts."""
        return tuple(r.layer for r in self._routers)

    @property
    def places(self) -> list[int]:
        """Where this rank's layers stand among all layers with experts."""
        return [self.moe_layers.index(layer) for layer in self.layers]

    @contextmanager
    def watching(
        self,
        *,
        replay: Sequence[Tensor] | None = None,
        record: bool = False,
        keep: KeptRows | None = None,
    ) -> Iterator[list[Routes]]:
        """One pass over micro-batches, each of which replays its ``[N, M, k]`` of ``replay``.

        With ``record``, the list holds what the routers chose, or under replay would have chosen,
        for each micro-batch once the block is through. The passes may recompute activations.
        """
        routes: list[Routes] = []
        self.begin(replay=replay, record=record, keep=keep)
        try:
            yield routes
            routes += self.recorded()
        finally:
            self.reset()

    def begin(
        self,
        *,
        replay: Sequence[Tensor] | None = None,
        record: bool = False,
        keep: KeptRows | None = None,
    ) -> None:
        """What :meth:`watching` does at its start."""
        for routes in replay or ():
            assert routes.shape[1] == len(self._routers), "routes of every layer of this rank"
        for i, router in enumerate(self._routers):
            router.begin(None if replay is None else [r[:, i] for r in replay], record, keep)

    def recorded(self) -> list[Routes]:
        """What was chosen since :meth:`begin`, by call."""
        experts = zip(*(r.experts for r in self._routers), strict=True)
        probs = list(zip(*(r.probs for r in self._routers), strict=True))
        replaced = list(zip(*(r.replaced for r in self._routers), strict=True))
        return [
            Routes(
                experts=torch.stack(chosen, dim=1),
                probs=torch.stack(probs[i], dim=1) if probs else None,
                replaced=torch.stack(replaced[i], dim=1) if replaced else None,
            )
            for i, chosen in enumerate(experts)
        ]

    def reset(self) -> None:
        """What :meth:`watching` does at its end."""
        for router in self._routers:
            router.reset()


@dataclass(frozen=True, kw_only=True)
class RouterView:
    """The tokens and layers of one rank's routers.

    Shape legend as in :class:`~sapo_megatron.sample.Routes`.
    """

    routers: ModelRouters
    groups: ParallelGroups
    prob_every: int
    """Positions between tokens whose router probabilities are kept; 0: none are."""

    def rows(self, batch: PackedBatch) -> Tensor:
        """The tokens that the routers see, in their order: int [N] in 0 .. T-1."""
        return router_rows(batch, self.groups.tp.rank(), self.groups.tp.size())

    def kept_tokens(self, batch: PackedBatch) -> Tensor:
        """At which tokens router probabilities are kept, on whichever rank: bool [T]."""
        if not self.prob_every:
            return torch.zeros_like(batch.mask)
        return batch.mask & (batch.position_ids % self.prob_every == 0)

    def kept_rows(self, batch: PackedBatch) -> Tensor:
        """At which of :meth:`rows` router probabilities are kept: int [P] in 0 .. N-1."""
        return self.kept_tokens(batch)[self.rows(batch)].nonzero().flatten()

    def rollout_routes(self, batch: PackedBatch) -> Routes:
        """What the rollout engine chose for them; k different experts in turn on padding.

        Raises UserError for routes that do not fit the model.
        """
        routers, rows = self.routers, self.rows(batch)
        layers = len(routers.moe_layers)
        experts = batch.rollout_experts
        if experts is None:
            shape = (len(batch.tokens), layers, routers.topk)
            experts = batch.tokens.new_full(shape, -1, dtype=torch.int16)
        fed = (experts != -1).flatten(1).any(-1)
        if not bool(fed[batch.mask].all()):
            raise UserError(
                "routes: expected those of every token from the rollout engine, got none for some; "
                "use an engine that returns them, or routing.router_replay R2"
            )
        check_routes(
            experts[fed],
            tokens=int(fed.sum()),
            layers=layers,
            topk=routers.topk,
            num_experts=routers.num_experts,
        )
        experts = padded_experts(experts, fed, routers.num_experts)
        probs = None
        if batch.rollout_probs is not None:
            assert batch.rollout_probs_row is not None, "probabilities come with their rows"
            kept = batch.rollout_probs_row[rows][self.kept_rows(batch)]
            assert bool((kept >= 0).all()), "both engines keep them at the same positions"
            probs = batch.rollout_probs[kept][:, routers.places]
        return Routes(experts=experts[rows][:, routers.places], probs=probs)


def graded(told: Tensor, own: Tensor, probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The experts of ``told`` that the router bears out, filled up with its own: ``[N, k]``.

    An expert of ``told [N, k]`` stays where its probability is at least ``threshold`` times the
    least of ``own [N, k]``, what the router chooses, the best first; the places of the others go to
    the best of its own that are not there. ``probs [N, E]``; where they are NaN, all stay. Also
    returns how many went: uint8 [N].
    """
    gone = probs.gather(1, told) < threshold * probs.gather(1, own).amin(1, keepdim=True)
    there = (own[:, :, None] == told[:, None, :]).any(-1)  # what is gone is none of its own
    order = torch.cat([gone, there], dim=1).to(torch.uint8).argsort(dim=1, stable=True)
    experts = torch.cat([told, own], dim=1).gather(1, order[:, : told.shape[1]])
    return experts, gone.sum(1).to(torch.uint8)


def padded_experts(experts: Tensor, fed: Tensor, num_experts: int) -> Tensor:
    """``experts [T, M, k]`` where ``fed`` (bool [T]) is True; elsewhere k that differ, in turn.

    What stands on padding reaches no token that counts; but a router needs valid experts there,
    and should not send them all to the same.
    """
    tokens, _, topk = experts.shape
    turns = torch.arange(tokens * topk, device=experts.device).view(tokens, 1, topk) % num_experts
    return torch.where(fed[:, None, None], experts, turns.to(experts.dtype))


def check_routes(experts: Tensor, *, tokens: int, layers: int, topk: int, num_experts: int) -> None:
    """Whether ``experts [N, M, k]`` can be replayed. Raises UserError, naming the first defect."""
    expected = (tokens, layers, topk)
    if tuple(experts.shape) != expected:
        raise UserError(
            f"routes: expected [tokens, layers, experts a token] = {list(expected)}, got "
            f"{list(experts.shape)}; they must come from the model that is trained"
        )
    outside = (experts < 0) | (experts >= num_experts)
    if bool(outside.any()):
        token, layer, _ = outside.nonzero()[0].tolist()
        raise UserError(
            f"routes: expected experts from 0 to {num_experts - 1}, got "
            f"{experts[token, layer].tolist()} for token {token} in layer {layer} of those with "
            f"experts; they must come from the model that is trained"
        )
    ordered = experts.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if bool(twice.any()):
        token, layer = twice.nonzero()[0].tolist()
        raise UserError(
            f"routes: expected {topk} different experts, got {experts[token, layer].tolist()} for "
            f"token {token} in layer {layer}; they must come from the model that is trained"
        )
