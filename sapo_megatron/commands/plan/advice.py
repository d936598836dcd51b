"""Changes to a recipe that does not fit with which it does, each one planned before it is said."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sapo_megatron.errors import UserError
from sapo_megatron.recipe.schema import Recipe

WANTED = 2
TRIALS = 120
"""Combinations that are planned at most."""
ROOM = 0.95
"""Share of the memory that a change may leave in use: what is estimated is not exact."""

Settings = dict[str, Any]
"""``section.key`` -> value."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    settings: Settings
    total_gib: float
    """What a GPU of the worst stage then needs."""

    @property
    def words(self) -> str:
        """The settings as they stand on a command line."""
        yaml = {key: "null" if v is None else v for key, v in self.settings.items()}
        return " ".join(f"{key}={value}" for key, value in yaml.items())


def suggestions(
    recipe: Recipe, largest: str, memory_gib: float, needed: Callable[[Recipe], float]
) -> list[Suggestion]:
    """At most two changes with which ``recipe`` fits into ``memory_gib``.

    Single changes come before pairs, and before all others those that relieve the ``largest``
    part; where no pair will do, as many as it takes, without and with more nodes. ``needed`` plans
    a recipe: GiB on its worst GPU. Where it raises UserError, that change is ruled out.
    """

    def total(settings: Settings) -> float:
        try:
            return needed(changed(recipe, settings))
        except UserError:
            return math.inf

    limit = ROOM * memory_gib
    kinds = sorted(_kinds(recipe), key=lambda kind: largest not in kind[0])
    others = [[step for step in steps if changed(recipe, step) != recipe] for _, steps in kinds]
    ladders = [steps for steps in others if steps]
    found = list(itertools.islice(_few(ladders, total, limit), WANTED))
    if not found:
        here = [steps for steps in ladders if "cluster.nodes" not in steps[0]]
        many = [_many(chosen, total, limit) for chosen in (here, ladders)]
        found = [s for s in many if s is not None]
    return found[:1] if found[:1] == found[1:] else found


def _few(
    ladders: list[list[Settings]], total: Callable[[Settings], float], limit: float
) -> Iterator[Suggestion]:
    """The smallest steps that will do, of each one or two ladders."""
    trials = 0
    for size in (1, 2):
        for chosen in itertools.combinations(ladders, size):
            for steps in itertools.product(*chosen):
                settings = {key: value for step in steps for key, value in step.items()}
                trials += 1
                if (gib := total(settings)) <= limit:
                    yield Suggestion(settings=settings, total_gib=gib)
                    break
            if trials > TRIALS:
                return


def _many(
    ladders: list[list[Settings]], total: Callable[[Settings], float], limit: float
) -> Suggestion | None:
    """The step that helps most, again until it fits, and then each as small as may be.

    None where no step helps any more and it does not fit.
    """
    settings: Settings = {}
    left, taken, gib = list(ladders), [], total({})
    while gib > limit:
        trials = [(total(settings | step), steps, step) for steps in left for step in steps]
        best, steps, step = min(trials, key=lambda trial: trial[0], default=(gib, [], {}))
        if best >= gib:
            return None
        settings, gib = settings | step, best
        left.remove(steps)
        taken.append(steps)
    for steps in taken:
        settings |= next(step for step in steps if total(settings | step) <= limit)
    return Suggestion(settings=settings, total_gib=total(settings))


def changed(recipe: Recipe, settings: Settings) -> Recipe:
    """``recipe`` with ``settings`` in the place of its own."""
    sections: dict[str, Settings] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    parts = vars(recipe)
    new = {name: dataclasses.replace(parts[name], **values) for name, values in sections.items()}
    return dataclasses.replace(recipe, **new)


def _kinds(recipe: Recipe) -> list[tuple[tuple[str, ...], list[Settings]]]:
    """(parts it makes smaller, steps from the smallest change on) of each kind of change."""
    model, nodes = ("weights", "gradients"), recipe.cluster.nodes
    return [
        (("optimizer",), _offload(recipe)),
        (("activations",), _recompute(recipe)),
        (("activations", "logprobs"), _micro_batch(recipe)),
        (("logprobs",), [{"train.logprob": "fused"}]),
        (("kv_cache", "generation", "server"), _generation(recipe)),
        (model, _doubled(recipe, "expert_model_parallel_size")),
        ((*model, "kv_cache"), _doubled(recipe, "pipeline_model_parallel_size")),
        ((*model, "activations", "logprobs"), _doubled(recipe, "tensor_model_parallel_size")),
        (("batches", "optimizer"), [{"cluster.nodes": nodes * n} for n in (2, 4) if nodes]),
    ]


def _offload(recipe: Recipe) -> list[Settings]:
    key, now = "optimizer.optimizer_offload_fraction", recipe.optimizer.optimizer_offload_fraction
    return [{key: fraction} for fraction in (0.5, 0.75, 1.0) if fraction > now]


def _recompute(recipe: Recipe) -> list[Settings]:
    full: Settings = {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
    }
    modules = recipe.parallel.recompute_modules
    return [full | ({"parallel.recompute_modules": None} if modules else {})]


def _micro_batch(recipe: Recipe) -> list[Settings]:
    cp = recipe.parallel.context_parallel_size
    longest = recipe.rollout.max_prompt_length + recipe.rollout.max_response_length
    least = -(-longest // (2 * cp)) * 2
    return [{"train.max_tokens_per_gpu": least}] if least < recipe.train.max_tokens_per_gpu else []


def _generation(recipe: Recipe) -> list[Settings]:
    r = recipe.rollout
    if r.colocate:
        now, key = r.gpu_memory_utilization, "rollout.gpu_memory_utilization"
        offload: Settings = {"rollout.colocate_offload": "weights"}
        shares = [{key: share} for share in (0.8, 0.7, 0.6, 0.5) if share < now]
        return [offload, *shares, *(offload | share for share in shares)]
    if r.engine == "vllm":
        return []
    sizes, size = [], r.generation_batch_size
    while size > 1:
        size //= 2
        sizes.append({"rollout.generation_batch_size": size})
    return sizes


def _doubled(recipe: Recipe, size: str) -> list[Settings]:
    now = vars(recipe.parallel)[size]
    return [{f"parallel.{size}": now * factor} for factor in (2, 4, 8)]
