"""A checkout of Megatron-LM, first on the path. Replaced here is what needs a GPU."""

import importlib
import sys
from types import SimpleNamespace

import torch

from tests.hosts import absent
from tests.hosts.megatron_rows import CAP, GAP, LENGTH, SAPO


class Real:
    real = True

    def __init__(self):
        absent.stand_in_for(["openai", "triton", "fastapi", "uvicorn"])
        absent.newer_names_of_typing()
        torch.Tensor.cuda = lambda self, *args, **kwargs: self
        self.rl = importlib.import_module("megatron.rl.rl_utils")
        self.training = importlib.import_module("megatron.training")
        self.loop = importlib.import_module("megatron.training.training")
        self.state = self.rl.get_rl_runtime_state()
        self.arguments = SimpleNamespace(
            calculate_per_token_loss=False,
            micro_batch_size=0,
            batch_invariant_mode=False,
            rl_use_sequence_packing=False,
            rl_inference_logprobs_is_correction=True,
            grpo_clamp_eps_lower=0.2,
            grpo_clamp_eps_upper=0.2,
            grpo_kl_beta=SAPO.kl_coef,
            grpo_entropy_term_weight=0.0,
            rl_importance_sampling_truncation_coef=CAP,
            check_for_nan_in_loss_and_grad=False,
            check_for_spiky_loss=False,
            fp16=False,
            bf16=False,
        )
        variables = importlib.import_module("megatron.training.global_vars")
        variables.set_args(self.arguments)
        timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
        variables._GLOBAL_TIMERS = lambda *args, **kwargs: timer

    def script(self):
        return importlib.import_module("train_rl")

    def run(self, step, batch):
        script = sys.modules["train_rl"]
        script.get_logprobs = lambda *args, **kwargs: batch.logprobs
        script.is_pipeline_last_stage = lambda: True
        n, width = batch.mask.shape
        tokens = torch.zeros(n, width + 1, dtype=torch.int64)
        mask = torch.cat([torch.zeros(n, 1), batch.mask.float()], 1)
        self.arguments.rl_use_sequence_packing = batch.starts is not None
        inference = batch.inference
        self.arguments.rl_inference_logprobs_is_correction = inference is not None
        if batch.starts is None:
            if inference is None:
                inference = torch.zeros_like(batch.old)
            data = (tokens, batch.advantages, batch.old, mask, tokens, batch.ref, inference)
            return step(iter([data]), torch.nn.Identity())
        from megatron.rl import sequence_packing_utils as packing

        info = packing.PackingInfo(
            bin_seq_indices=[list(range(len(batch.lengths)))],
            seq_starts={0: batch.starts},
            seq_lengths=batch.lengths,
            seq_to_bin_idx=[0] * len(batch.lengths),
            packing_algo="fifo",
        )
        context = packing.PackingContext(
            bin_size=width + 1,
            packer=None,
            packing_info=info,
            original_generation_masks=None,
            original_trajs=None,
            packed_trajs=tokens,
            packed_position_ids=tokens,
            packed_loss_mask=mask,
            bin_advantages=[batch.advantages],
            cached_packed_seq_params=[SimpleNamespace()],
        )
        context.old_logprobs, context.ref_logprobs = batch.old, batch.ref
        context.packed_inference_logprobs = inference
        held, self.state.packing_context = self.state.packing_context, context
        # One bin of the collection at a time: the patch counts all of them.
        context.packed_trajs = held.packed_trajs
        try:
            return step(iter([(torch.tensor(0),)]), torch.nn.Identity())
        finally:
            self.state.packing_context = held

    def collect(self, masks, bins):
        tokenizer = SimpleNamespace(
            library="other", pad=0, eod=9, bos=None, vocab_size=10, detokenize=str
        )
        row = self.rl.TokenRollout
        rollouts = [
            row(
                trajectory=[[1] * LENGTH],
                generation_mask=[mask.tolist()],
                logprobs=[[-1.0] * int(mask.sum())],
                reward=[0.0],
                env_id="x",
            )
            for mask in masks
        ]
        self.rl.prepare_trajectories(rollouts, tokenizer, LENGTH, False)
        self.state.packing_context = bins and SimpleNamespace(
            packed_trajs=torch.zeros(len(bins), sum(len(b) for b in bins) * (LENGTH + GAP))
        )
