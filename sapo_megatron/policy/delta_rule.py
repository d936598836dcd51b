"""The gated delta rule, chunk by chunk (Gated Delta Networks, arXiv 2412.06464).

A head keeps a state ``S [K, V]``, zero before the first token. A token with key ``k``, value ``v``,
log decay ``g <= 0`` and strength ``beta`` in (0, 1) fades it, writes what it lacks of the value,
and reads it with its query ``q``:

    S = exp(g) S;    S = S + beta k (v - S^T k)^T;    out = S^T q

Within a chunk what each token writes depends on what those before it wrote: a triangular system
(section 3.3), solved for all chunks at once. Only the state goes from chunk to chunk.

Shape legend: B sequences, S positions, N heads, K size of a key, V size of a value, F channels,
W positions that the convolution sees.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
NORM_EPS = 1e-6
"""Of the norm of queries and keys, as in transformers and in flash-linear-attention."""


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """What every position reads, ``[B, S, N, V]``, and the state behind the last one.

    ``query`` and ``key [B, S, N, K]``, which are normed here, ``value [B, S, N, V]``, ``decay`` (in
    logarithms) and ``beta [B, S, N]``, ``state [B, N, K, V]``. Computes in fp32 at least, in which
    the state comes as well; the rest has the dtype of ``value``.
    """
    length, dtype = query.shape[1], torch.promote_types(value.dtype, torch.float32)
    size = min(chunk_size, length)
    # Positions behind the end fade nothing and write nothing.
    q, k, v, g, b = (
        _chunks(x.to(dtype), size) for x in (query, key, value, decay[..., None], beta[..., None])
    )
    q, k = _unit(q) * q.shape[-1] ** -0.5, _unit(k)
    g = g.squeeze(-1).cumsum(-1)
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    # From position j to i of a chunk; exp of what lies in the future could overflow.
    fading = (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf).exp()
    system = (k * b) @ k.mT * fading  # whose diagonal is taken for ones
    both = torch.cat((v * b, k * b * g.exp()[..., None]), dim=-1)
    both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    written, known = both.split((v.shape[-1], k.shape[-1]), dim=-1)
    inside = q @ k.mT * fading
    q, last = q * g.exp()[..., None], g[..., -1:]
    k, whole = k * (last - g).exp()[..., None], last.exp()[..., None]
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for i in range(q.shape[2]):
        new = written[:, :, i] - known[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + inside[:, :, i] @ new)
        state = whole[:, :, i] * state + k[:, :, i].mT @ new
    out = torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2)
    return out.to(value.dtype), state


def causal_convolution(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    """Each channel's last W values weighed, then SiLU: ``x [B, S, F]`` -> the same shape.

    ``weight [F, 1, W]``; ``before [B, W - 1, F]``: what came before ``x``, zeros where it is not
    given.
    """
    if before is None:
        before = x.new_zeros(len(x), weight.shape[-1] - 1, x.shape[-1])
    whole = torch.cat((before, x), dim=1).transpose(1, 2)
    return F.silu(F.conv1d(whole, weight, groups=len(weight))).transpose(1, 2)


def _chunks(x: Tensor, size: int) -> Tensor:
    """``[B, S, N, D]`` -> ``[B, N, chunks, size, D]``, with zeros behind the end."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
    return x.unflatten(2, (-1, size))


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()
