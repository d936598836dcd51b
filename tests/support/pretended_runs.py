"""What ``test_device`` runs on ranks: whole runs, on a GPU that is pretended."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from torch import Tensor

from sapo_megatron.metrics import Metrics
from sapo_megatron.policy import parallel, step
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.model import Model
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.training import inputs, session
from sapo_megatron.training import loop as train
from sapo_megatron.training.observe import Observer
from tests.support import pretend
from tests.support.pretend import Seen
from tests.support.tiny import write_recipe
from tests.support.watched import Varied

SMALL: dict[str, dict[str, Any]] = {
    "rollout": {"rollout_batch_size": 2, "max_response_length": 3},
    "eval": {"num_problems": 1, "k": 1},
    "routing": {"decompose_every": 1, "prob_every": 2},
    "logging": {"dump_every": 1},
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe, and what is done with it."""

    world: int = 1
    arch: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    saved: bool = False
    """With a checkpoint, a second step behind a resume, an export and a stream of weights."""
    in_one_stack: bool = False
    """Scalar metrics are stacked to be brought to the host, wherever they are."""


@dataclass(kw_only=True)
class Found:
    """What a rank saw."""

    problems: dict[str, int]
    waits: dict[tuple[str, str], int]
    """Of ours, by phase and function."""
    calls: dict[str, int]
    """Micro-batches or calls by phase."""
    streamed: int = 0
    """Tensors."""


def measure(run: Run, folder: Path) -> Found:
    """The whole of a run, in its own folder."""
    _write(folder, run)
    calls: Counter[str] = Counter()
    streamed = 0
    with ExitStack() as stack:
        stack.enter_context(_without_checks())
        seen = stack.enter_context(pretend.gpu())
        stack.enter_context(_counted(seen, calls))
        if run.in_one_stack:
            stack.enter_context(mock.patch.object(Metrics, "to_host", _in_one_stack))
        for steps in (1, 2) if run.saved else (1,):
            with _trained(folder, "run", steps, resume=steps > 1) as policy:
                if steps > 1:
                    policy.model.weights.save(folder / "exported")
                    streamed = sum(1 for _ in policy.model.weights.stream())
    return Found(
        problems=dict(seen.problems), waits=dict(seen.waits), calls=dict(calls), streamed=streamed
    )


def offloaded(fraction: float, folder: Path) -> dict[str, Any]:
    """Three steps at once against one and two resumes, a step each, with Adam in host memory."""
    _write(
        folder,
        Run(
            sections={
                "model": {"params_dtype": "bfloat16"},
                "routing": {"decompose_every": 0, "prob_every": 0, "router_replay": "disabled"},
                "optimizer": {"lr": 3e-2, "optimizer_offload_fraction": fraction},
                "logging": {"dump_every": 0},
            }
        ),
    )
    states = {}
    with _without_checks(), _with_host_adam(), pretend.gpu() as seen:
        for name, steps in (("straight", 3), ("parts", 1), ("parts", 2), ("parts", 3)):
            resume = name == "parts" and steps > 1
            with _trained(folder, name, steps, resume=resume) as policy:
                states[name, steps] = _state(policy)
    straight, first, resumed = states["straight", 3], states["parts", 1], states["parts", 3]
    return {
        "problems": dict(seen.problems),
        "kinds": dict(Counter(name.rpartition(" ")[2] for name in straight)),
        "differ": sorted(n for n in straight if not torch.equal(straight[n], resumed[n])),
        "moved": sorted(n for n in straight if not torch.equal(straight[n], first[n])),
    }


def _state(policy: Policy) -> dict[str, Tensor]:
    """Copies of the weights and of what Adam knows of each."""
    state = {f"{n} weight": w for n, w in policy.model.chunks[0].named_parameters()}
    for i, part in enumerate(policy.optimizer.chained_optimizers):
        for j, inner in enumerate(part.optimizer.sub_optimizers):
            for k, values in enumerate(inner.state.values()):
                known = {f"{i} {j} {k} {name}": value for name, value in values.items()}
                state |= {n: value for n, value in known.items() if isinstance(value, Tensor)}
    return {name: value.detach().clone() for name, value in state.items()}


def _write(folder: Path, run: Run) -> None:
    if dist.get_rank() == 0:
        names = {*SMALL, *run.sections}
        sections = {n: SMALL.get(n, {}) | run.sections.get(n, {}) for n in names}
        write_recipe(folder, arch=run.arch, **sections)
    dist.barrier()


@contextmanager
def _trained(folder: Path, name: str, steps: int, *, resume: bool) -> Iterator[Policy]:
    """The policy at the end of a run, whose groups last as long as the block."""
    made: list[Policy] = []

    def remember(*args: Any, **kwargs: Any) -> Policy:
        made.append(Policy(*args, **kwargs))
        return made[-1]

    overrides = {"train.run_dir": str(folder / name), "train.steps": str(steps)}
    recipe = load(folder / "recipe.yaml", overrides)
    read = inputs.read_inputs(recipe, dist.get_world_size())
    with mock.patch.object(session, "Policy", remember):
        train.train(recipe, read, "auto" if resume else None)
    yield made[-1]
    parallel.teardown()
    dist.barrier()


@contextmanager
def _without_checks() -> Iterator[None]:
    """Nothing asks whether the machine has a GPU, and rewards come from no process."""
    with (
        mock.patch.object(inputs, "check_machine", return_value=None),
        mock.patch.object(session, "Scorer", Varied),
    ):
        yield


@contextmanager
def _with_host_adam() -> Iterator[None]:
    """Upstream lets Adam be in host memory, beside Transformer Engine's on the GPU."""
    with (
        mock.patch.object(step, "host_threads", return_value=1),
        mock.patch.object(optimizer, "Adam", _FusedAdam),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True),
        mock.patch.object(distrib_optimizer, "USING_TE_OPTIMIZER", True),
        mock.patch.object(optimizer_config, "is_te_min_version", return_value=True),
    ):
        yield


class _FusedAdam(torch.optim.Optimizer):
    """Stands for Transformer Engine's Adam, which counts the steps of a group of weights."""

    def __init__(self, weights: Any) -> None:
        super().__init__(weights, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(weight))
                mean = state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                square = state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - beta2)
                scale = (square / (1 - beta2**step)).sqrt() + group["eps"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step))


_to_host = Metrics.to_host


def _in_one_stack(metrics: Metrics) -> Metrics:
    values = (getattr(m, f.name) for m in metrics._metrics.values() for f in fields(m))
    torch.stack([v.double() for v in values if isinstance(v, Tensor) and v.dim() == 0])
    return _to_host(metrics)


@contextmanager
def _counted(seen: Seen, calls: Counter[str]) -> Iterator[None]:
    """Waits are those of a phase: the passes, what the observer does, or a token's decoding."""

    def phase(owner: type, method: str, name: str, batches: bool) -> Any:
        original = getattr(owner, method)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            label = "update" if kwargs.get("train") else name
            if label == "forward" and not kwargs["record"]:
                label = "unrecorded"
            calls[label] += len(args[0]) if batches else 1
            with seen.during(label):
                return original(self, *args, **kwargs)

        return mock.patch.object(owner, method, call)

    with ExitStack() as stack:
        stack.enter_context(phase(Model, "run", "forward", batches=True))
        stack.enter_context(phase(Observer, "after", "observe", batches=True))
        stack.enter_context(phase(MegatronDecoder, "logits", "decode", batches=False))
        yield


def refusals() -> dict[str, list[str]]:
    """What is reported of each of some uses of tensors of both sides."""
    with pretend.gpu() as seen:
        there, here = torch.zeros(4, 3, device="cuda"), torch.zeros(4, 3)
        rows, gloo = torch.tensor([0, 1]), dist.new_group(backend="gloo")
        found = {}
        for name, use in {
            "sum": lambda: there + here,
            "one scalar": lambda: there + torch.tensor(1.0),
            "two scalars": lambda: torch.stack([there.sum(), here.sum()]),
            "product": lambda: there @ here.T,
            "choice": lambda: torch.where(here > 0, there, 0.0),
            "rows of the host": lambda: there[rows],
            "rows of the GPU": lambda: here[rows.to("cuda")],
            "copy": lambda: there.copy_(here),
            "moved": lambda: there.cpu() + here,
            "alike": lambda: torch.ones_like(there) + there.new_zeros(3),
            "an array": lambda: there.numpy(),
            "backward": lambda: _Mixing.apply(there.requires_grad_(), here).sum().backward(),
            "nccl": lambda: dist.all_reduce(here),
            "nccl's own": lambda: dist.all_reduce(there.detach()),
            "gloo": lambda: dist.all_reduce(there.detach(), group=gloo),
            "gloo's own": lambda: dist.all_reduce(here, group=gloo),
            "objects": lambda: dist.all_gather_object([None], 1, group=gloo),
        }.items():
            seen.problems.clear()
            use()
            found[name] = sorted(seen.problems)
    return found


class _Mixing(torch.autograd.Function):
    """Whose backward pass alone gets tensors of both sides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.other = other
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.other, None
