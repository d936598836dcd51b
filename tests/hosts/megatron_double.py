"""A double of Megatron-LM 0.20.0: its signatures and its arithmetic, for our translation."""

import functools
import sys
from types import ModuleType, SimpleNamespace

import torch

from sapo_megatron.patches import megatron_rl
from tests.hosts.megatron_rows import CAP, LENGTH, SAPO


def _stand_in_modules():
    rl, training = ModuleType("megatron.rl.rl_utils"), ModuleType("megatron.training")
    loop = ModuleType("megatron.training.training")
    state = SimpleNamespace(packing_context=None)

    def calculate_grpo_loss(
        current_logprobs,
        old_logprobs,
        ref_logprobs,
        advantages,
        clamp_eps_lower,
        clamp_eps_upper,
        kl_beta,
        entropy_weight,
        inference_logprobs=None,
        is_truncation_coef=None,
        seq_starts=None,
        seq_lengths=None,
    ):
        ratio = (current_logprobs - old_logprobs).exp()
        if seq_starts is None:
            advantages = advantages.view(-1, 1)
        else:
            spread = torch.zeros_like(current_logprobs)
            for start, length, a in zip(seq_starts, seq_lengths, advantages, strict=False):
                spread[0, start : start + length - 1] = a
            advantages = spread
        d = ref_logprobs - current_logprobs
        kl, entropy = d.exp() - d - 1, -current_logprobs.exp() * current_logprobs
        weight = torch.ones(())
        if inference_logprobs is not None:
            weight = (old_logprobs - inference_logprobs).exp().clamp(max=is_truncation_coef)
        clipped = ratio.clamp(1 - clamp_eps_lower, 1 + clamp_eps_upper)
        policy = torch.min(ratio * advantages, clipped * advantages)
        loss = -weight * policy + kl_beta * kl - entropy_weight * entropy
        above, below = ratio > 1 + clamp_eps_upper, ratio < 1 - clamp_eps_lower
        return loss, kl, ratio, entropy, above, below

    def prepare_trajectories(rows, tokenizer, seq_length, skip_bos_token):
        return None, torch.stack(rows), None

    def selective_log_softmax(logits, index):
        return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def get_logprobs(
        model, tokens, position_ids, no_grad=False, sequence_packing=False, packed_seq_params=None
    ):
        logits = model(
            tokens,
            position_ids,
            None,
            packed_seq_params=packed_seq_params,
            runtime_gather_output=True,
            fp32_output=False,
        )
        return rl.selective_log_softmax(logits[:, :-1], tokens[:, 1:])

    def compute_logprobs_batch(
        model,
        data_loader,
        forward_backward_func,
        packing_context,
        trajs_batch_size,
        seq_length,
        logprobs_batch_size,
        decoder_seq_length,
        dtype,
        pp_group,
        is_correction,
        collect_non_loss_data=False,
    ):
        return dtype

    def pretrain(
        cfg_container,
        train_valid_test_dataset_provider,
        model_type,
        forward_step_func,
        model_provider=None,
        process_non_loss_data_func=None,
        get_embedding_ranks=None,
        get_position_embedding_ranks=None,
        non_loss_data_func=None,
        store=None,
        inprocess_call_wrapper=None,
        p2p_communicator=None,
        pg_collection=None,
        skip_model_parallel_init=False,
    ):
        """Its signature is all that is used: see ``_with_recorders``."""

    def train_step(
        forward_step_func,
        data_iterator,
        model,
        optimizer,
        opt_param_scheduler,
        config,
        forward_backward_func,
        iteration=None,
        pg_collection=None,
        p2p_communicator=None,
    ):
        """Its signature is all that is used: see ``_with_recorders``."""

    for function in (
        *(calculate_grpo_loss, prepare_trajectories, selective_log_softmax, get_logprobs),
        compute_logprobs_batch,
    ):
        setattr(rl, function.__name__, function)
    rl.get_rl_runtime_state = lambda: state
    arguments = SimpleNamespace(
        calculate_per_token_loss=False, micro_batch_size=0, batch_invariant_mode=False
    )
    training.get_args = lambda: arguments
    training.pretrain, loop.train_step = pretrain, train_step
    parent = ModuleType("megatron.rl")
    parent.__path__ = []
    training.__path__ = []
    return {m.__name__: m for m in (parent, rl, training, loop)}


def _stand_in_script(rl):
    """The part of ``train_rl.py`` that computes a loss, as it is when imported now."""
    calculate = rl.calculate_grpo_loss

    def loss_func(
        loss_mask,
        kl_term,
        ratios,
        entropy_term,
        truncated_from_above,
        truncated_from_below,
        output_tensor,
    ):
        mask = loss_mask.float().flatten()
        total, tokens = (output_tensor.flatten() * mask).sum(), mask.sum().clamp(min=1)
        pair = torch.stack([total.detach(), tokens])
        return total, tokens.int(), {"lm loss": pair}

    def forward_step(data_iterator, model, loss_only=False):
        batch = next(data_iterator)
        loss, *rest = calculate(
            current_logprobs=model(),
            old_logprobs=batch.old,
            ref_logprobs=batch.ref,
            advantages=batch.advantages,
            clamp_eps_lower=0.2,
            clamp_eps_upper=0.2,
            kl_beta=SAPO.kl_coef,
            entropy_weight=0.0,
            inference_logprobs=batch.inference,
            is_truncation_coef=CAP,
            seq_starts=batch.starts,
            seq_lengths=batch.lengths,
        )
        return loss, functools.partial(loss_func, batch.mask.float(), *rest)

    return SimpleNamespace(forward_step=forward_step)


class StandIn:
    real = False

    def __init__(self):
        import megatron.core

        megatron.core.__version__ = megatron_rl.HOST.verified
        sys.modules.update(_stand_in_modules())
        self.rl = sys.modules["megatron.rl.rl_utils"]
        self.training = sys.modules["megatron.training"]
        self.loop = sys.modules["megatron.training.training"]
        self.arguments = self.training.get_args()
        self.state = self.rl.get_rl_runtime_state()

    def script(self):
        return _stand_in_script(self.rl)

    def run(self, step, batch):
        """One call of the script's ``forward_step``, on log-probs that are there."""
        return step(iter([batch]), lambda: batch.logprobs)

    def collect(self, masks, bins):
        self.rl.prepare_trajectories(list(masks), None, LENGTH, False)
        self.state.packing_context = bins and SimpleNamespace(packed_trajs=bins)
