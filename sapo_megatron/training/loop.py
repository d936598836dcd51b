"""The training loop.

    prompts --generate--> responses --reward--> groups --advantage--> mini-batches
       ^                                                                   |
       |                                              packed micro-batches v
       +---- weights <--optimizer step-- loss <--gate-- ratio <-- old and current log-probs

Every rank runs every line; what is collective says so where it is defined.
"""

import functools
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from sapo_megatron.data.batch import denominators, micro_batches, split_mini_batches
from sapo_megatron.errors import RunFailed
from sapo_megatron.metrics import Max, Mean, Metrics
from sapo_megatron.objective.advantage import group_advantages
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.step import FrozenPolicy, Policy
from sapo_megatron.recipe.load import to_yaml
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.collect import Collector, Engine, rewards
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.runs import folder as runs
from sapo_megatron.runs.folder import RunFolder
from sapo_megatron.runs.state import RunState, identity, layout
from sapo_megatron.runs.trackers import Progress, RunTrackers, duration
from sapo_megatron.sample import Group, PackedBatch
from sapo_megatron.training.coldstart import initial_weights
from sapo_megatron.training.engine import open_engine
from sapo_megatron.training.evaluate import evaluate
from sapo_megatron.training.inputs import Inputs
from sapo_megatron.training.observe import RouterWatch

logger = logging.getLogger(__name__)

ROUTER = ("variance/total", "variance/router_share", "routing/flip_fraction")
"""What the summary says of the router."""


def train(recipe: Recipe, inputs: Inputs, resume: str | None = None) -> dict[str, Any] | None:
    """A whole run, on every process of it. Returns what ``summary.json`` says.

    None for a run that was asked to stop (:class:`~sapo_megatron.runs.folder.RunFolder`) before
    its end.

    ``resume`` as in :func:`sapo_megatron.runs.folder.open_run`.
    """
    groups = parallel.setup(recipe.parallel, seed=recipe.train.seed)
    run = parallel.on_first_rank(groups, lambda: runs.open_run(recipe, inputs.arch, resume))
    logger.info("run folder: %s", run.path)
    return Trainer(recipe, inputs, groups, run).train()


def export_checkpoint(recipe: Recipe, inputs: Inputs, path: Path, out: Path) -> None:
    """Write the weights of a run, or of one of its checkpoints, as a Hugging Face folder."""
    groups = parallel.setup(recipe.parallel, seed=recipe.train.seed)
    run = parallel.on_first_rank(groups, lambda: runs.find_run(recipe, inputs.arch, path))
    trainer = Trainer(recipe, inputs, groups, run)
    trainer.policy.checkpoint.save(out, tokenizer=recipe.model.tokenizer)
    logger.info("exported: %s", out)


def evaluate_checkpoint(recipe: Recipe, inputs: Inputs, path: Path) -> dict[str, float]:
    """Scores of a run, or of one of its checkpoints, on the recipe's held-out problems."""
    groups = parallel.setup(recipe.parallel, seed=recipe.train.seed)
    run = parallel.on_first_rank(groups, lambda: runs.find_run(recipe, inputs.arch, path))
    return Trainer(recipe, inputs, groups, run).evaluate()


class Trainer:
    """One run: its policy, its data, its folder."""

    def __init__(
        self, recipe: Recipe, inputs: Inputs, groups: ParallelGroups, run: RunFolder
    ) -> None:
        self.recipe = recipe
        self.inputs = inputs
        self.groups = groups
        self.run = run
        self.is_main = dist.get_rank() == 0
        cursor = inputs.source.state_dict()
        state = run.state
        self.start = run.start or initial_weights(recipe, inputs, groups, run.shared)
        self.policy = Policy(
            recipe,
            inputs.arch,
            groups,
            self.start,
            optimizer=recipe.optimizer,
            total_updates=recipe.train.steps * recipe.train.num_mini_batches,
        )
        self.reference = (
            FrozenPolicy(recipe, inputs.arch, groups, self.start)
            if recipe.algorithm.kl_coef > 0
            else None
        )
        self.watch = RouterWatch(recipe, self.policy, run.path / "dumps")
        self.first_step = state.step + 1 if state else 1
        self.eval_before: dict[str, float] = state.eval if state else {}
        self.began = time.monotonic() - (state.wall_s if state else 0.0)
        self.router: dict[str, float] = state.router if state else {}
        inputs.source.load_state_dict(state.cursor if state else cursor)
        if run.checkpoint and state:
            checkpoint.load(self.policy, run.checkpoint, state)
            logger.info("loaded %s", run.checkpoint)

    def evaluate(self) -> dict[str, float]:
        """avg@k and pass@1 of the policy as it is."""
        with self._scorer() as scorer, self._engine() as engine:
            return self._evaluate(self._collector(scorer, engine))

    def train(self) -> dict[str, Any] | None:
        """Run to the end. Returns what ``summary.json`` says; None if it was asked to stop."""
        recipe = self.recipe
        with (
            self._scorer() as scorer,
            self._engine() as engine,
            self._trackers() as trackers,
        ):
            collector = self._collector(scorer, engine)
            if not self.eval_before:
                self.eval_before = self._evaluate(collector)
                logger.info("before: %s", _shown(self.eval_before))
            if self.is_main:
                self.run.forget_stop_request()  # one that came too late for the run before
            progress = Progress(recipe.train.steps)
            after = self.eval_before
            if self.first_step > max(recipe.train.steps, 1):  # a finished run, resumed
                after = self._evaluate(collector)
            for step in range(self.first_step, recipe.train.steps + 1):
                metrics = self._step(step, collector)
                if _due(step, recipe.eval.every) or step == recipe.train.steps:
                    cursor = collector.cursor(self.inputs.source)
                    with self._kept(step, cursor), _timed(metrics, "time/eval"):
                        after = self._evaluate(collector)
                    if self.is_main:
                        for name, value in after.items():
                            metrics.add(f"eval/{name}", Mean(value, 1.0))
                metrics = metrics.gather(self.groups.world)
                self._keep_router(metrics)
                stop = parallel.on_first_rank(self.groups, lambda: self.run.stop_requested)
                if _due(step, recipe.checkpoint.every) or step == recipe.train.steps or stop:
                    with _timed(metrics, "time/checkpoint"):
                        self._save(step, collector.cursor(self.inputs.source))
                if trackers:
                    trackers.log(step, metrics)
                    progress.log(step, metrics)
                if stop and self.is_main:
                    self.run.forget_stop_request()
                if stop and step < recipe.train.steps:
                    logger.info("stopped after step %d, as asked; --resume auto goes on", step)
                    return None
        return self._finish(after)

    def _step(self, step: int, collector: Collector) -> Metrics:
        recipe, groups = self.recipe, self.groups
        began = time.monotonic()
        collected, metrics = self._collect(step, collector)
        _set_advantages(collected, recipe.algorithm.adv_estimator)

        mini_batches = split_mini_batches(collected, recipe.train.num_mini_batches)
        place = groups.batch_layout(recipe)
        packed = [
            [b.to(groups.device) for b in micro_batches(samples, **place)]
            for samples in mini_batches
        ]
        with _timed(metrics, "time/logprob"):
            metrics.update(self._set_old_logprobs([b for batches in packed for b in batches]))
        with _timed(metrics, "time/update"):
            for number, (samples, batches) in enumerate(zip(mini_batches, packed, strict=True)):
                loss = functools.partial(
                    policy_loss,
                    algorithm=recipe.algorithm,
                    denominators=denominators(samples),
                    max_response_length=recipe.rollout.max_response_length,
                    correction=recipe.correction,
                    cp_group=groups.cp,
                )
                where = f"step {step}, mini-batch {number + 1} of {len(packed)}"
                metrics.update(
                    self.watch.update(batches, loss, step=step, mini_batch=number, where=where)
                )
        seconds = time.monotonic() - began
        metrics.add("perf/step_s", Max(seconds))
        if self.is_main:
            samples = [s for g in collected for s in g.samples]
            tokens = sum(len(s.prompt_tokens) + len(s.response_tokens) for s in samples)
            metrics.add("perf/tokens_per_s", Mean(tokens / seconds, 1.0))
        return metrics

    def _collect(self, step: int, collector: Collector) -> tuple[list[Group], Metrics]:
        """This step's groups; with ``rollout.async_steps``, the next step's are under way then."""
        source, seed = self.inputs.source, self.recipe.train.seed
        with self._kept(step - 1, collector.cursor(source)):
            collected = collector.collect(source, seed=seed)
            if self.recipe.rollout.async_steps and step < self.recipe.train.steps:
                collector.begin(source, seed=seed)
        return collected

    @contextmanager
    def _kept(self, step: int, cursor: dict[str, Any]) -> Iterator[None]:
        """What is trained up to ``step`` is not lost where the engine fails in the block."""
        try:
            yield
        except RunFailed:
            if step >= self.first_step:
                self._save(step, cursor)
            raise

    def _set_old_logprobs(self, batches: list[PackedBatch]) -> Metrics:
        if self.reference:
            for batch, forward in zip(batches, self.reference.forward(batches), strict=True):
                batch.ref_logprob = forward.logprob
        return self.watch.set_old_logprobs(batches)

    def _keep_router(self, metrics: Metrics) -> None:
        """The last finite values of what the summary says of the router."""
        values = metrics.values()
        for name in ROUTER:
            if math.isfinite(values.get(name, math.nan)):
                self.router[name] = values[name]

    def _evaluate(self, collector: Collector) -> dict[str, float]:
        return evaluate(collector, self.inputs.problems, self.recipe)

    def _save(self, step: int, cursor: dict[str, Any]) -> None:
        checkpoint.save(
            self.policy,
            self.run.checkpoints,
            RunState(
                step=step,
                start=os.path.relpath(self.start, self.run.path),
                model=identity(self.recipe, self.inputs.arch),
                cursor=cursor,
                eval=self.eval_before,
                router=self.router,
                wall_s=time.monotonic() - self.began,
                layout=layout(self.recipe.parallel),
                world_size=dist.get_world_size(),
            ),
            keep=self.recipe.checkpoint.keep,
        )

    def _engine(self) -> AbstractContextManager[Engine]:
        return open_engine(self.recipe, self.inputs, self.policy, self.run.path)

    def _scorer(self) -> Any:
        """On the ranks that get responses: leaders, or the one that speaks to the servers."""
        in_process = self.recipe.rollout.engine == "in_process"
        scores = self.groups.is_leader if in_process else self.is_main
        return Scorer(self.recipe.reward) if scores else nullcontext()

    def _trackers(self) -> Any:
        if not self.is_main:
            return nullcontext()
        return RunTrackers(
            self.run.path,
            self.recipe.logging,
            yaml.safe_load(to_yaml(self.recipe)),
            resume_step=self.first_step if self.run.checkpoint else None,
        )

    def _collector(self, scorer: Scorer | None, engine: Engine) -> Collector:
        whole = engine.background  # one rank asks for all
        return Collector(
            engine=engine,
            tokenizer=self.inputs.tokenizer,
            scorer=scorer,
            config=self.recipe.rollout,
            part=0 if whole else self.groups.dp_cp.rank(),
            parts=1 if whole else self.groups.dp_cp.size(),
            world=self.groups.world,
        )

    def _finish(self, after: dict[str, float]) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "steps": self.recipe.train.steps,
            "wall_s": round(time.monotonic() - self.began, 1),
            "loss_type": self.recipe.algorithm.loss_type,
            "world_size": dist.get_world_size(),
            "eval": {"before": self.eval_before, "after": after},
            "router": self.router,
            "report": str(self.run.path / "report" / "index.html"),
        }
        if self.is_main:
            self.run.write_summary(summary)
            logger.info("before: %s", _shown(self.eval_before))
            logger.info("after:  %s", _shown(after))
            if self.router:
                logger.info("router: %s (last measured)", _shown(self.router, "{} {:.2g}"))
            logger.info("took:   %s", duration(summary["wall_s"]))
        return summary


def _set_advantages(groups: list[Group], estimator: str) -> None:
    for group, row in zip(groups, group_advantages(rewards(groups), estimator), strict=True):
        for sample, advantage in zip(group.samples, row.tolist(), strict=True):
            sample.advantage = advantage


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(values: dict[str, float], form: str = "{} {:.3f}") -> str:
    return ", ".join(form.format(*item) for item in values.items())


@contextmanager
def _timed(metrics: Metrics, name: str) -> Iterator[None]:
    """Seconds of a stage; once gathered, those of the rank where it took longest."""
    began = time.monotonic()
    yield
    metrics.add(name, Max(time.monotonic() - began))
