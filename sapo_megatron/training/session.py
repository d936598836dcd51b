"""A run's parts, opened together and closed together: policy, engine, scorer, trackers."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sapo_megatron.data.batch import data_parallel_ranks
from sapo_megatron.errors import RunFailed
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.policy import checkpoint, parallel
from sapo_megatron.policy.flops import Parameters
from sapo_megatron.policy.model import Model
from sapo_megatron.policy.parallel import ParallelGroups
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import to_plain
from sapo_megatron.recipe.schema import Recipe
from sapo_megatron.rollout.ahead import Ahead, Queue
from sapo_megatron.rollout.collect import Collector, Responses
from sapo_megatron.rollout.exchange import HeldRoutes, deliver_routes
from sapo_megatron.rollout.reward import Scorer
from sapo_megatron.runs.folder import (
    Place,
    RunFolder,
    checkpoints_at,
    find_place,
    find_run,
    hold,
    open_run,
)
from sapo_megatron.runs.history import home
from sapo_megatron.runs.journal import Journal
from sapo_megatron.runs.lock import Lock
from sapo_megatron.runs.state import RunState
from sapo_megatron.runs.timeline import idle_shares
from sapo_megatron.runs.trackers import RunTrackers, duration
from sapo_megatron.sample import Group, Sample
from sapo_megatron.training.coldstart import initial_weights
from sapo_megatron.training.engine import open_engine
from sapo_megatron.training.evaluate import evaluate
from sapo_megatron.training.inputs import Inputs
from sapo_megatron.training.observe import Observer
from sapo_megatron.training.show import shown_groups
from sapo_megatron.training.speed import Speed
from sapo_megatron.training.update import Updater

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """Every part of one run. Methods are collective over all ranks."""

    recipe: Recipe
    inputs: Inputs
    groups: ParallelGroups
    run: RunFolder
    start: Path
    """The weights that the run started from."""
    policy: Policy
    updater: Updater
    data_parallel: list[list[int]]
    """The ranks with the samples of each data-parallel rank."""
    collector: Collector
    ahead: Ahead
    trackers: RunTrackers | None
    """On the first rank."""
    lock: Lock | None
    """Likewise."""
    journal: Journal
    speed: Speed | None
    """On the first rank."""

    @property
    def first_step(self) -> int:
        return self.run.state.step + 1 if self.run.state else 1

    def collect(self, step: int) -> Responses:
        """This step's groups; those of ``rollout.async_steps`` more are there or under way then."""
        with self._saved_if_lost(step - 1):
            return self.ahead.collect()

    def deliver_routes(
        self, mini_batches: Sequence[Sequence[Sample]], held: Mapping[int, HeldRoutes]
    ) -> None:
        """Bring the rollout's routes to the ranks that train on them."""
        if not held:
            return
        cut, world = self.groups.micro_batching(self.recipe), self.groups.world
        for samples in mini_batches:
            places = data_parallel_ranks(samples, cut)
            readers = [self.data_parallel[place] for place in places]
            deliver_routes(samples, readers, held, world)

    def show(self, step: int, groups: Sequence[Group]) -> None:
        """Let the trackers show some of the groups that a step is about to train on."""
        if self.trackers and (most := self.recipe.logging.samples_per_step):
            self.trackers.show(step, shown_groups(groups, step, most, self.inputs.tokenizer))

    def evaluate(self, step: int, metrics: Metrics | None = None) -> dict[str, float]:
        """avg@k and pass@1 of the policy as it is after ``step``; the time it takes servers.

        That is no part of a rollout's, also where there are no ``metrics`` to add it to.
        """
        scores = evaluate(self.collector, self.inputs.problems, self.recipe, version=step)
        spent = self.collector.spent("time/eval")
        if metrics is not None:
            metrics.update(spent)
        return scores

    def evaluate_after(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The same after a step, which gets ``eval/*``."""
        with self._saved_if_lost(step, metrics), metrics.timed("time/eval"):
            scores = self.evaluate(step, metrics)
        if dist.get_rank() == 0:
            for name, value in scores.items():
                metrics.add(f"eval/{name}", Mean(value, 1.0))
        return scores

    def stop_requested(self) -> bool:
        """Whether somebody has asked the run to end after this step."""
        return parallel.on_first_rank(self.groups, lambda: self.run.stop_requested)

    def forget_stop_request(self) -> None:
        if dist.get_rank() == 0:
            self.run.forget_stop_request()

    def save(self, step: int, queue: Queue | None = None) -> None:
        """Write a checkpoint of what is trained up to ``step``.

        ``queue``: what was generated ahead then; None: nothing has come or gone since.
        """
        queue = queue or self.ahead.queue()
        state = RunState(
            step=step,
            start=os.path.relpath(self.start.resolve(), home(self.run.path.resolve())),
            model=self.inputs.arch.config,
            recipe=to_plain(self.recipe),
            data=self.inputs.source.digest(),
            cursor=queue.cursor,
            eval=self.journal.before,
            moments=self.journal.moments(),
            wall_s=self.journal.wall_s,
            world_size=dist.get_world_size(),
            updates=self.run.updates(step),
            ahead=queue.described(),
        )
        with parallel.failing_together(self.groups):
            if self.lock:
                self.lock.check()
        keep = self.recipe.checkpoint.keep
        checkpoint.save(self.policy, self.run.checkpoints, state, keep=keep, beside=queue.write)

    def log(self, step: int, metrics: Metrics) -> Metrics:
        """``metrics`` of all ranks, which trackers and journal have then."""
        metrics = metrics.gather(self.groups.world)
        for name, share in idle_shares(metrics).items():
            metrics.add(name, Mean(share, 1.0))
        self.journal.note(metrics)
        with parallel.failing_together(self.groups):
            if self.trackers:
                self.trackers.log(step, metrics)
        return metrics

    def finish(self, after: dict[str, float]) -> dict[str, Any]:
        """Write and return what ``summary.json`` says."""
        before, router = self.journal.before, self.journal.router()
        summary: dict[str, Any] = {
            "steps": self.recipe.train.steps,
            "wall_s": round(self.journal.wall_s, 1),
            "loss_type": self.recipe.algorithm.loss_type,
            "world_size": dist.get_world_size(),
            "eval": {"before": before, "after": after},
            "router": router,
            "report": str(self.run.path / "report" / "index.html"),
        }
        if dist.get_rank() == 0:
            self.run.write_summary(summary)
            logger.info("before: %s", shown(before))
            logger.info("after:  %s", shown(after))
            if told := self.journal.told():
                logger.info("router: %s (of the last measurements)", told)
            logger.info("took:   %s", duration(summary["wall_s"]))
            if self.recipe.logging.samples_per_step:
                logger.info("read what it wrote: sapo-megatron samples %s", self.run.path)
        return summary

    @contextmanager
    def _saved_if_lost(self, step: int, unlogged: Metrics | None = None) -> Iterator[None]:
        """What is trained up to ``step`` is saved where the engine fails in the block.

        The prompts that the block has drawn come again. ``unlogged``: of the step, logged then.
        """
        queue = self.ahead.queue()
        try:
            yield
        except RunFailed:
            if unlogged is not None:
                self.log(step, unlogged)
            if step >= self.first_step:
                self.save(step, queue)
            raise


def opened_run(
    stack: ExitStack,
    recipe: Recipe,
    inputs: Inputs,
    groups: ParallelGroups,
    resume: str | None,
    *,
    new_data: bool,
) -> tuple[RunFolder, Lock | None]:
    """The run's folder, which is this run's until ``stack`` ends, and the first rank's lock on it.

    ``resume`` as in :func:`find_place`, ``new_data`` as in :func:`open_run`. Collective over all
    ranks. Raises UserError where there is none to be had.
    """
    locks: list[Lock] = []

    def held() -> Place:
        place, lock = hold(find_place(recipe, resume), stack)
        locks.append(lock)
        return place

    place, data = parallel.on_first_rank(groups, held), inputs.source.digest()
    chosen = checkpoint.newest_whole(place.checkpoints, groups)
    run = parallel.on_first_rank(
        groups, lambda: open_run(recipe, inputs.arch, place, chosen, None if new_data else data)
    )
    logger.info("run folder: %s", run.path)
    return run, next(iter(locks), None)


@contextmanager
def open_session(
    inputs: Inputs, groups: ParallelGroups, run: RunFolder, lock: Lock | None, *, began: float
) -> Iterator[Session]:
    """The parts of ``run``, while the block lasts; ``began`` as in :class:`Journal`.

    What a resumed run has in its folder is left as it is until all that it goes on from is read.
    Collective over all ranks. Raises UserError for inputs that do not fit, RunFailed where rollout
    servers do not come up.
    """
    recipe = run.recipe
    with ExitStack() as stack:
        cursor = inputs.source.state_dict()
        start = run.start or initial_weights(recipe, inputs, groups, run.shared)
        inputs.source.load_state_dict(run.state.cursor if run.state else cursor)
        policy = _open_policy(stack, inputs.arch, groups, run, start, inputs.model)
        model, observer, reference = policy.model, None, None
        if recipe.algorithm.kl_coef > 0:
            reference = Model(recipe, inputs.arch, groups, start)
        if recipe.routing.observe:
            observer = Observer(recipe, model, run.path / "dumps")
        collector = _open_collector(stack, recipe, inputs, policy, run)
        ahead = Ahead(collector, inputs.source, recipe)
        if run.checkpoint and run.state:
            ahead.load(run.checkpoint, run.state)
        parallel.on_first_rank(groups, run.take_over)
        yield Session(
            recipe=recipe,
            inputs=inputs,
            groups=groups,
            run=run,
            start=start,
            policy=policy,
            data_parallel=parallel.data_parallel_blocks(groups),
            updater=Updater(recipe, policy, reference, observer),
            collector=collector,
            ahead=ahead,
            trackers=_open_trackers(stack, recipe, run),
            lock=lock,
            journal=Journal(run.state, began=began),
            speed=_open_speed(recipe, inputs.arch, policy),
        )


def evaluate_checkpoint(recipe: Recipe, inputs: Inputs, path: Path) -> dict[str, float]:
    """Scores of a run, or of one of its checkpoints, on the recipe's held-out problems.

    Collective over all processes. Raises UserError for a checkpoint that does not fit.
    """
    groups = parallel.setup(recipe.parallel, seed=recipe.train.seed)
    run = _found_run(recipe, inputs.arch, groups, path)
    with ExitStack() as stack:
        policy = _open_policy(stack, inputs.arch, groups, run, run.start, inputs.model)
        collector = _open_collector(stack, recipe, inputs, policy, run)
        return evaluate(collector, inputs.problems, recipe, version=0)


def export_checkpoint(
    recipe: Recipe, model: Path, arch: Architecture, path: Path, out: Path
) -> None:
    """Write the weights of a run, or of one of its checkpoints, as a Hugging Face folder.

    ``model``: the folder of the recipe's model. Collective over all processes. Raises UserError for
    a checkpoint that does not fit, RunFailed for weights that are not finite.
    """
    groups = parallel.setup(recipe.parallel, seed=recipe.train.seed)
    run = _found_run(recipe, arch, groups, path)
    with ExitStack() as stack:
        policy = _open_policy(stack, arch, groups, run, run.start, model)
        policy.model.weights.save(out, tokenizer=recipe.model.tokenizer)
    logger.info("exported in %s: %s", recipe.model.params_dtype, out)


def _found_run(recipe: Recipe, arch: Architecture, groups: ParallelGroups, path: Path) -> RunFolder:
    found = parallel.on_first_rank(groups, lambda: checkpoints_at(path, "--checkpoint"))
    chosen = checkpoint.newest_whole(found, groups)
    assert chosen, "there is one, or it was told"
    return parallel.on_first_rank(groups, lambda: find_run(recipe, arch, chosen))


def _open_policy(
    stack: ExitStack,
    arch: Architecture,
    groups: ParallelGroups,
    run: RunFolder,
    *places: Path | None,
) -> Policy:
    """The policy as the run's checkpoint has it, or else with the weights at the first place.

    What belongs beside its weights is at the first of the places that is there.
    """
    policy = Policy(
        run.recipe,
        arch,
        groups,
        next(place for place in places if place and (place / "config.json").exists()),
        optimizer=run.recipe.optimizer,
        total_updates=run.updates(run.recipe.train.steps),
        load=run.checkpoint is None,
    )
    stack.enter_context(closing(policy))
    if run.checkpoint and run.state:
        checkpoint.load(policy, run.checkpoint, run.state)
        logger.info("loaded %s", run.checkpoint)
    return policy


def _open_collector(
    stack: ExitStack, recipe: Recipe, inputs: Inputs, policy: Policy, run: RunFolder
) -> Collector:
    groups, nodes = policy.groups, None
    part, parts, gets_responses = 0, 1, dist.get_rank() == 0
    if recipe.rollout.engine != "vllm":
        part, parts = groups.dp_cp.rank(), groups.dp_cp.size()
        gets_responses = groups.is_leader
    elif not recipe.rollout.servers:
        nodes = parallel.nodes(groups)
        part, parts, gets_responses = nodes.number, len(nodes.firsts), nodes.is_first
    scorer: AbstractContextManager[Scorer | None] = nullcontext()
    if gets_responses:
        scorer = Scorer(recipe.reward)
    return Collector(
        scorer=stack.enter_context(scorer),
        engine=stack.enter_context(open_engine(recipe, inputs, policy, run.path, nodes)),
        tokenizer=inputs.tokenizer,
        stop_ids=inputs.endings.stop_ids,
        part=part,
        parts=parts,
        world=groups.world,
    )


def _open_speed(recipe: Recipe, arch: Architecture, policy: Policy) -> Speed | None:
    listing = policy.model.weights.listing()
    if dist.get_rank() > 0:
        return None
    return Speed(
        recipe=recipe,
        arch=arch,
        parameters=Parameters.listed(arch, listing),
        ranks=dist.get_world_size(),
        on_gpus=policy.groups.device.type == "cuda",
    )


def _open_trackers(stack: ExitStack, recipe: Recipe, run: RunFolder) -> RunTrackers | None:
    if dist.get_rank() > 0:
        return None
    trackers = RunTrackers(
        run.path,
        recipe.logging,
        to_plain(recipe),
        resume_step=run.state.step + 1 if run.state else None,
    )
    return stack.enter_context(trackers)


def shown(values: dict[str, float]) -> str:
    """``avg@8 0.421, pass@1 0.539``."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
