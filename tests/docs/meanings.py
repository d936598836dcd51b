"""Meanings of the keys that the schema leaves without a docstring, by dotted name."""

from sapo_megatron.recipe.schema import CLIP_DEFAULTS


def _clip(place: int) -> str:
    return ", ".join(f"{loss} {limits[place]:g}" for loss, limits in CLIP_DEFAULTS.items())


MEANINGS = {
    "model.params_dtype": "Of weights and activations; Adam's own copy of bfloat16 is fp32.",
    "model.moe_router_dtype": "What routers compute scores in.",
    "model.moe_aux_loss_coeff": "Weight of the loss that balances experts' loads; 0: none.",
    "parallel.tensor_model_parallel_size": "Ranks that share each layer's matrices.",
    "parallel.pipeline_model_parallel_size": "Stages that the layers are cut into.",
    "parallel.virtual_pipeline_model_parallel_size": (
        "Chunks of layers of each stage, which interleave; it needs several stages."
    ),
    "parallel.context_parallel_size": "Ranks that share each sequence's tokens; it needs packing.",
    "parallel.expert_model_parallel_size": "Ranks that share a layer's experts.",
    "parallel.expert_tensor_parallel_size": "Ranks that share each expert's matrices.",
    "parallel.num_layers_in_first_pipeline_stage": (
        "Layers of the first stage, where it is to have another number than the others."
    ),
    "parallel.num_layers_in_last_pipeline_stage": "The same of the last stage.",
    "parallel.recompute_granularity": (
        "What the backward pass computes again rather than keep: whole layers (full), the modules "
        "of `recompute_modules` (selective), or nothing."
    ),
    "parallel.recompute_method": (
        "full: all layers in blocks of `recompute_num_layers` (uniform), or the first so many of "
        "each stage or chunk (block)."
    ),
    "parallel.recompute_num_layers": "full: see `recompute_method`.",
    "parallel.recompute_modules": "selective: megatron-core's names; None: its own choice.",
    "data.train": "Where the problems to train on come from.",
    "data.train.tasks": "reasoning-gym tasks, drawn by weight.",
    "data.train.tasks.name": "reasoning-gym's name of it.",
    "data.train.tasks.options": "Settings of the task's own.",
    "data.train.tasks.weight": "How often it is drawn, against the others.",
    "data.train.answer_key": "The column with the right answer, dotted as `prompt_key`.",
    "data.train.seed": "What tasks draw problems with, and the order of a dataset's.",
    "data.apply_chat_template": "Whether prompts go through the tokenizer's chat template.",
    "rollout.temperature": "Of sampling; log-probs of training are at the same one.",
    "rollout.top_p": "Nucleus sampling: tokens beyond this much of the probability are not drawn.",
    "rollout.max_prompt_length": "Tokens; longer prompts are skipped.",
    "rollout.max_response_length": "Tokens; a response that reaches it is cut off, and scored.",
    "rollout.dynamic_sampling_max_rounds": "Draws of new prompts before a step goes on with less.",
    "algorithm.loss_type": "The policy loss.",
    "algorithm.tau_pos": "sapo: temperature of the gate where the advantage is positive.",
    "algorithm.tau_neg": "sapo: the same elsewhere; a higher one lets less through.",
    "algorithm.clip_ratio_low": f"How far below 1 a ratio is clipped; None: {_clip(0)}.",
    "algorithm.clip_ratio_high": f"How far above 1 a ratio is clipped; None: {_clip(1)}.",
    "algorithm.loss_agg_mode": (
        "Weight of a token in the loss: 1 / (its sequence's length x sequences), 1 / tokens, or "
        "1 / (max_response_length x sequences), of the mini-batch."
    ),
    "algorithm.adv_estimator": (
        "Of a response: (R - mean) / std of its group; R - mean; or R - mean of the others."
    ),
    "algorithm.kl_type": (
        "The estimate, with d = log pi - log pi_ref: d (with the gradient of k2), d^2 / 2, or "
        "exp(-d) - 1 + d."
    ),
    "algorithm.entropy_coef": "Weight of the entropy that is added to the objective.",
    "correction.tis_cap": "tis: the greatest factor.",
    "correction.icepop_low": "icepop: tokens with a lower ratio teach nothing.",
    "correction.icepop_high": "icepop: tokens with a higher ratio teach nothing.",
    "optimizer.lr": "The learning rate, once it has warmed up.",
    "optimizer.min_lr": "Where decay ends; at most `lr`.",
    "optimizer.lr_decay_style": "Its way from `lr` to `min_lr` over the run.",
    "optimizer.weight_decay": "Decoupled from the gradient, as AdamW's.",
    "optimizer.adam_beta1": "Decay of the mean of gradients.",
    "optimizer.adam_beta2": "Decay of the mean of their squares.",
    "optimizer.adam_eps": "Added to the root of the latter.",
    "optimizer.clip_grad": "The norm that a larger gradient is scaled down to.",
    "train.num_mini_batches": "Optimizer steps on one rollout batch; at 1 SAPO's gate cannot act.",
    "train.logprob": (
        "How log-probs come of the output layer: from whole logits, in their own memory (inplace), "
        "or block by block without whole logits (fused), which is slower and takes less memory."
    ),
    "train.seed": "Of random weights, of sampling and of the ranks' random state.",
    "cold_start.steps": "Supervised updates; 0: none.",
    "cold_start.batch_size": "Problems of an update.",
    "cold_start.lr": "Its learning rate, constant once warm.",
    "cold_start.lr_warmup_steps": "Updates in which it rises.",
    "eval.num_problems": "Held-out problems; fewer, with a warning, where there are fewer.",
    "eval.temperature": "Of the k samples; pass@1 is greedy.",
    "eval.top_p": "Likewise.",
    "checkpoint.keep": "Newest checkpoints that are kept.",
    "logging.tensorboard": "Whether TensorBoard files are written to the run's folder.",
    "logging.wandb": "Whether metrics go to Weights & Biases; offline where it cannot be reached.",
    "logging.wandb_project": "The project there.",
    "logging.wandb_name": "The run's name there; None: that of the run's folder.",
    "cluster.gpu": "The kind of GPU.",
    "cluster.gpus_per_node": "Of the trainer's; those of servers elsewhere come to that.",
}
