"""A batch as slime and miles pass it to a policy loss, and our own loss of it."""

from argparse import Namespace

import torch

from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig
from sapo_megatron.sample import Denominators, PackedBatch

TOTAL, RESPONSE, VOCAB = (9, 12, 7), (5, 8, 4), 11
TAUS = {"tau_pos": 1.3, "tau_neg": 1.7}
TIS_CAP = 1.05


def arguments(host, **changed):
    """The arguments that the hosts' policy losses read, as a run without extras has them."""
    return Namespace(
        **{
            "advantage_estimator": "grpo",
            "allgather_cp": False,
            "calculate_per_token_loss": False,
            "custom_loss_function_path": f"sapo_megatron.patches.{host}.policy_loss",
            "custom_pg_loss_reducer_function_path": None,
            "custom_tis_function_path": None,
            "dump_details": None,
            "entropy_coef": 0.0,
            "eps_clip": 0.2,
            "eps_clip_c": None,
            "eps_clip_high": 0.28,
            "get_mismatch_metrics": False,
            "global_batch_size": len(TOTAL),
            "kl_loss_coef": 0.0,
            "kl_loss_type": "k3",
            "log_probs_chunk_size": -1,
            "loss_type": "custom_loss",
            "observe_training_entropy": True,
            "opsm_delta": 1e-4,
            "qkv_format": "thd",
            "recompute_loss_function": False,
            "rollout_temperature": 1.0,
            "rollout_top_p": 1.0,
            "skip_actor_forward_only": False,
            "tis_clip": TIS_CAP,
            "tis_clip_low": 0.0,
            "true_on_policy_mode": False,
            "use_dynamic_global_batch_size": False,
            "use_kl_loss": False,
            "use_opsm": False,
            "use_rollout_logprobs": False,
            "use_tis": False,
            "use_unbiased_kl": False,
            **TAUS,
            **changed,
        }
    )


EVERYTHING = {"entropy_coef": 0.02, "kl_loss_coef": 0.3, "use_kl_loss": True, "use_tis": True}
"""Changes to the arguments: every term that we have too."""


def a_batch(dtype=torch.float64):
    """(batch, logits): three samples on one rank, with two masked tokens; logits a leaf."""
    generator = torch.Generator().manual_seed(7)

    def near(x, spread):
        return x + spread * torch.randn(len(x), generator=generator, dtype=dtype)

    tokens = [torch.randint(VOCAB, (n,), generator=generator) for n in TOTAL]
    logits = torch.randn(1, sum(TOTAL), VOCAB, generator=generator, dtype=dtype)
    batch = {"unconcat_tokens": tokens, "total_lengths": TOTAL, "response_lengths": RESPONSE}
    logprob = logprobs(batch, logits)
    masks = [torch.ones(n, dtype=torch.int64) for n in RESPONSE]
    masks[1][2] = masks[2][0] = 0
    batch |= {
        "log_probs": [near(x, 0.4) for x in logprob],
        "rollout_log_probs": [near(x, 0.3) for x in logprob],
        "ref_log_probs": [near(x, 0.5) for x in logprob],
        "advantages": [
            torch.full((n,), a, dtype=dtype)
            for n, a in zip(RESPONSE, (1.5, -0.7, 0.2), strict=True)
        ],
        "loss_masks": masks,
        "rollout_mask_sums": torch.stack([mask.sum() for mask in masks]),
    }
    return batch, logits.requires_grad_()


def logprobs(batch, logits):
    split = logits[0].log_softmax(-1).split(batch["total_lengths"])
    return [
        rows[-n - 1 : -1].gather(-1, tokens[-n:, None])[:, 0]
        for rows, tokens, n in zip(
            split, batch["unconcat_tokens"], batch["response_lengths"], strict=True
        )
    ]


def one(batch, logits, i):
    """The micro-batch of sample ``i`` alone."""
    end = sum(TOTAL[: i + 1])
    cut = {name: x[i : i + 1] for name, x in batch.items()}
    return cut, logits[:, end - TOTAL[i] : end]


def ours(batch, logits, **changed):
    """Our loss of the whole batch with what EVERYTHING turns on, and its metrics."""
    args = arguments("slime", **changed)
    rows = logits[0].log_softmax(-1).split(batch["total_lengths"])
    entropies = [-(x.exp() * x).sum(-1)[-n - 1 : -1] for x, n in zip(rows, RESPONSE, strict=True)]
    mask = torch.cat(batch["loss_masks"]).bool()
    ids = torch.arange(len(RESPONSE)).repeat_interleave(torch.tensor(RESPONSE))
    lengths = torch.tensor([int(part.sum()) for part in batch["loss_masks"]])
    packed = PackedBatch(
        tokens=torch.cat(batch["unconcat_tokens"]),
        targets=torch.cat(batch["unconcat_tokens"]),
        mask=mask,
        position_ids=ids,
        sequence_ids=ids,
        cu_seqlens=torch.tensor([0, *RESPONSE]).cumsum(0),
        max_seqlen=max(RESPONSE),
        lengths=lengths,
        advantages=torch.cat(batch["advantages"]),
        rollout_logprob=torch.cat(batch["rollout_log_probs"]),
        sample_uids=(0, 1, 2),
        old_logprob=torch.cat(batch["log_probs"]),
        ref_logprob=torch.cat(batch["ref_log_probs"]) if args.use_kl_loss else None,
    )
    return policy_loss(
        packed,
        torch.cat(logprobs(batch, logits)),
        torch.cat(entropies),
        algorithm=AlgorithmConfig(
            **TAUS,
            kl_coef=args.kl_loss_coef,
            entropy_coef=args.entropy_coef,
            loss_agg_mode="token-mean" if args.calculate_per_token_loss else "seq-mean-token-mean",
        ),
        denominators=Denominators(sequences=len(RESPONSE), tokens=int(mask.sum())),
        max_response_length=max(RESPONSE),
        correction=CorrectionConfig(rollout_is="tis", tis_cap=TIS_CAP) if args.use_tis else None,
    )
