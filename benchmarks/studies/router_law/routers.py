"""Routers that the study puts in the place of the project's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sapo_megatron.policy.routers import LayerRouter


class Told(LayerRouter):
    """Chooses for itself wherever it is told -1."""

    def _told(self, scores: Tensor, batch: int, own: Tensor, recording: bool) -> Tensor:
        assert self._replay is not None
        told = self._replay[batch].to(scores.device, torch.int64)
        return torch.where(told == -1, own, told)


class Vanishing(Told):
    """An expert's weight goes to 0 where it is about to leave the set.

    Weights are proportional to the distance from the best score outside of the set. Its values are
    logarithms of that, which the softmax behind them makes the weights.
    """

    def get_replay_topk(self, scores: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _, experts = super().get_replay_topk(scores, *args, **kwargs)
        outside = scores.scatter(1, experts, -torch.inf).amax(1, keepdim=True)
        above = (scores.gather(1, experts) - outside).clamp(min=1e-20)
        return above.log(), experts


class Rounded(Told):
    """Scores are those of a router that computes in bf16: many are exactly alike."""

    last_first = False
    """Of experts with the same score, whether the last goes first."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        def other_way(among: Tensor, topk: int, **groups: Any) -> tuple[Tensor, Tensor]:
            assert default_compute_topk is not None, "upstream's router passes its own"
            values, experts = default_compute_topk(among.flip(1), topk, **groups)
            return values, among.shape[1] - 1 - experts

        choose = other_way if self.last_first else default_compute_topk
        rounded = scores.to(torch.bfloat16).to(scores.dtype)
        return super().get_replay_topk(rounded, topk, num_groups, group_topk, choose)


ROUTERS: dict[str, Callable[..., LayerRouter]] = {
    "own": LayerRouter,
    "vanishing": Vanishing,
    "rounded": Rounded,
    "told": Told,
}
