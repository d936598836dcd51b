"""A model cut over the ranks: its weights, its routers, and passes over micro-batches."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.policy import weights
from sapo_megatron.policy.gpt import build_model
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.routers import ModelRouters, RouterView
from sapo_megatron.policy.spec import moe_layers, transformer_config
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.sample import PackedBatch, Routes


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What one rank has of a micro-batch's forward pass."""

    logprob: Tensor | None
    """[T] of the targets; None off the last stage."""
    routes: Routes | None = None
    """None where nothing was recorded, or this rank has no layer with experts."""


class Model:
    """The model of a Hugging Face folder on this rank, which answers with log-probs."""

    def __init__(
        self,
        recipe: Recipe,
        arch: Architecture,
        groups: ParallelGroups,
        folder: Path,
        *,
        load: bool = True,
    ) -> None:
        """``load``: whether to fill it; without, a checkpoint will.

        Collective over all ranks. Raises UserError for weights that do not fit.
        """
        self.groups = groups
        self.config = transformer_config(arch, recipe.model, recipe.parallel)
        self.chunks = build_model(arch, self.config, groups, recipe)
        self.weights = weights.HuggingFaceWeights(self.chunks, arch, groups, folder)
        if load:
            self.weights.load()
        self.routers = ModelRouters(
            self.chunks,
            self.config,
            moe_layers(self.config),
            threshold=recipe.routing.replay_threshold,
        )
        self.view = RouterView(
            routers=self.routers, groups=groups, prob_every=recipe.routing.kept_every
        )

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[PackedBatch],
        *,
        replay: Sequence[Tensor] | None = None,
        record: bool = False,
    ) -> list[Forward]:
        """Each micro-batch's log-probs and, with ``record``, routes. Collective over all ranks.

        ``replay`` has each micro-batch's experts ``[N, M, k]``, as in ``sample.Routes``.
        """

        def loss_function(batch: PackedBatch) -> Callable[..., Tensor]:
            return lambda output, non_loss_data: output[0].flatten()

        outputs, routes = self.run(
            batches, loss_function, models=self.chunks, train=False, replay=replay, record=record
        )
        return forwards_of(outputs, routes, batches)

    def run(
        self,
        batches: Sequence[PackedBatch],
        loss_function: Callable[[PackedBatch], Callable[..., Any]],
        *,
        models: Sequence[Any],
        train: bool,
        replay: Sequence[Tensor] | None,
        record: bool,
    ) -> tuple[list[Any], list[Routes]]:
        """Through Megatron's schedule, forward or (``train``) there and back.

        ``models``: the chunks, or what wraps them. Returns what ``loss_function(batch)`` reported,
        on the last stage, and routes (where ``record`` and there are experts), both in the order of
        the micro-batches. Collective over all ranks.
        """

        def forward_step(iterator: Iterator[PackedBatch], model: Any) -> tuple[Any, Callable]:
            batch = next(iterator)
            rows = len(batch.lengths) if batch.padded else 1
            output = model(
                input_ids=batch.tokens.view(rows, -1),
                position_ids=batch.position_ids.view(rows, -1),
                attention_mask=None,
                labels=batch.targets.view(rows, -1),
                packed_seq_params=None if batch.padded else _packed_seq_params(batch),
            )
            return output, loss_function(batch)

        @functools.cache  # every layer's router asks, and the answer makes the host wait
        def kept_rows(number: int) -> Tensor:
            return self.view.kept_rows(batches[number])

        keep = kept_rows if self.view.prob_every else None
        with self.routers.watching(replay=replay, record=record, keep=keep) as routes:
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in models],
                model=list(models),
                num_microbatches=len(batches),
                seq_length=len(batches[0].tokens) * self.groups.cp.size(),
                micro_batch_size=1,
                forward_only=not train,
                collect_non_loss_data=not train,
            )
        return outputs, routes

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Log-probs at another temperature than the recipe's, while the block lasts."""
        head = self.chunks[-1]
        before, head.temperature = head.temperature, temperature
        try:
            yield
        finally:
            head.temperature = before


def forwards_of(
    logprobs: Sequence[Tensor], routes: Sequence[Routes], batches: Sequence[PackedBatch]
) -> list[Forward]:
    """By micro-batch; a rank may have neither the log-probs nor the routes."""
    return [
        Forward(logprob=logprob, routes=route)
        for _, logprob, route in itertools.zip_longest(batches, logprobs, routes)
    ]


def _packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
