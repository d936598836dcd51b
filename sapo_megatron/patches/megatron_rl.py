"""Megatron-LM's own GRPO, ``megatron/rl`` and ``train_rl.py``.

The host computes a loss per token and reduces it by the token mean of each micro-batch (a 3-tuple,
``loss_func``), then by the mean over micro-batches and data-parallel ranks. Here the loss per
token is SAPO's, and a weight per token makes that reduction the paper's: with T valid tokens in
the micro-batch, L of them in the token's sequence, and n sequences in a micro-batch on average,

    T / (L n)

so that a step's loss is the mean over its sequences of the mean over their tokens
(arXiv 2511.20347, equation 5). n is the mean over all micro-batches of a collection of rollouts,
which is exact where a collection is one global batch, and else holds on average.

The loss mask reaches the host's ``forward_step`` only, so the weights are applied around it.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.errors import UserError
from sapo_megatron.objective.kl import kl_penalty
from sapo_megatron.objective.logprob import vocab_parallel_logprobs
from sapo_megatron.objective.ratio import Ratio, masked, safe_log_ratio
from sapo_megatron.objective.reduce import token_weights
from sapo_megatron.objective.sapo import sapo_loss
from sapo_megatron.patches.measure import Measured, Part, log_variance, measure
from sapo_megatron.patches.replace import Host, Symbol, check, find, replace, restore, with_argument
from sapo_megatron.recipe.schema import AlgorithmConfig
from sapo_megatron.sample import Denominators

RL_UTILS = "megatron.rl.rl_utils"
CALCULATE_GRPO_LOSS = Symbol(
    RL_UTILS,
    "calculate_grpo_loss",
    "current_logprobs, old_logprobs, ref_logprobs, advantages, clamp_eps_lower, clamp_eps_upper, "
    "kl_beta, entropy_weight, inference_logprobs, is_truncation_coef, seq_starts, seq_lengths",
)
PREPARE_TRAJECTORIES = Symbol(
    RL_UTILS, "prepare_trajectories", "rows, tokenizer, seq_length, skip_bos_token"
)
GET_LOGPROBS = Symbol(
    RL_UTILS,
    "get_logprobs",
    "model, tokens, position_ids, no_grad, sequence_packing, packed_seq_params",
)
SELECTIVE_LOG_SOFTMAX = Symbol(RL_UTILS, "selective_log_softmax", "logits, index")
COMPUTE_LOGPROBS_BATCH = Symbol(
    RL_UTILS,
    "compute_logprobs_batch",
    "model, data_loader, forward_backward_func, packing_context, trajs_batch_size, seq_length, "
    "logprobs_batch_size, decoder_seq_length, dtype, pp_group, is_correction, "
    "collect_non_loss_data",
)
RUNTIME_STATE = Symbol(RL_UTILS, "get_rl_runtime_state", "")
PRETRAIN = Symbol(
    "megatron.training",
    "pretrain",
    "cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func, "
    "model_provider, process_non_loss_data_func, get_embedding_ranks, "
    "get_position_embedding_ranks, non_loss_data_func, store, inprocess_call_wrapper, "
    "p2p_communicator, pg_collection, skip_model_parallel_init",
)
TRAIN_STEP = Symbol(
    "megatron.training.training",
    "train_step",
    "forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, "
    "forward_backward_func, iteration, pg_collection, p2p_communicator",
)
REPLACED = (CALCULATE_GRPO_LOSS, PREPARE_TRAJECTORIES, PRETRAIN, TRAIN_STEP)
REPLACED_FOR_LOGPROBS = (GET_LOGPROBS, SELECTIVE_LOG_SOFTMAX, COMPUTE_LOGPROBS_BATCH)
HOST = Host(
    title="Megatron-LM",
    distribution="megatron-core",
    module="megatron.core",
    verified="0.20.0",
    oldest="0.20.0",
    symbols=(*REPLACED, *REPLACED_FOR_LOGPROBS, RUNTIME_STATE),
)
LOSS_FUNC = (
    "loss_mask, kl_term, ratios, entropy_term, truncated_from_above, truncated_from_below, "
    "output_tensor"
)
"""The parameters of the host script's ``loss_func``."""

ONE = Denominators(sequences=1, tokens=1)


def install(algorithm: AlgorithmConfig, *, vocab_parallel_logprobs: bool = False) -> None:
    """Have ``train_rl.py``, when it is imported after this, train with SAPO.

    ``vocab_parallel_logprobs`` also takes log-probs from the logits as they are sharded, in fp32,
    where the host gathers the vocabulary on every rank and works in the logits' dtype. Raises
    UserError for a host that does not fit.
    """
    check(HOST)
    uninstall()
    sapo = _Sapo(algorithm)
    replace(HOST, CALCULATE_GRPO_LOSS, sapo.calculate_loss)
    replace(HOST, PREPARE_TRAJECTORIES, sapo.counting)
    replace(HOST, PRETRAIN, with_argument("forward_step_func", sapo.stepping))
    replace(HOST, TRAIN_STEP, _finishing)
    if vocab_parallel_logprobs:
        sharded = _ShardedLogprobs()
        replace(HOST, GET_LOGPROBS, sharded.getting)
        replace(HOST, SELECTIVE_LOG_SOFTMAX, sharded.select)
        # The dtype of the log-probs that it collects.
        replace(HOST, COMPUTE_LOGPROBS_BATCH, with_argument("dtype", lambda _: torch.float32))


def uninstall() -> None:
    """Put the host's own functions back."""
    restore(*REPLACED, *REPLACED_FOR_LOGPROBS)


@dataclass(frozen=True)
class _MicroBatch:
    """What the loss function saw, for the step around it, which has the mask; S tokens per row."""

    log_ratio: Tensor
    """[B, S], without gradient."""
    advantages: Tensor
    """[B, S]."""
    sequence_ids: Tensor
    """[B, S], below ``num_sequences``."""
    num_sequences: int


class _Sapo:
    """The host's loss, its reduction and its report, for one algorithm."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.temperatures = algorithm.temperatures
        self.micro_batch: _MicroBatch | None = None
        self.sequences = 0.0
        """Sequences with a valid token in the collection, per data-parallel rank."""
        self.rows = 0
        """Rows of the collection, per data-parallel rank."""

    def calculate_loss(
        self,
        host: Callable,
        current_logprobs: Tensor,
        old_logprobs: Tensor,
        ref_logprobs: Tensor,
        advantages: Tensor,
        clamp_eps_lower: float,
        clamp_eps_upper: float,
        kl_beta: float,
        entropy_weight: float,
        inference_logprobs: Tensor | None = None,
        is_truncation_coef: float | None = None,
        seq_starts: Sequence[int] | None = None,
        seq_lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, ...]:
        """The host's six tensors ``[B, S]``; the last two say what GRPO would have clipped.

        The entropy term counts the sampled token alone, as the host's does.
        """
        logprobs, old = masked(current_logprobs, None), masked(old_logprobs, None)
        assert logprobs.shape == old.shape, f"log-probs {logprobs.shape}, old ones {old.shape}"
        if seq_starts is None or seq_lengths is None:
            rows = torch.arange(len(logprobs), device=logprobs.device)
            sequence_ids = rows.unsqueeze(1).expand_as(logprobs)
        else:
            sequence_ids = _in_bin(logprobs, seq_starts, seq_lengths)
            advantages = torch.cat([advantages, advantages.new_zeros(1)])
        log_ratio = logprobs - old
        token_advantages = advantages.view(-1)[sequence_ids]
        self.micro_batch = _MicroBatch(
            log_ratio.detach(), token_advantages, sequence_ids, advantages.numel()
        )
        r = Ratio.of(log_ratio, token_advantages)
        policy = sapo_loss(r, self.temperatures)
        if inference_logprobs is not None:
            cap = math.inf if is_truncation_coef is None else is_truncation_coef
            weights = safe_log_ratio(old - inference_logprobs, None).exp()
            policy = policy * weights.clamp(max=cap)
        kl = kl_penalty(logprobs, masked(ref_logprobs, None), "k3")
        entropy = -logprobs.exp() * logprobs
        above, below = r.ratio > 1 + clamp_eps_upper, r.ratio < 1 - clamp_eps_lower
        return policy + kl_beta * kl - entropy_weight * entropy, kl, r.ratio, entropy, above, below

    def counting(self, host: Callable, *args: Any, **kwargs: Any) -> Any:
        """``prepare_trajectories``, called once per collection on every data-parallel rank."""
        found = host(*args, **kwargs)
        generated = found[1]
        self.rows = len(generated)
        # Nothing predicts a first token.
        self.sequences = _data_parallel_mean(generated[:, 1:].any(1).sum())
        return found

    def stepping(self, host: Callable) -> Callable:
        """The host script's ``forward_step``, with its loss weighted and measured."""

        @functools.wraps(host)
        def forward_step(*args: Any, **kwargs: Any) -> Any:
            self._take()
            output, loss_func = host(*args, **kwargs)
            batch = self._take()
            if batch is None:  # a pipeline stage before the last
                return output, loss_func
            _check_reduction(loss_func)
            mask = (loss_func.args[0] > 0).flatten()
            ids = batch.sequence_ids.flatten()
            lengths = mask.new_zeros(batch.num_sequences, dtype=torch.int64)
            lengths.index_add_(0, ids, mask.long())
            weights = token_weights(
                mask, ids, lengths, ONE, "seq-mean-token-mean", max_response_length=1
            ) * (mask.sum() / self._sequences_per_micro_batch())
            r = Ratio.of(batch.log_ratio.flatten(), batch.advantages.flatten(), mask)
            measured = measure(r, self.temperatures, ids, lengths)
            weighted = output * weights.view_as(output).to(output.dtype)
            return weighted, functools.partial(_report, loss_func, measured)

        return forward_step

    def _take(self) -> _MicroBatch | None:
        """What the loss function saw since the last call."""
        batch, self.micro_batch = self.micro_batch, None
        return batch

    def _sequences_per_micro_batch(self) -> float:
        assert self.rows > 0, "rollouts come before training"
        context = find(HOST, RUNTIME_STATE)().packing_context
        if context is None:
            micro_batches = self.rows / _arguments().micro_batch_size
        else:
            micro_batches = len(context.packed_trajs)
        # Without any there is no token to weigh.
        return self.sequences / micro_batches or 1.0


class _ShardedLogprobs:
    """Log-probs from the logits as tensor parallelism shards them."""

    def __init__(self) -> None:
        self.tp_group: dist.ProcessGroup | None = None

    def getting(self, host: Callable, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``get_logprobs`` whose forward pass leaves the logits sharded."""
        from megatron.core.utils import get_attr_wrapped_model

        if getattr(_arguments(), "batch_invariant_mode", False):
            raise UserError(
                "--vocab_parallel_logprobs: expected it without --batch-invariant-mode, whose "
                "log-softmax is of the whole vocabulary, got both; remove one"
            )
        self.tp_group = get_attr_wrapped_model(model, "pg_collection").tp
        hook = model.register_forward_pre_hook(_leave_sharded, with_kwargs=True)
        try:
            return host(model, *args, **kwargs)
        finally:
            hook.remove()

    def select(self, host: Callable, logits: Tensor, index: Tensor) -> Tensor:
        """In the place of ``selective_log_softmax``: ``logits [B, S, V / tp]`` -> fp32 ``[B, S]``,
        with the padding of the vocabulary in the denominator, as in the host's."""
        return vocab_parallel_logprobs(logits, index, self.tp_group, inplace=False)[0]


def _leave_sharded(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    return args, {**kwargs, "runtime_gather_output": False}


def _in_bin(logprobs: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The sequence of each token of a bin ``[1, S]``; of none: one more than there are."""
    ids = torch.full_like(logprobs, len(lengths), dtype=torch.int64)
    # The starts have one more at their end; and a sequence has one log-prob less than tokens.
    for i, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        ids[0, start : max(start + length - 1, start)] = i
    return ids


def _report(loss_func: Callable, measured: Measured, output: Tensor) -> tuple:
    """The host's loss and report, and pairs (total, count) of ours, which it adds and divides."""
    loss, num_tokens, report = loss_func(output)
    parts = dict(measured.means)
    one = torch.ones((), dtype=torch.float64, device=loss.device)
    parts["lm loss"] = Part(loss.detach().double() / num_tokens, one)
    parts["sapo/bound_violations"] = Part(measured.violations, one / _micro_batches_of_a_step())
    return loss, num_tokens, report | {name: p.pair().float() for name, p in parts.items()}


def _finishing(host: Callable, *args: Any, **kwargs: Any) -> Any:
    """``train_step``, which returns the reduced report first."""
    report, *rest = host(*args, **kwargs)
    if "ratio/log_square" in report:
        report["ratio/log_var"] = report["ratio/log_square"].new_tensor(log_variance(report))
        # A mean over no token: no advantage was positive, say.
        for name in [name for name in report if name.startswith(("ratio/", "sapo/"))]:
            if report[name].isnan():
                del report[name]
    return (report, *rest)


def _check_reduction(loss_func: Callable) -> None:
    """Raises UserError unless the host reduces a micro-batch as the weights take it to."""
    function, bound = getattr(loss_func, "func", loss_func), getattr(loss_func, "args", ())
    found = ", ".join(inspect.signature(function).parameters)
    if found != LOSS_FUNC or len(bound) != LOSS_FUNC.count(","):
        raise UserError(
            f"loss_func of the script: expected ({LOSS_FUNC}) with all but the last bound, got "
            f"({found}) with {len(bound)} bound; take the train_rl.py of Megatron-LM "
            f"{HOST.verified}"
        )
    if _arguments().calculate_per_token_loss:
        raise UserError(
            "--calculate-per-token-loss: expected it off with SAPO, whose mean is by sequence, got "
            "it on; remove it"
        )


def _arguments() -> Any:
    from megatron.training import get_args

    return get_args()


def _data_parallel_mean(count: Tensor) -> float:
    from megatron.core import mpu

    group = mpu.get_data_parallel_group()
    total = count.to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)
    # Data-parallel group: each of its ranks has prepared its rows of this collection.
    dist.all_reduce(total, group=group)
    return float(total) / group.size()


def _micro_batches_of_a_step() -> int:
    """Over all data-parallel ranks."""
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches() * mpu.get_data_parallel_world_size()
