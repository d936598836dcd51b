"""Which part of a micro-batch the routers of this rank see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sapo_megatron.batch import router_rows
from sapo_megatron.config import UserError
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.routing.replay import ModelRouters, check_routes, padded_experts
from sapo_megatron.sample import PackedBatch, Routes


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
            kept = batch.rollout_probs_row[rows][self.kept_rows(batch)]
            assert bool((kept >= 0).all()), "both engines keep them at the same positions"
            probs = batch.rollout_probs[kept][:, routers.places].transpose(0, 1)
        return Routes(experts=experts[rows][:, routers.places].transpose(0, 1), probs=probs)
