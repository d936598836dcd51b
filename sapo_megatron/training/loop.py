"""The training loop.

    prompts --generate--> responses --reward--> groups --advantage--> mini-batches
       ^                                                                   |
       |                                              packed micro-batches v
       +---- weights <--optimizer step-- loss <--gate-- ratio <-- old and current log-probs

Every rank runs every line; what is collective says so where it is defined.
"""

import logging
import time
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist

from sapo_megatron.data.batch import denominators, micro_batches, split_mini_batches
from sapo_megatron.launcher import noting
from sapo_megatron.metrics import Metrics, Spans, now
from sapo_megatron.policy import parallel
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.runs.trackers import Progress
from sapo_megatron.training.inputs import Inputs
from sapo_megatron.training.observe import due
from sapo_megatron.training.session import Session, open_session, opened_run, shown
from sapo_megatron.training.update import set_advantages

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe, inputs: Inputs, resume: str | None = None, *, new_data: bool = False
) -> dict[str, Any] | None:
    """A whole run, on every process of it. Returns what ``summary.json`` says.

    None for a run that was asked to stop (:class:`~sapo_megatron.runs.folder.RunFolder`) before
    its end. ``resume`` as in :func:`~sapo_megatron.runs.folder.find_place`, ``new_data`` as in
    :func:`~sapo_megatron.runs.folder.open_run`. Raises
    UserError for inputs that do not fit, RunFailed for a run that cannot go on.
    """
    began = time.monotonic()
    groups = parallel.setup(recipe.parallel, seed=recipe.train.seed)
    with ExitStack() as stack:
        run, lock = opened_run(stack, recipe, inputs, groups, resume, new_data=new_data)
        stack.enter_context(noting(run.path, dist.get_rank()))
        session = stack.enter_context(open_session(inputs, groups, run, lock, began=began))
        return run_steps(session)


def run_steps(session: Session) -> dict[str, Any] | None:
    """From the evaluation before the first step to the summary behind the last."""
    recipe, journal, steps = session.recipe, session.journal, session.recipe.train.steps
    if not journal.before:
        journal.before = session.evaluate(session.first_step - 1)
        logger.info("before: %s", shown(journal.before))
    session.forget_stop_request()  # one that came too late for the run before
    scores, progress, saving = journal.before, Progress(steps), Metrics()
    if session.first_step > max(steps, 1):  # a finished run, resumed
        scores = session.evaluate(session.first_step - 1)
    for step in range(session.first_step, steps + 1):
        metrics = run_step(session, step)
        metrics.update(saving)
        if step == steps or due(step, recipe.eval.every):
            scores = session.evaluate_after(step, metrics)
        metrics = session.log(step, metrics)
        progress.log(step, metrics)
        stop, saving = session.stop_requested(), Metrics()
        # Behind its line: one whose checkpoint is missing is written again, one without is lost.
        if step == steps or stop or due(step, recipe.checkpoint.every):
            with saving.timed("time/checkpoint"):
                session.save(step)
        if stop:
            session.forget_stop_request()
        if stop and step < steps:
            logger.info("stopped after step %d, as asked; --resume auto goes on", step)
            return None
    return session.finish(scores)


def run_step(session: Session, step: int) -> Metrics:
    """A rollout batch, and the updates on it."""
    recipe, groups, updater = session.recipe, session.groups, session.updater
    began = now()
    collected = session.collect(step)
    metrics = collected.metrics
    set_advantages(collected.groups, recipe.algorithm.adv_estimator)
    session.show(step, collected.groups)

    parts = split_mini_batches(collected.groups, recipe.train.num_mini_batches)
    # One without a token makes no update: momentum alone would move the weights.
    mini_batches = [samples for samples in parts if denominators(samples).tokens]
    with metrics.timed("time/exchange"):
        session.deliver_routes(mini_batches, collected.held)
    cut = groups.micro_batching(recipe)
    packed = [
        [batch.to(groups.device) for batch in micro_batches(samples, cut)]
        for samples in mini_batches
    ]
    with metrics.timed("time/logprob"):
        packed, found = updater.old_logprobs(packed, step=step)
        metrics.update(found)
    with metrics.timed("time/update"):
        for number, (samples, batches) in enumerate(zip(mini_batches, packed, strict=True)):
            sizes = denominators(samples)
            metrics.update(updater.update(batches, sizes, step=step, mini_batch=number))

    metrics.update(session.collector.spent("time/rollout"))
    metrics.add("perf/step_s", Spans.since(began))
    if session.speed:
        samples = [sample for group in collected.groups for sample in group.samples]
        lengths = [len(s.prompt_tokens) + len(s.response_tokens) for s in samples]
        metrics.update(session.speed.measure(lengths, metrics, now() - began))
    return metrics
