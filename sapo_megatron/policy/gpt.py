"""A megatron-core GPTModel of an architecture, which answers with log-probs."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.objective.logprob import linear_logprobs, vocab_parallel_logprobs
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.spec import block_spec
from sapo_megatron.recipe.schema import Recipe

LATENT_NORM_EPS = 1e-6
"""Of the norms inside latent attention, whatever ``rms_norm_eps`` says, as in transformers."""


class LogprobGPT(GPTModel):
    """A GPTModel that answers ``labels`` with log-probs and entropy instead of a loss."""

    def __init__(self, *, recipe: Recipe, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fused = recipe.train.logprob == "fused"
        self.chunk_size = recipe.train.logprob_chunk_size
        self.temperature = recipe.rollout.temperature
        self.entropy_has_gradient = recipe.algorithm.entropy_coef > 0
        self.true_vocab_size = true_vocab_size
        if self.config.params_dtype == torch.float64:
            # Upstream computes the rotary frequencies in fp32, whatever the model's dtype.
            for module in self.modules():
                if isinstance(module, RotaryEmbedding):
                    pairs = len(module.inv_freq)
                    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
                    module.inv_freq = 1.0 / self.rotary_base**exponents
        for module in self.modules():
            if isinstance(module, MLASelfAttention):
                for name in ("linear_q_up_proj", "linear_kv_up_proj"):
                    if hasattr(module, name):
                        getattr(module, name).eps = LATENT_NORM_EPS
        for name, weight in self.named_parameters():
            _mark(name, weight)

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """With ``labels [B, S]`` on the last stage: log-probs and entropy, ``[2, B, S]``."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, **kwargs)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        # [B, S] -> [S, B], the order of the hidden states.
        targets = labels.transpose(0, 1).contiguous()
        if self.fused:
            logprob, entropy = linear_logprobs(
                hidden_states.flatten(0, 1),
                weight,
                targets.flatten(),
                self.pg_collection.tp,
                sequence_parallel=self.config.sequence_parallel,
                temperature=self.temperature,
                with_entropy=True,
                chunk_size=self.chunk_size,
                vocab_size=self.true_vocab_size,
            )
        else:
            logits, _ = self.output_layer(hidden_states, weight=weight)
            logprob, entropy = vocab_parallel_logprobs(
                logits,
                targets,
                self.pg_collection.tp,
                temperature=self.temperature,
                with_entropy=True,
                chunk_size=self.chunk_size,
                vocab_size=self.true_vocab_size,
            )
        assert entropy is not None, "asked for"
        if not self.entropy_has_gradient:
            entropy = entropy.detach()
        return torch.stack((logprob, entropy)).view(2, *targets.shape).transpose(1, 2)


_CUT = (
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_q_proj.weight",
    "linear_q_up_proj.weight",
    "linear_kv_up_proj.weight",
    "linear_proj.weight",
    "self_attention.in_proj.weight",
    "self_attention.conv1d.weight",
    "self_attention.A_log",
    "self_attention.dt_bias",
    "self_attention.out_proj.weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
)
"""Ends of the names of weights that tensor parallelism cuts; the others every rank has whole."""


def _mark(name: str, weight: Any) -> None:
    """Say which ranks hold what of a weight, for its reduction and for the gradient norm.

    The norm counts a weight on every tensor-parallel rank where it is marked as cut, else on the
    first alone. Upstream and Transformer Engine leave experts unmarked and mark weights that all
    ranks have whole, each in some releases, which makes the norm too small or too large.
    """
    expert = ".mlp.experts." in name
    if expert:
        # Reduced over their own data-parallel group in every layout. Upstream marks them only where
        # ep > 1, which leaves tp > 1 with ep = 1 without a reduction over the ranks that the tokens
        # are split over.
        weight.allreduce = False
    weight.tensor_model_parallel = expert or name.endswith(_CUT)


def build_model(
    arch: Architecture, config: TransformerConfig, groups: ParallelGroups, recipe: Recipe
) -> list[LogprobGPT]:
    """This rank's chunks of the model, one per virtual stage; weights are not initialised."""
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for chunk in range(stages or 1):
        vp_stage = None if stages is None else chunk
        first, last = chunk == 0, chunk == (stages or 1) - 1
        model = LogprobGPT(
            config=config,
            transformer_layer_spec=block_spec(arch, config, groups, vp_stage, recipe.model),
            vocab_size=padded_vocab_size(arch.vocab_size, config),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=groups.is_first_stage and first,
            post_process=groups.is_last_stage and last,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_percent=arch.rope.fraction,
            rotary_base=arch.rope.theta,
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
            recipe=recipe,
            true_vocab_size=arch.vocab_size,
        )
        chunks.append(model.to(groups.device))
    return chunks


def padded_vocab_size(vocab_size: int, config: TransformerConfig) -> int:
    """The vocabulary rounded up so that it divides by the tensor-parallel size."""
    tp = config.tensor_model_parallel_size
    return -(-vocab_size // tp) * tp
