"""The training model as a decoder: KV cache, pipeline hand-over, agreement on every token."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from sapo_megatron.policy.model import Model
from sapo_megatron.sample import DecodedRoutes


class _Alone:
    """Stands for a context-parallel group where this rank works on whole sequences."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class MegatronDecoder:
    """Implements ``rollout.generate.Decoder`` on this rank's chunks of a model.

    Context-parallel ranks hold the same weights and decode as if they were data parallel.
    """

    def __init__(self, model: Model) -> None:
        self.chunks = model.chunks
        self.groups = model.groups
        self.device = model.groups.device
        self._routers = model.routers
        self._prob_every = model.view.prob_every
        self._recording = False
        self._fed: list[tuple[int, int]] = []
        self._kept: list[Tensor] = []
        self._contexts: list[StaticInferenceContext] = []
        self._batch_size = self._max_length = 0

    @contextmanager
    def generating(self, *, record: bool = False) -> Iterator["MegatronDecoder"]:
        """Puts the model into inference mode for the length of a rollout.

        Sequence parallelism is off meanwhile: one token a step does not divide. So is context
        parallelism. With ``record``, samples of a model with experts come with their routes.
        """
        self._set_training(False)
        self._recording = record and bool(self._routers.moe_layers)
        try:
            yield self
        finally:
            self._contexts = []
            self._routers.reset()
            self._set_training(True)

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)
            if self.groups.tp.size() > 1:
                _set_sequence_parallel(chunk, training)
            if self.groups.cp.size() > 1:
                cp_group = self.groups.cp if training else _Alone()
                for module in chunk.modules():
                    if isinstance(module, RotaryEmbedding):
                        module.cp_group = cp_group
                for layer in chunk.decoder.layers:
                    mixer = layer.self_attention
                    getattr(mixer, "core_attention", mixer).cp_group = cp_group

    def start(self, batch_size: int, max_length: int) -> None:
        self._contexts = [StaticInferenceContext(batch_size, max_length) for _ in self.chunks]
        self._batch_size, self._max_length = batch_size, max_length
        self._fed, self._kept = [], []
        keep = self._kept.__getitem__ if self._prob_every else None
        self._routers.begin(record=self._recording, keep=keep)

    def logits(self, tokens: Tensor) -> Tensor | None:
        """``tokens [B, s]`` -> logits ``[B, V]`` on the last stage, None on the others.

        A rank that only keeps others company may go on past ``max_length``: it then overwrites its
        last position.
        """
        batch, length = tokens.shape
        offset = min(self._contexts[0].sequence_len_offset, self._max_length - length)
        positions = torch.arange(offset, offset + length, device=self.device).expand(batch, -1)
        stages = self.groups.pp.size()
        self._fed.append((offset, length))
        self._kept.append(self._kept_rows(offset, length))
        out: Tensor | None = None
        for chunk, (model, context) in enumerate(zip(self.chunks, self._contexts, strict=True)):
            context.sequence_len_offset = offset
            if not model.pre_process:
                model.set_input_tensor(self._receive(batch, length))
            out = model(
                tokens, positions, None, inference_context=context, runtime_gather_output=True
            )
            if not model.post_process:
                self._send(out)
            context.sequence_len_offset = offset + length
            assert model.post_process == (
                chunk == len(self.chunks) - 1 and self.groups.pp.rank() == stages - 1
            )
        if out is None or not self.groups.is_last_stage:
            return None
        return out[:, -1, : self.chunks[-1].true_vocab_size]

    def routes(self) -> DecodedRoutes | None:
        if not self._recording:
            return None
        routers = self._routers
        layers = len(routers.moe_layers)
        places = torch.tensor(routers.places, dtype=torch.long, device=self.device)
        experts = torch.zeros(
            (self._batch_size, self._max_length, layers, routers.topk),
            dtype=torch.int32,
            device=self.device,
        )
        positions = [p for p in range(self._max_length) if self._keeps(p)]
        probs = torch.zeros(
            (self._batch_size, len(positions), layers, routers.num_experts), device=self.device
        )
        for (offset, length), routes in zip(self._fed, routers.recorded(), strict=False):
            # The routers' rows go position by position: [s B, M, k] -> [B, s, M, k].
            chosen = routes.experts.int().unflatten(0, (length, self._batch_size))
            experts[:, offset : offset + length, places] = chosen.transpose(0, 1)
            kept = [positions.index(p) for p in range(offset, offset + length) if self._keeps(p)]
            if kept and routes.probs is not None:
                values = routes.probs.unflatten(0, (len(kept), self._batch_size))
                probs[:, kept[0] : kept[-1] + 1, places] = values.transpose(0, 1)
        for part in (experts, probs):
            # Pipeline group: each stage brings its layers, and all stages generate together.
            dist.all_reduce(part, group=self.groups.pp)
        return DecodedRoutes(
            experts=experts.to("cpu", torch.int16).numpy(),
            probs=probs.cpu().numpy() if positions else None,
            positions=np.array(positions, dtype=np.int64),
        )

    def _keeps(self, position: int) -> bool:
        return self._prob_every > 0 and position % self._prob_every == 0

    def _kept_rows(self, offset: int, length: int) -> Tensor:
        """Rows of what is fed at whose positions router probabilities are kept."""
        kept = [s for s in range(length) if self._keeps(offset + s)]
        rows = torch.arange(self._batch_size * length, device=self.device)
        return rows.view(length, -1)[kept].flatten()

    def agree(self, tokens: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.stack((tokens.double(), logprobs))
        # Over the model-parallel block: its ranks hold pieces of one model and stay in step.
        dist.broadcast(packed, src=self.groups.leader, group=self.groups.megatron.mp)
        return packed[0].long(), packed[1]

    def any(self, flag: bool) -> bool:
        if self.groups.ep.size() == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        # Over expert parallelism: its ranks exchange tokens in every layer. Each pipeline stage
        # has such a group over the same sequences, so all stages come to the same answer.
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.groups.ep)
        return bool(votes.item())

    def _receive(self, batch: int, length: int) -> Tensor:
        config = self.chunks[0].config
        hidden = torch.empty(
            length, batch, config.hidden_size, dtype=config.pipeline_dtype, device=self.device
        )
        pp = self.groups.pp
        # Between neighbours of a pipeline, whose stages take the chunks of a token in turn.
        dist.recv(hidden, dist.get_global_rank(pp, (pp.rank() - 1) % pp.size()), group=pp)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        pp = self.groups.pp
        # To the stage that waits in ``_receive``.
        dist.send(
            hidden.contiguous(), dist.get_global_rank(pp, (pp.rank() + 1) % pp.size()), group=pp
        )


def _set_sequence_parallel(model: MegatronModule, on: bool) -> None:
    """Upstream's function of this kind remembers modules by ``id(model)``.

    That is wrong once a model is gone and another has taken its place in memory; and what it
    remembers is never freed.
    """
    model.config.sequence_parallel = on
    for module in model.modules():
        for name in (
            "sequence_parallel",
            "scatter_to_sequence_parallel",
            "reduce_scatter_embeddings",
        ):
            if hasattr(module, name):
                setattr(module, name, on)
