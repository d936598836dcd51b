"""The training model as a decoder: KV cache, pipeline hand-over, agreement on every token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from sapo_megatron.policy.model import PolicyModel
from sapo_megatron.policy.parallel import ParallelGroups


class _Alone:
    """Stands for a context-parallel group where this rank works on whole sequences."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class MegatronDecoder:
    """Implements ``rollout.generate.Decoder`` on this rank's chunks of the policy.

    Context-parallel ranks hold the same weights and decode as if they were data parallel.
    """

    def __init__(self, chunks: list[PolicyModel], groups: ParallelGroups) -> None:
        self.chunks = chunks
        self.groups = groups
        self.device = groups.device
        self._mp = groups.megatron.mp
        self._contexts: list[StaticInferenceContext] = []
        self._max_length = 0

    @contextmanager
    def generating(self) -> Iterator["MegatronDecoder"]:
        """Puts the model into inference mode for the length of a rollout.

        Sequence parallelism is off meanwhile: one token a step does not divide. So is context
        parallelism.
        """
        self._set_training(False)
        try:
            yield self
        finally:
            self._contexts = []
            self._set_training(True)

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)
            if self.groups.tp.size() > 1:
                set_model_to_sequence_parallel(chunk, training)
            if self.groups.cp.size() > 1:
                cp_group = self.groups.cp if training else _Alone()
                chunk.rotary_pos_emb.cp_group = cp_group
                for layer in chunk.decoder.layers:
                    layer.self_attention.core_attention.cp_group = cp_group

    def start(self, batch_size: int, max_length: int) -> None:
        self._contexts = [StaticInferenceContext(batch_size, max_length) for _ in self.chunks]
        self._max_length = max_length

    def logits(self, tokens: Tensor) -> Tensor | None:
        """``tokens [B, s]`` -> logits ``[B, V]`` on the last stage, None on the others.

        A rank that only keeps others company may go on past ``max_length``: it then overwrites its
        last position.
        """
        batch, length = tokens.shape
        offset = min(self._contexts[0].sequence_len_offset, self._max_length - length)
        positions = torch.arange(offset, offset + length, device=self.device).expand(batch, -1)
        stages = self.groups.pp.size()
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
        if not self.groups.is_last_stage:
            return None
        return out[:, -1, : self.chunks[-1].true_vocab_size]

    def agree(self, tokens: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.stack((tokens.double(), logprobs))
        # Over the model-parallel block: its ranks hold pieces of one model and stay in step.
        dist.broadcast(packed, src=self.groups.leader, group=self._mp)
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
        dist.recv(hidden, dist.get_global_rank(pp, (pp.rank() - 1) % pp.size()), group=pp)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        pp = self.groups.pp
        dist.send(
            hidden.contiguous(), dist.get_global_rank(pp, (pp.rank() + 1) % pp.size()), group=pp
        )
