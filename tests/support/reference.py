"""A dense, single-process reference: Qwen3, Qwen3-MoE and Qwen3.5-MoE, and the losses, in torch.

Written from the papers and the model's definition, one sequence at a time, without padding, packing
or parallelism, on a dict of Hugging Face named tensors. It shares no code with the package: what
the package computes on many ranks is compared with this.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A prompt and its response, with the log-probs that the old policy gave the response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    old_logprobs: tuple[float, ...]
    advantage: float
    routes: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """Experts of each token but the last, by layer with experts; None: what the router chooses."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is averaged over the sequences, and how."""

    loss: str = "sapo"
    aggregation: str = "sequences"
    """``sequences``: the mean over sequences of their token means; ``tokens``: over all tokens."""
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    clip: tuple[float, float] = (3e-4, 4e-4)
    entropy_coef: float = 0.0
    temperature: float = 1.0
    aux_loss_coeff: float = 0.0


def forward(
    weights: Weights,
    arch: dict[str, Any],
    ids: Tensor,
    routes: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Logits ``[T, V]`` of one sequence ``ids [T]``, and the router logits of each MoE layer.

    ``routes`` int [T, MoE layers, k] stand in the place of what the routers choose, each where its
    probability is ``threshold`` times that of the router's last choice or more.
    """
    eps = arch["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][ids]
    router_logits = []
    for i in range(arch["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        w = {k.removeprefix(layer): v for k, v in weights.items() if k.startswith(layer)}
        above = _is_hybrid(arch)  # 1: what is added to a norm's weight
        mixer = _delta_net if "linear_attn.A_log" in w else _attention
        x = x + mixer(w, arch, _rms(x, above + w["input_layernorm.weight"], eps))
        h = _rms(x, above + w["post_attention_layernorm.weight"], eps)
        if "mlp.gate.weight" in w:
            told = None if routes is None else routes[:, len(router_logits)]
            out, logits = _experts(w, arch, h, told, threshold)
            router_logits.append(logits)
        else:
            out = _mlp(w, "mlp.", h)
        x = x + out
    x = _rms(x, _is_hybrid(arch) + weights["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if arch["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head].T, router_logits


def _is_hybrid(arch: dict[str, Any]) -> bool:
    return "linear_num_key_heads" in arch


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _attention(w: Weights, arch: dict[str, Any], x: Tensor) -> Tensor:
    size, eps = arch["head_dim"], arch["rms_norm_eps"]
    heads, above = arch["num_attention_heads"], _is_hybrid(arch)
    q, k, v = (
        (x @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(0, 1)
        for name in "qkv"
    )
    gate = None
    if _is_hybrid(arch):  # each head's gate behind its query
        q, gate = q.unflatten(0, (heads, 2)).unbind(1)
    q, k = (
        _rotate(_rms(t, above + w[f"self_attn.{name}_norm.weight"], eps), arch)
        for name, t in (("q", q), ("k", k))
    )
    k, v = (t.repeat_interleave(heads // len(t), 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(size)
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    if gate is not None:
        out = out * gate.sigmoid()
    return out.transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T


def _delta_net(w: Weights, arch: dict[str, Any], x: Tensor) -> Tensor:
    """Gated DeltaNet (arXiv 2412.06464), token by token."""
    w = {k.removeprefix("linear_attn."): t for k, t in w.items() if k.startswith("linear_attn.")}
    heads, size = arch["linear_num_value_heads"], arch["linear_key_head_dim"]
    keys = arch["linear_num_key_heads"] * size
    taps, mixed = w["conv1d.weight"][:, 0].T, x @ w["in_proj_qkv.weight"].T
    before = torch.cat((mixed.new_zeros(len(taps) - 1, mixed.shape[1]), mixed))
    mixed = sum(before[i : i + len(x)] * tap for i, tap in enumerate(taps))
    mixed = torch.nn.functional.silu(mixed)
    q, k, v = mixed.split((keys, keys, mixed.shape[1] - 2 * keys), dim=-1)
    share = heads // arch["linear_num_key_heads"]
    q, k = (t.unflatten(-1, (-1, size)).repeat_interleave(share, 1) for t in (q, k))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    v = v.unflatten(-1, (heads, -1))
    beta = (x @ w["in_proj_b.weight"].T).sigmoid()
    step = torch.nn.functional.softplus(x @ w["in_proj_a.weight"].T + w["dt_bias"])
    fading = (-w["A_log"].exp() * step).exp()
    state, outputs = x.new_zeros(heads, size, v.shape[-1]), []
    for t in range(len(x)):
        state = fading[t, :, None, None] * state
        lacking = v[t] - torch.einsum("nkv,nk->nv", state, k[t])
        state = state + torch.einsum("nk,nv->nkv", k[t], beta[t, :, None] * lacking)
        outputs.append(torch.einsum("nkv,nk->nv", state, q[t]) / math.sqrt(size))
    gate = (x @ w["in_proj_z.weight"].T).unflatten(-1, (heads, -1))
    out = _rms(torch.stack(outputs), w["norm.weight"], arch["rms_norm_eps"])
    return (out * torch.nn.functional.silu(gate)).flatten(1) @ w["out_proj.weight"].T


def _rotate(x: Tensor, arch: dict[str, Any]) -> Tensor:
    """Rotary embedding of ``x [N, T, D]``: the first half of each head turns with the second.

    Of a head of which a part is turned, the first half of this part with the second.
    """
    turned = int(x.shape[-1] * arch.get("partial_rotary_factor", 1.0))
    x, still = x[..., :turned], x[..., turned:]
    half = turned // 2
    frequencies = arch["rope_theta"] ** -(torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    turning = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.cat((*turning, still), -1)


def _mlp(w: Weights, prefix: str, x: Tensor) -> Tensor:
    gate, up, down = (w[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts(
    w: Weights, arch: dict[str, Any], x: Tensor, told: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    logits = x @ w["mlp.gate.weight"].T
    probs = logits.softmax(-1)
    chosen = own = probs.topk(arch["num_experts_per_tok"]).indices
    if told is not None:
        rows = zip(told.tolist(), own.tolist(), probs.tolist(), strict=True)
        chosen = torch.tensor([_borne_out(*row, threshold) for row in rows])
    share = probs.gather(-1, chosen)
    if arch["norm_topk_prob"]:
        share = share / share.sum(-1, keepdim=True)
    rows = []
    for token, experts, shares in zip(x, chosen.tolist(), share, strict=True):
        outputs = [_mlp(w, f"mlp.experts.{e}.", token) for e in experts]
        rows.append((torch.stack(outputs) * shares[:, None]).sum(0))
    out = torch.stack(rows)
    if "mlp.shared_expert_gate.weight" in w:
        gate = (x @ w["mlp.shared_expert_gate.weight"].T).sigmoid()
        out = out + gate * _mlp(w, "mlp.shared_expert.", x)
    return out, logits


def _borne_out(told: list[int], own: list[int], probs: list[float], threshold: float) -> list[int]:
    kept = [e for e in told if probs[e] >= threshold * probs[own[-1]]]
    return (kept + [e for e in own if e not in kept])[: len(own)]


@dataclass(kw_only=True)
class Outcome:
    loss: Tensor
    """The policy loss, without entropy bonus and auxiliary loss."""
    gradients: Weights
    """Of everything that is optimised."""
    metrics: dict[str, float]
    route_margin: float
    """Smallest distance between the last expert chosen and the first one left out."""


def evaluate(
    weights: Weights,
    arch: dict[str, Any],
    sequences: list[Sequence],
    objective: Objective,
    replay_threshold: float = 0.0,
) -> Outcome:
    """Loss, gradients and ratio statistics of a whole mini-batch."""
    weights = {k: v.detach().clone().requires_grad_() for k, v in weights.items()}
    token_losses, log_ratios, entropies, auxiliary = [], [], [], []
    margin = math.inf
    for s in sequences:
        ids = torch.tensor(s.prompt + s.response)
        routes = None if s.routes is None else torch.tensor(s.routes)
        logits, router_logits = forward(weights, arch, ids[:-1], routes, replay_threshold)
        for layer in router_logits:
            best = layer.detach().sort(descending=True).values
            k = arch["num_experts_per_tok"]
            margin = min(margin, float((best[:, k - 1] - best[:, k]).min()))
        if objective.aux_loss_coeff:
            auxiliary.append(sum(_balance(layer, arch) for layer in router_logits))
        if not s.response:
            continue
        log_p = (logits / objective.temperature).log_softmax(-1)[len(s.prompt) - 1 :]
        chosen = log_p[torch.arange(len(s.response)), list(s.response)]
        log_ratio = chosen - torch.tensor(s.old_logprobs, dtype=chosen.dtype)
        token_losses.append(_token_loss(log_ratio, s.advantage, objective))
        log_ratios.append(log_ratio)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    loss = _mean(token_losses, objective)
    total = loss - objective.entropy_coef * _mean(entropies, objective)
    if auxiliary:
        total = total + objective.aux_loss_coeff * sum(auxiliary) / len(auxiliary)
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return Outcome(
        loss=loss.detach(),
        gradients={
            name: torch.zeros_like(w) if g is None else g
            for (name, w), g in zip(weights.items(), gradients, strict=True)
        },
        metrics=_metrics(torch.cat(log_ratios).detach(), torch.cat(entropies).detach()),
        route_margin=margin,
    )


def _token_loss(log_ratio: Tensor, advantage: float, objective: Objective) -> Tensor:
    if objective.loss == "sapo":
        # Equations 5 and 6: f(r) = 4 / tau sigmoid(tau (r - 1)).
        tau = objective.tau_pos if advantage > 0 else objective.tau_neg
        ratio = log_ratio.exp()
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    assert objective.loss == "gspo"
    # One ratio a sequence, the geometric mean of its tokens' (arXiv 2507.18071, equation 7).
    ratio = log_ratio.mean().exp().expand(len(log_ratio))
    low, high = objective.clip
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def _mean(values: list[Tensor], objective: Objective) -> Tensor:
    if objective.aggregation == "tokens":
        return torch.cat(values).mean()
    return torch.stack([v.mean() for v in values]).mean()


def _balance(logits: Tensor, arch: dict[str, Any]) -> Tensor:
    """The Switch load-balancing loss of one layer: experts x sum of (tokens share x mean prob)."""
    k, experts = arch["num_experts_per_tok"], arch["num_experts"]
    probs = logits.softmax(-1)
    counts = torch.bincount(probs.topk(k).indices.flatten(), minlength=experts)
    return experts * (counts / (k * len(logits)) * probs.mean(0)).sum()


def _metrics(log_ratio: Tensor, entropy: Tensor) -> dict[str, float]:
    ratio = log_ratio.exp()
    values = {
        "actor/ppo_kl": -log_ratio.mean(),
        "actor/entropy": entropy.mean(),
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "ratio/log_var": log_ratio.var(correction=0),
        "ratio/ess": ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()),
    }
    return {name: float(value) for name, value in values.items()}
