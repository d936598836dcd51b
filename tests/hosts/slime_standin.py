"""A stand-in for what the patches take of slime and of miles, with their signatures.

Written for the tests, not taken from either. It stands in ``sys.modules`` under the names of both,
and as both look ``compute_policy_loss`` up where ``policy_loss_function`` is, so does this. Under
context parallelism the first rank has the first half of each response, the second the rest.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist

NAMES = {
    "slime": ("backends", "backends.megatron_utils", "backends.megatron_utils.cp_utils"),
    "miles": ("backends", "backends.training_utils", "backends.training_utils.loss_hub"),
}
LOSS = {
    "slime": "slime.backends.megatron_utils.loss",
    "miles": "miles.backends.training_utils.loss_hub.losses",
}
VERSION = {"slime": "0.3.1", "miles": "0.1.0"}


def stand_in(host, set_module):
    """Puts this file where ``host`` would be, by ``set_module(name, module)``."""
    top = ModuleType(host)
    top.__version__ = VERSION[host]
    top.__path__ = []
    set_module(host, top)
    for name in NAMES[host]:
        set_module(f"{host}.{name}", sys.modules[__name__])
    set_module(LOSS[host], sys.modules[__name__])


def cp_size():
    return dist.get_world_size() if dist.is_initialized() else 1


mpu = SimpleNamespace(
    get_context_parallel_world_size=cp_size,
    get_context_parallel_group=lambda: dist.group.WORLD,
)


def get_parallel_state():
    group = dist.group.WORLD if dist.is_initialized() else None
    return SimpleNamespace(cp=SimpleNamespace(size=cp_size(), group=group))


def slice_log_prob_with_cp(log_prob, total_length, response_length):
    if cp_size() == 1:
        return log_prob
    half = response_length // 2
    return log_prob[half:] if dist.get_rank() else log_prob[:half]


def get_local_response_loss_masks(
    total_lengths, response_lengths, loss_masks, qkv_format="thd", max_seq_lens=None
):
    return [
        slice_log_prob_with_cp(mask, total, response)
        for mask, total, response in zip(loss_masks, total_lengths, response_lengths, strict=True)
    ]


def reducer(args, batch):
    """What the host's dispatcher passes as ``sum_of_sample_mean``."""
    masks = get_local_response_loss_masks(
        batch["total_lengths"], batch["response_lengths"], batch["loss_masks"]
    )
    sizes = [len(mask) for mask in masks]
    weights = [
        mask.double() / (1 if args.calculate_per_token_loss else denominator.clamp(min=1))
        for mask, denominator in zip(masks, batch["rollout_mask_sums"], strict=True)
    ]

    def sum_of_sample_mean(x):
        return sum(
            (part * weight).sum() for part, weight in zip(x.split(sizes), weights, strict=True)
        )

    return sum_of_sample_mean


def compute_policy_loss(ppo_kl, advantages, eps_clip, eps_clip_high, eps_clip_c=None):
    ratio = (-ppo_kl).exp()
    clipped = ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    return torch.maximum(-ratio * advantages, -clipped * advantages), (ratio != clipped).float()


def policy_loss_function(args, batch, logits, sum_of_sample_mean):
    logprob, entropy = (
        torch.cat([slice_log_prob_with_cp(*sample) for sample in samples])
        for samples in dense(batch, logits)
    )
    old = torch.cat(batch["log_probs"])
    pg_loss, clipped = compute_policy_loss(
        old - logprob,
        torch.cat(batch["advantages"]),
        args.eps_clip,
        args.eps_clip_high,
        args.eps_clip_c,
    )
    if args.use_tis:
        ratio = (old - torch.cat(batch["rollout_log_probs"])).exp()
        pg_loss = pg_loss * ratio.clamp(max=args.tis_clip)
    pg_loss = sum_of_sample_mean(pg_loss)
    entropy = sum_of_sample_mean(entropy)
    loss = pg_loss - args.entropy_coef * entropy
    reported = {"pg_loss": pg_loss, "pg_clipfrac": sum_of_sample_mean(clipped)}
    if args.use_kl_loss:
        d = torch.cat(batch["ref_log_probs"]) - logprob
        kl_loss = sum_of_sample_mean(d.exp() - 1 - d)
        loss = loss + args.kl_loss_coef * kl_loss
        reported["kl_loss"] = kl_loss
    if logprob.numel() == 0:
        loss = loss + 0 * logits.sum()
    reported["loss"] = loss
    return loss, {name: value.detach().clone() for name, value in reported.items()}


def dense(batch, logits):
    """Of each sample its response tokens' (log-probs, length, response length), and entropies."""
    logprobs, entropies, end = [], [], 0
    lengths = zip(batch["total_lengths"], batch["response_lengths"], strict=True)
    for tokens, (total, response) in zip(batch["unconcat_tokens"], lengths, strict=True):
        end += len(tokens)
        all_logprobs = logits[0, end - response - 1 : end - 1].log_softmax(-1)
        picked = all_logprobs.gather(-1, tokens[len(tokens) - response :, None])[:, 0]
        logprobs.append((picked, total, response))
        entropies.append((-(all_logprobs.exp() * all_logprobs).sum(-1), total, response))
    return logprobs, entropies
