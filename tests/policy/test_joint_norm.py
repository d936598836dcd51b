"""A norm over the heads of all tensor-parallel ranks, against torch's over the whole projection."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sapo_megatron.policy import cpu
from sapo_megatron.policy.joint_norm import JointNorm
from tests.support.gloo import run_ranks

RANKS, TOKENS, WIDTH, EPS = 4, 3, 6, 1e-2
CONFIG = SimpleNamespace(
    kv_channels=WIDTH, layernorm_epsilon=EPS, params_dtype=torch.float64, sequence_parallel=True
)


def heads_of(rank, num_heads):
    """Those of a projection that a rank has: some, or one that others have as well."""
    each = max(num_heads // RANKS, 1)
    first = rank * num_heads // RANKS
    return slice(first, first + each)


def tensors(num_heads):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    each = max(num_heads // RANKS, 1)
    return draw(TOKENS, num_heads, WIDTH), draw(num_heads * WIDTH), draw(RANKS, TOKENS, each, WIDTH)


def measure(num_heads, recompute):
    """This rank's output, and the gradients of its part and of the weight."""
    cpu.enable()
    x, weight, upstream = tensors(num_heads)
    norm = JointNorm(CONFIG, num_heads, dist.group.WORLD)
    norm.weight.data.copy_(weight)
    mine = x[:, heads_of(dist.get_rank(), num_heads)].requires_grad_()
    out = checkpoint(norm, mine, use_reentrant=False) if recompute else norm(mine)
    out.backward(upstream[dist.get_rank()])
    return [t.detach().numpy() for t in (out, mine.grad, norm.weight.grad)]


@pytest.mark.parametrize(
    ("num_heads", "recompute"), [(8, False), (2, False), (8, True)], ids=["cut", "shared", "again"]
)
def test_values_and_gradients(num_heads, recompute):
    x, weight, upstream = tensors(num_heads)
    x.requires_grad_()
    weight.requires_grad_()
    whole = F.rms_norm(x.flatten(1), (num_heads * WIDTH,), weight, EPS).view_as(x)
    parts = [whole[:, heads_of(rank, num_heads)] for rank in range(RANKS)]
    sum((part * g).sum() for part, g in zip(parts, upstream, strict=True)).backward()
    results = run_ranks(RANKS, measure, num_heads, recompute)
    gradient = torch.zeros_like(x)
    for rank, (out, grad, _) in enumerate(results):
        torch.testing.assert_close(torch.from_numpy(out), parts[rank])
        gradient[:, heads_of(rank, num_heads)] += torch.from_numpy(grad)
    torch.testing.assert_close(gradient, x.grad)
    summed = sum(torch.from_numpy(grad) for _, _, grad in results)  # as megatron-core does
    torch.testing.assert_close(summed, weight.grad)
