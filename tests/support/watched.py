"""What ``test_observe`` runs on ranks: whole steps whose routers are watched and told."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sapo_megatron.data.batch import denominators, micro_batches
from sapo_megatron.metrics import Metrics
from sapo_megatron.policy import parallel
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.routers import LayerRouter
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.generate import generate
from sapo_megatron.rollout.reward import Scoring
from sapo_megatron.sample import Prompt, Sample
from sapo_megatron.training import observe, session
from sapo_megatron.training.coldstart import initial_weights
from sapo_megatron.training.inputs import read_inputs
from sapo_megatron.training.observe import Observer
from sapo_megatron.training.update import Updater
from tests.support.tiny import read_metrics, varied, write_recipe
from tests.support.whole_runs import run, without_reports_and_checkpoints

MIXED = {"num_hidden_layers": 4, "mlp_only_layers": [1], "intermediate_size": 64}
EVERY_UPDATE = {"decompose_every": 1, "prob_every": 2}


class Varied:
    """A scorer without a process of its own, of which many would have to start."""

    def __init__(self, config: Any) -> None: ...

    def __enter__(self) -> "Varied":
        return self

    def __exit__(self, *args: object) -> None: ...

    def begin(self, prompt: Prompt, sample: Sample) -> Scoring:
        sample.reward = varied(prompt, sample.text)
        return Scoring(prompt, sample, Future())

    def finish(self, begun: Any) -> Metrics:
        return Metrics()


def steps(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics of one step of each case, in fp64; a case changes the recipe."""
    without_reports_and_checkpoints()
    observe.BOTH_ORDERS = 1
    session.Scorer = Varied
    session.evaluate = lambda *args, **kwargs: {"avg@1": 0.0}  # most of the time otherwise
    if dist.get_rank() == 0:
        write_recipe(
            folder,
            arch=MIXED,
            model={"path": "model", "params_dtype": "float64"},
            routing=EVERY_UPDATE,
            eval={"num_problems": 1, "k": 1},
        )
    dist.barrier()
    found = {}
    for name, changes in cases.items():
        run(folder, train__run_dir=folder / name, **changes)
        found[name] = read_metrics(folder / name)[-1]
    return found


def engines(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is seen of rollouts by engines that differ from training in one known place or two.

    Of each case with both, and of the first with either, in each mode of replay.
    """
    if dist.get_rank() == 0:
        write_recipe(folder, arch=MIXED, model={"path": "model", "params_dtype": "float64"})
    dist.barrier()
    found = {}
    for name, changes in cases.items():
        overrides = {key.replace("__", "."): str(value) for key, value in changes.items()}
        recipe = load(folder / "recipe.yaml", overrides)
        inputs = read_inputs(recipe, dist.get_world_size())
        groups = parallel.setup(recipe.parallel, seed=1)
        start = initial_weights(recipe, inputs, groups, folder)
        settings = {"optimizer": recipe.optimizer, "total_updates": 1}
        policy = Policy(recipe, inputs.arch, groups, start, **settings)
        places = (("both", 0.2, 1.1), ("choice", 0.2, 1.0), ("head", 0.0, 1.1))
        for place, bias, scale in places if not found else places[:1]:
            with _other_engine(policy, bias, scale):
                samples = _samples(policy)
            held = [None] * dist.get_world_size()
            dist.all_gather_object(held, samples if groups.is_leader else None)
            samples = next(part for part in held if part)
            for mode in ("disabled", "R3"):
                routing = dataclasses.replace(
                    recipe.routing, router_replay=mode, decompose_every=3, prob_every=0
                )
                told = dataclasses.replace(recipe, routing=routing)
                observer = Observer(told, policy.model, folder / "dumps")
                updater = Updater(told, policy, None, observer)
                batches = micro_batches(samples, groups.micro_batching(recipe))
                _, metrics = updater.old_logprobs([batches], step=3)
                found[f"{name}, {place}, {mode}"] = metrics.gather(groups.world).values()
                if "not due" not in found:
                    _, metrics = updater.old_logprobs([batches], step=4)
                    found["not due"] = metrics.gather(groups.world).values()
        parallel.teardown()
    return found


@contextmanager
def _other_engine(policy: Policy, bias: float, scale: float) -> Iterator[None]:
    """Routers that choose by their scores and a bias; a head whose weights are larger."""
    topk = LayerRouter.get_replay_topk

    def biased(router: LayerRouter, scores: torch.Tensor, k: int, *others: Any) -> Any:
        generator = torch.Generator().manual_seed(router.layer)
        shift = bias * torch.randn(scores.shape[-1], generator=generator, dtype=torch.float64)
        experts = (scores + shift).topk(k).indices

        def choose(among: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return among.gather(1, experts), experts

        return topk(router, scores, k, *others[:-1], choose)

    heads = [w for n, w in policy.model.chunks[-1].named_parameters() if "output_layer" in n]
    held = [w.detach().clone() for w in heads]
    with torch.no_grad():
        for weight in heads:
            weight *= scale
        LayerRouter.get_replay_topk = biased
        yield
        LayerRouter.get_replay_topk = topk
        for weight, before in zip(heads, held, strict=True):
            weight.copy_(before)


def constructed(folder: Path) -> dict[str, dict[str, float]]:
    """The split of updates whose old and current weights differ in one known place."""
    found = {}
    observe.BOTH_ORDERS = 1
    for name, dense, perturb in (
        ("nothing", False, _nothing),
        ("expert bias", False, _bias),
        ("lm head", False, _head),
        ("attention", False, _attention),
        ("dense", True, _attention),
    ):
        for mode in ("disabled", "R2") if not dense else ("disabled",):
            found[f"{name}, {mode}"] = _perturbed(folder / f"{name} {mode}", mode, dense, perturb)
    for name, orders, backwards in (("one order", 2, False), ("backwards", 1, True)):
        observe.BOTH_ORDERS = orders
        found[name] = _perturbed(folder / name, "disabled", False, _attention, backwards)
    return found


def _perturbed(
    folder: Path, mode: str, dense: bool, perturb: Any, backwards: bool = False
) -> dict[str, float]:
    """``backwards``: the perturbed weights are the old ones."""
    arch = {"model_type": "qwen3", "num_experts": None} if dense else MIXED
    write_recipe(folder, arch=arch, routing={**EVERY_UPDATE, "router_replay": mode})
    recipe = load(folder / "recipe.yaml")
    inputs = read_inputs(recipe, 1)
    groups = parallel.setup(recipe.parallel, seed=1)
    start = initial_weights(recipe, inputs, groups, folder)
    policy = Policy(recipe, inputs.arch, groups, start, optimizer=recipe.optimizer, total_updates=1)
    for module in _routers(policy):
        # A router that chooses by scores and bias, and weighs by scores alone.
        module.score_function = module.config.moe_router_score_function = "sigmoid"
        module.expert_bias = torch.zeros(module.config.num_moe_experts)
    samples = _samples(policy)
    observer = Observer(recipe, policy.model, folder / "dumps")
    updater = Updater(recipe, policy, None, observer)
    batches = micro_batches(samples, groups.micro_batching(recipe))
    parameters = list(policy.model.chunks[0].parameters())
    unperturbed = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        if not backwards:
            (batches,), _ = updater.old_logprobs([batches], step=1)
        perturb(policy, torch.Generator().manual_seed(0))
        if backwards:
            (batches,), _ = updater.old_logprobs([batches], step=1)
            for parameter, before in zip(parameters, unperturbed, strict=True):
                parameter.copy_(before)
    metrics = updater.update(batches, denominators(samples), step=1, mini_batch=0)
    values = metrics.gather(groups.world).values()
    values["weights"] = sum(p.detach().double().abs().sum().item() for p in parameters)
    parallel.teardown()
    return values


def _samples(policy: Policy) -> Any:
    decoder = MegatronDecoder(policy.model)
    requests = [Request(uid=i, prompt_tokens=(7 + i, 20, 3 + 2 * i)) for i in range(12)]
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=8, stop_ids=(1,), seed=3)
    with decoder.generating(record=True):
        samples = generate(decoder, requests, params, batch_size=12)
    for s in samples:
        s.advantage = 1.0 if s.uid % 2 else -0.5
    return samples


def _routers(policy: Policy) -> list[Any]:
    return [m for c in policy.model.chunks for m in c.modules() if type(m).__name__ == "TopKRouter"]


def _nothing(policy: Policy, generator: torch.Generator) -> None: ...


def _bias(policy: Policy, generator: torch.Generator) -> None:
    for module in _routers(policy):
        module.expert_bias += torch.randn(len(module.expert_bias), generator=generator)


def _head(policy: Policy, generator: torch.Generator) -> None:
    _shake(policy.model.chunks[-1].output_layer.weight, generator)


def _attention(policy: Policy, generator: torch.Generator) -> None:
    for layer in policy.model.chunks[0].decoder.layers:
        _shake(layer.self_attention.linear_proj.weight, generator)


def _shake(weight: torch.Tensor, generator: torch.Generator) -> None:
    weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
