"""Supervised warm-up: a model that answers some problems, so that RL has something to go on.

The result is an ordinary Hugging Face folder, kept under the recipe's run folders and used again
by every run that would come to the same weights.
"""

import dataclasses
import functools
import hashlib
import logging
import math
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.errors import RunFailed
from sapo_megatron.metrics import Metrics, Sum
from sapo_megatron.objective.reduce import token_weights
from sapo_megatron.policy import parallel, weights
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.schema import OptimizerConfig, Recipe
from sapo_megatron.sample import Denominators, PackedBatch
from sapo_megatron.training.inputs import Inputs, demonstrations

logger = logging.getLogger(__name__)

LOG_EVERY = 50
INITIALISATION = 2
"""Counts the ways in which random weights were drawn: what another way made is not used again."""


def initial_weights(recipe: Recipe, inputs: Inputs, groups: ParallelGroups, root: Path) -> Path:
    """The Hugging Face folder that training starts from, made below ``root`` if it is not there.

    Moves the source's cursor. Collective over all ranks.
    """
    start = inputs.model
    if recipe.model.init == "random":
        start = root / f"random-{_model_key(recipe, inputs)}"

        def make() -> None:
            if not start.exists():
                weights.save_random(inputs.arch, recipe.model, start, seed=recipe.train.seed)

        parallel.on_first_rank(groups, make)
    if recipe.cold_start.steps == 0:
        return start
    warm = root / f"cold-start-{_key(recipe, inputs)}"
    # Asked once for all: another run may be about to make it.
    if parallel.on_first_rank(groups, warm.exists):
        logger.info("cold start: using %s", warm)
    else:
        _train(recipe, inputs, groups, start, warm)
    return warm


def supervised_loss(
    batch: PackedBatch, logprob: Tensor, entropy: Tensor, *, denominators: Denominators
) -> tuple[Tensor, Metrics]:
    """This piece's part of the mean over sequences of the mean negative log-likelihood."""
    weights = token_weights(
        batch.mask, batch.sequence_ids, batch.lengths, denominators, "seq-mean-token-mean", 1
    )
    loss = -(weights.to(logprob.dtype) * logprob).sum()
    metrics = Metrics()
    metrics.add("actor/pg_loss", Sum(loss.detach()))
    return loss, metrics


def _train(
    recipe: Recipe, inputs: Inputs, groups: ParallelGroups, start: Path, target: Path
) -> None:
    config = recipe.cold_start
    logger.info("cold start: %d supervised steps, once for all runs of this recipe", config.steps)
    policy = Policy(
        recipe,
        inputs.arch,
        groups,
        start,
        optimizer=_optimizer(recipe),
        total_updates=config.steps,
    )
    with closing(policy):
        for step in range(1, config.steps + 1):
            metrics = _step(policy, recipe, inputs, step)
            if step % LOG_EVERY == 0 or step == config.steps:
                loss = metrics.gather(groups.world).values().get("actor/pg_loss", math.nan)
                logger.info("cold start: step %d/%d | loss %.3f", step, config.steps, loss)
        _check(policy, recipe, inputs)
        policy.model.weights.save(target)


def _check(policy: Policy, recipe: Recipe, inputs: Inputs) -> None:
    """Raise RunFailed where the weights give no numbers. Collective over all ranks."""
    cut = policy.groups.micro_batching(recipe)
    if not all(map(math.isfinite, policy.logprobs(demonstrations(recipe, inputs), cut))):
        raise RunFailed(
            f"cold start: expected finite log-probs of the weights behind its {policy.updates} "
            f"updates, got NaN or infinity, so they are not kept; lower cold_start.lr"
        )


def _step(policy: Policy, recipe: Recipe, inputs: Inputs, step: int) -> Metrics:
    samples = demonstrations(recipe, inputs)
    batches = micro_batches(samples, policy.groups.micro_batching(recipe))
    metrics, _ = policy.update(
        [batch.to(policy.groups.device) for batch in batches],
        functools.partial(supervised_loss, denominators=denominators(samples)),
        where=f"cold start, step {step}",
    )
    return metrics


def _optimizer(recipe: Recipe) -> OptimizerConfig:
    return dataclasses.replace(
        recipe.optimizer,
        lr=recipe.cold_start.lr,
        min_lr=0.0,
        lr_warmup_steps=recipe.cold_start.lr_warmup_steps,
        lr_decay_style="constant",
        ess_scaling=False,
    )


def _key(recipe: Recipe, inputs: Inputs) -> str:
    """Stands for everything that the weights depend on; the layout is not among it."""
    beginning = inputs.source.state_dict()
    first = [(s.prompt_tokens, s.response_tokens) for s in demonstrations(recipe, inputs)]
    inputs.source.load_state_dict(beginning)
    return _digest(
        _model_key(recipe, inputs),
        recipe.data,
        inputs.source.digest(),
        sorted(problem.text for problem in inputs.problems),  # they are left out of training
        first,  # and with them the tokenizer
        recipe.rollout.max_prompt_length,
        recipe.rollout.temperature,
        recipe.eval.num_problems,
        recipe.cold_start,
        _optimizer(recipe),
        recipe.train.seed,
    )


def _model_key(recipe: Recipe, inputs: Inputs) -> str:
    """Stands for the weights before any training, as far as the recipe says."""
    return _digest(
        INITIALISATION, recipe.model, sorted(inputs.arch.config.items()), recipe.train.seed
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
