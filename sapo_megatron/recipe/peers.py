"""What other projects call keys of ours: verl, slime, miles, TRL, ms-swift, SkyRL, NeMo-RL, AReaL,
OpenRLHF and Megatron-LM."""

_NAMES = """
algorithm.adv_estimator: advantage_estimator
algorithm.clip_ratio_c: delta eps_clip_c ratio_clip_c
algorithm.clip_ratio_high: epsilon_high eps_clip_high clip_eps_high ratio_clip_max \
grpo_clamp_eps_upper
algorithm.clip_ratio_low: epsilon epsilon_low eps_clip eps_clip_low clip_eps_low clip_ratio \
ratio_clip_min cliprange grpo_clamp_eps_lower
algorithm.entropy_coef: entropy_coeff entropy_loss_coef grpo_entropy_term_weight
algorithm.importance_sampling_level: sequence_level_importance_ratios
algorithm.kl_coef: beta kl_beta kl_loss_coef init_kl_coef grpo_kl_beta reference_policy_kl_penalty
algorithm.kl_type: kl_loss_type kl_estimator kl_estimator_type reference_policy_kl_type
algorithm.loss_agg_mode: loss_reduction calculate_per_token_loss token_level_loss
algorithm.loss_type: loss_mode policy_loss policy_loss_type
algorithm.tau_neg: sapo_tau_neg sapo_temperature_neg
algorithm.tau_pos: sapo_tau_pos sapo_temperature_pos
checkpoint.every: save_freq save_interval save_period save_steps
checkpoint.keep: keep_top_k save_total_limit max_actor_ckpt_to_keep max_ckpts_to_keep
cluster.gpus_per_node: n_gpus_per_node num_gpus_per_node actor_num_gpus_per_node
cluster.nodes: nnodes num_nodes actor_num_nodes
correction.rollout_is: use_tis rollout_importance_sampling_mode \
use_importance_sampling_correction vllm_importance_sampling_correction
correction.sequence_mask_kl: off_policy_sequence_mask_delta
correction.tis_cap: tis_clip tis_imp_ratio_cap rollout_is_threshold \
rollout_importance_sampling_threshold vllm_importance_sampling_cap \
truncated_importance_sampling_ratio
data.chat_template_kwargs: apply_chat_template_kwargs
data.eval.path: val_files val_data eval_prompt_data validation_files test_files eval_dataset
data.template: prompt_template
data.train.answer_key: label_key
data.train.path: train_files train_data prompt_data dataset dataset_name train_dataset
data.train.prompt_key: input_key
eval.every: test_freq eval_interval eval_steps val_period
eval.k: n_samples_per_eval_prompt
eval.num_problems: max_val_samples val_batch_size
logging.tensorboard: use_tensorboard tensorboard_dir tensorboard_enabled
logging.wandb: use_wandb wandb_enabled report_to
logging.wandb_name: experiment_name run_name wandb_run_name wandb_exp_name
logging.wandb_project: project_name
model.attention_backend: attn_implementation attn_impl
model.layers: transformer_impl
model.params_dtype: dtype torch_dtype precision bf16
model.path: model_name_or_path model_name hf_checkpoint pretrain pretrained_model_name_or_path
model.tokenizer: tokenizer_path tokenizer_model tokenizer_name_or_path
optimizer.adam_beta1: beta1
optimizer.adam_beta2: beta2
optimizer.adam_eps: adam_epsilon
optimizer.clip_grad: max_grad_norm grad_clip gradient_clipping
optimizer.lr: learning_rate
optimizer.lr_decay_style: lr_scheduler lr_scheduler_type warmup_style
optimizer.lr_warmup_steps: warmup_steps num_warmup_steps lr_warmup_iters
optimizer.min_lr: min_learning_rate
optimizer.optimizer_offload_fraction: optimizer_offload optimizer_cpu_offload
parallel.context_parallel_size: cp cp_size
parallel.distributed_timeout_s: distributed_timeout_minutes nccl_timeout
parallel.expert_model_parallel_size: ep ep_size expert_parallel_size
parallel.expert_tensor_parallel_size: etp
parallel.pipeline_model_parallel_size: pp pp_size pipeline_parallel_size
parallel.recompute_granularity: recompute gradient_checkpointing activation_checkpointing \
enable_gradient_checkpointing
parallel.tensor_model_parallel_size: tp tp_size tensor_parallel_size
parallel.virtual_pipeline_model_parallel_size: vpp vpp_size
reward.function: custom_reward_function reward_fn reward_funcs compute_score rm_type custom_rm_path
rollout.async_steps: staleness_threshold max_staleness max_staleness_steps \
max_head_offpolicyness max_trajectory_age_steps
rollout.dynamic_sampling: filter_groups use_dynamic_sampling dynamic_sample
rollout.dynamic_sampling_max_rounds: max_num_gen_batches dynamic_sampling_max_gen_batches
rollout.engine: use_vllm vllm_mode rollout_backend
rollout.max_prompt_length: rollout_max_prompt_len prompt_max_len max_input_length
rollout.max_response_length: max_completion_length rollout_max_response_len max_new_tokens \
max_generate_length response_length
rollout.num_generations: n n_samples_per_prompt group_size grpo_group_size \
num_generations_per_prompt
rollout.rollout_batch_size: train_batch_size num_prompts_per_step grpo_prompts_per_step
rollout.servers: vllm_server_base_url vllm_server_host
rollout.stop_token_ids: rollout_stop_token_ids
rollout.temperature: rollout_temperature
rollout.top_p: rollout_top_p
routing.router_replay: routing_replay use_routing_replay use_rollout_routing_replay \
enable_routing_replay enable_rollout_routing_replay moe_enable_routing_replay router_replay_mode
train.logprob_chunk_size: log_probs_chunk_size
train.max_tokens_per_gpu: ppo_max_token_len_per_gpu max_tokens_per_mb
train.num_mini_batches: num_iterations num_steps_per_rollout steps_per_generation
train.packing: sequence_packing use_remove_padding
train.run_dir: output_dir default_local_dir checkpoint_dir
train.seed: random_seed
train.steps: max_steps total_steps total_training_steps max_num_steps num_rollout train_iters
"""
PEER_KEYS = {
    name: key
    for key, _, names in (line.partition(": ") for line in _NAMES.splitlines())
    for name in names.split()
}
