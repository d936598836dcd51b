"""SAPO in ms-swift's Megatron trainer, which has it: a recipe as its flags, and a loss that lasts.

:func:`flags` turns a recipe into its command line. Its loss takes exp of a log-ratio as it comes:
beyond 88 that is inf in fp32, with a NaN for a gradient. :func:`install`, called from a plugin
(``--external_plugins``), clamps the log-ratio that its SAPO loss sees, as ours does, and adds
``ratio/*`` and ``sapo/*`` to what it logs. Its other losses get what they always got.
"""

import dataclasses
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sapo_megatron.errors import UserError
from sapo_megatron.objective.ratio import MAX_LOG_RATIO, Ratio, masked
from sapo_megatron.patches.measure import log_variance, measure_rows
from sapo_megatron.patches.replace import Host, Symbol, check, replace, restore
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.sample import Temperatures

_BASE = "swift.megatron.trainers.base"
LOSS = Symbol(
    "swift.megatron.trainers.grpo_trainer",
    "MegatronGRPOTrainer.loss_func",
    "self, output_tensor, data",
)
LOG = Symbol(_BASE, "BaseMegatronTrainer._log_callback", "self, logs, n_steps")
HOST = Host(
    title="ms-swift",
    distribution="ms-swift",
    module="swift",
    verified="4.6.0",
    oldest="4.6.0",
    symbols=(
        LOSS,
        LOG,
        Symbol(_BASE, "BaseMegatronTrainer._all_reduce_metric", "self, metric, reduction, group"),
        Symbol(_BASE, "BaseMegatronTrainer._aggregated_metrics", "self, metrics, total_metrics"),
        Symbol(
            "swift.rl_core.data",
            "GRPOBatch",
            "completion_mask, truncated_mask, seq_lengths, old_per_token_logps, "
            "ref_per_token_logps, rollout_per_token_logps, teacher_per_token_logps, advantages, "
            "num_items_in_batch, logits_to_keep",
        ),
    ),
)

_LOSS_TYPES = {
    ("sapo", "seq-mean-token-mean"): "sapo",
    ("grpo", "seq-mean-token-mean"): "grpo",
    ("grpo", "token-mean"): "dapo",
    ("grpo", "seq-mean-token-sum-norm"): "dr_grpo",
    ("gspo", "seq-mean-token-mean"): "grpo",
    ("gspo", "token-mean"): "dapo",
    ("gspo", "seq-mean-token-sum-norm"): "dr_grpo",
    ("cispo", "token-mean"): "cispo",
}
"""(loss_type, loss_agg_mode) -> its ``--loss_type``, which says both."""
_ADVANTAGES = {"grpo": ("grpo", "group"), "dr_grpo": ("grpo", "none"), "rloo": ("rloo", "none")}
"""adv_estimator -> its ``--advantage_estimator`` and ``--scale_rewards``."""


def install() -> None:
    """Make ms-swift's SAPO loss safe from overflow, and report; twice is as once.

    Raises UserError for an ms-swift that does not fit.
    """
    check(HOST)
    replace(HOST, LOSS, _safe_loss)
    replace(HOST, LOG, _with_variance)


def uninstall() -> None:
    """Put ms-swift's own methods back."""
    restore(LOSS, LOG)


def _safe_loss(
    original: Callable[..., Any], self: Any, output_tensor: Tensor, data: dict[str, Any]
) -> tuple[Tensor, dict]:
    if self.loss_type != "sapo":
        return original(self, output_tensor, data)
    batch = data["grpo_batch"]
    mask = batch.completion_mask.bool()
    logprob = masked(output_tensor, mask)
    old_logprob = masked(batch.old_per_token_logps, mask)
    # Not the log-ratio plus old_logprob: where nothing is clamped, not a bit changes.
    clamped = logprob.clamp(old_logprob - MAX_LOG_RATIO, old_logprob + MAX_LOG_RATIO)
    safe_batch = dataclasses.replace(batch, old_per_token_logps=old_logprob)
    loss, report = original(self, clamped, {**data, "grpo_batch": safe_batch})
    measured = measure_rows(
        Ratio.of((logprob - old_logprob).detach(), batch.advantages, mask),
        Temperatures(self.tau_pos, self.tau_neg),
    )
    pairs = {name: part.pair() for name, part in measured.means.items()}
    violations = measured.violations
    pairs["sapo/bound_violations"] = torch.stack([violations, torch.zeros_like(violations)])
    # Data-parallel group, ms-swift's default here: all ranks of the last pipeline stage are at
    # the same micro-batch, and context-parallel ranks hold the same whole sequences.
    sums = self._all_reduce_metric(pairs, dist.ReduceOp.SUM)
    # A number per update, of as many micro-batches.
    sums["sapo/bound_violations"][1] = 1 / self.args.num_microbatches
    return loss, {**report, **sums}


def _with_variance(
    original: Callable[..., None], self: Any, logs: dict[str, Any], n_steps: int
) -> None:
    original(self, logs, n_steps)
    if "ratio/log_mean" in logs:
        logs["ratio/log_var"] = log_variance(logs)


def flags(recipe: Recipe) -> list[str]:
    """What ``megatron rlhf`` needs on its command line to train by ``recipe``.

    Without the data, the reward, where vLLM runs, evaluation, checkpoints and logging, which stay
    the user's to add. Raises UserError with every key that ms-swift has no words for.
    """
    if refused := list(_refused(recipe)):
        raise UserError(
            f"{recipe.name}: expected a recipe that the flags of ms-swift {HOST.verified} can "
            f"express, got {'; '.join(refused)}; change these or train with sapo-megatron"
        )
    groups = (_of_model, _of_batches, _of_algorithm, _of_optimizer)
    pairs = [("rlhf_type", "grpo"), *(pair for group in groups for pair in group(recipe))]
    words: list[str] = []
    for name, value in pairs:
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


_Flags = Iterator[tuple[str, Any]]


def _refused(recipe: Recipe) -> Iterator[str]:
    """Each key with a value that no flag expresses, and why."""
    model, algorithm, correction = recipe.model, recipe.algorithm, recipe.correction
    kl = algorithm.kl_coef > 0
    loss = algorithm.loss_type
    modes = [mode for name, mode in _LOSS_TYPES if name == loss]
    rules = (
        ("model.tokenizer", model.tokenizer is not None, "the model's own only"),
        ("model.init", model.init == "random", "pretrained weights only"),
        ("model.params_dtype", model.params_dtype == "float64", "no fp64"),
        (
            "parallel.virtual_pipeline_model_parallel_size",
            recipe.parallel.virtual_pipeline_model_parallel_size is not None,
            "its GRPO takes log-probs from the first chunk",
        ),
        (
            "rollout.async_steps",
            recipe.rollout.async_steps > 0,
            "its Megatron trainer waits for the responses",
        ),
        ("routing.replay_threshold", recipe.routing.replay_threshold > 0, "R3 replays all"),
        ("rollout.stop_token_ids", bool(recipe.rollout.stop_token_ids), "stop words only"),
        ("algorithm.loss_type", not modes, "no such loss"),
        (
            "algorithm.loss_agg_mode",
            bool(modes) and algorithm.loss_agg_mode not in modes,
            f"with {loss}, {' or '.join(modes)}",
        ),
        (
            "algorithm.clip_ratio_low",
            loss == "cispo" and algorithm.clip_range[0] < 1,
            "with cispo, no lower bound",
        ),
        (
            "algorithm.old_policy",
            algorithm.old_policy == "rollout",
            "its trainer computes old log-probs",
        ),
        ("algorithm.kl_type", kl and algorithm.kl_type != "k3", "k3 only"),
        ("algorithm.entropy_coef", algorithm.entropy_coef > 0, "no entropy term"),
        ("correction.rollout_is", correction.rollout_is == "icepop", "no lower bound"),
        (
            "correction.rollout_is",
            correction.rollout_is == "tis" and kl,
            "it would weight the KL term, too",
        ),
        (
            "correction.sequence_mask_kl",
            correction.sequence_mask_kl is not None,
            "its loss then takes every run for a distillation, and stops",
        ),
        ("optimizer.ess_scaling", recipe.optimizer.ess_scaling, "no such scaling"),
        ("cold_start.steps", recipe.cold_start.steps > 0, "a training run of its own there"),
    )
    for key, refused, reason in rules:
        if refused:
            yield f"{key} {attrgetter(key)(recipe)} ({reason})"


def _of_model(recipe: Recipe) -> _Flags:
    model, parallel = recipe.model, recipe.parallel
    yield "model", model.path
    yield "use_hf", True
    yield "torch_dtype", model.params_dtype
    yield "moe_router_dtype", model.moe_router_dtype
    yield "moe_aux_loss_coeff", model.moe_aux_loss_coeff
    tp = parallel.tensor_model_parallel_size
    yield "tensor_model_parallel_size", tp
    yield "sequence_parallel", tp > 1
    yield "pipeline_model_parallel_size", parallel.pipeline_model_parallel_size
    yield "context_parallel_size", parallel.context_parallel_size
    yield "expert_model_parallel_size", parallel.expert_model_parallel_size
    yield "expert_tensor_parallel_size", parallel.expert_tensor_parallel_size
    yield "recompute_granularity", parallel.recompute_granularity or "none"
    optional = {
        "decoder_first_pipeline_num_layers": parallel.num_layers_in_first_pipeline_stage,
        "decoder_last_pipeline_num_layers": parallel.num_layers_in_last_pipeline_stage,
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
        "recompute_modules": parallel.recompute_modules,
    }
    yield from ((name, value) for name, value in optional.items() if value is not None)
    yield "router_replay_mode", recipe.routing.router_replay


def _of_batches(recipe: Recipe) -> _Flags:
    rollout, train = recipe.rollout, recipe.train
    responses = rollout.rollout_batch_size * rollout.num_generations
    yield "train_iters", train.steps * train.num_mini_batches
    yield "num_generations", rollout.num_generations
    yield "generation_batch_size", responses
    yield "steps_per_generation", train.num_mini_batches
    yield "global_batch_size", responses // train.num_mini_batches
    # It weights micro-batches alike, whatever they hold: one response each weights responses alike.
    yield "micro_batch_size", 1
    yield "padding_free", train.packing
    yield "max_length", rollout.max_prompt_length
    yield "truncation_strategy", "delete"
    yield "max_completion_length", rollout.max_response_length
    yield "temperature", rollout.temperature
    yield "top_p", rollout.top_p
    yield "use_vllm", True
    apart = rollout.engine == "vllm" and not rollout.colocate
    yield "vllm_mode", "server" if apart else "colocate"
    yield "vllm_max_model_len", rollout.max_prompt_length + rollout.max_response_length
    if rollout.dynamic_sampling:
        yield "dynamic_sample", True
        yield "max_resample_times", rollout.dynamic_sampling_max_rounds
    yield "seed", train.seed
    if train.run_dir is not None:
        yield "output_dir", train.run_dir


def _of_algorithm(recipe: Recipe) -> _Flags:
    algorithm, correction = recipe.algorithm, recipe.correction
    loss = algorithm.loss_type
    yield "loss_type", _LOSS_TYPES[loss, algorithm.loss_agg_mode]
    yield "importance_sampling_level", "sequence" if loss == "gspo" else "token"
    if loss == "sapo":
        yield "tau_pos", algorithm.tau_pos
        yield "tau_neg", algorithm.tau_neg
    elif loss == "cispo":
        yield "epsilon_high", 1 + algorithm.clip_range[1]
    else:
        low, high = algorithm.clip_range
        yield "epsilon", low
        yield "epsilon_high", high
    if algorithm.clip_ratio_c is not None:
        yield "delta", algorithm.clip_ratio_c
    estimator, scale = _ADVANTAGES[algorithm.adv_estimator]
    yield "advantage_estimator", estimator
    yield "scale_rewards", scale
    yield "beta", algorithm.kl_coef
    yield "kl_in_reward", False
    if correction.rollout_is == "tis":
        yield "rollout_importance_sampling_mode", "token_truncate"
        yield "rollout_importance_sampling_threshold", correction.tis_cap


def _of_optimizer(recipe: Recipe) -> _Flags:
    optimizer = recipe.optimizer
    yield "lr", optimizer.lr
    yield "min_lr", optimizer.min_lr
    yield "lr_warmup_iters", optimizer.lr_warmup_steps
    yield "lr_decay_style", optimizer.lr_decay_style
    yield "weight_decay", optimizer.weight_decay
    yield "adam_beta1", optimizer.adam_beta1
    yield "adam_beta2", optimizer.adam_beta2
    yield "adam_eps", optimizer.adam_eps
    yield "clip_grad", optimizer.clip_grad
    if optimizer.optimizer_offload_fraction > 0:
        yield "optimizer_cpu_offload", True
        yield "use_precision_aware_optimizer", True
        yield "optimizer_offload_fraction", optimizer.optimizer_offload_fraction
