"""The keys of a recipe, with types, ranges, defaults and meanings: the only place with defaults."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from sapo_megatron.sample import Temperatures

SMALLEST, LARGEST = 1e-30, (2**31 - 1, 1e9, 1e6)
"""Beyond them fp32, int32, and the clocks of sockets and processes go over."""
Count = Annotated[int, Field(gt=0, le=LARGEST[0])]
Whole = Annotated[int, Field(ge=0, le=LARGEST[0])]
Positive = Annotated[float, Field(gt=SMALLEST, le=LARGEST[1])]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST[1])]
Seconds = Annotated[float, Field(gt=0, le=LARGEST[2])]
Text = Annotated[str, Field(pattern=r"\S")]
Fraction = Annotated[float, Field(ge=0, le=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: where it comes from, and what it computes with."""

    path: Text
    """Hugging Face model folder, or a name on the hub such as ``Qwen/Qwen3-30B-A3B``."""
    architecture: Text | None = None
    """A ``config.json`` whose sizes the model must have; ``plan`` reads it where the model is not
    on this machine."""
    tokenizer: Text | None = None
    """Folder, sentencepiece ``.model`` file or name on the hub; None: ``path``."""
    trust_remote_code: bool = False
    """Whether a tokenizer may run the Python code that comes with it."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the weights at ``path``, or from random ones of its architecture."""
    params_dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Whose layers: Transformer Engine's, torch's (a reference, and slower), or (auto) Transformer
    Engine's on GPUs and torch's elsewhere."""
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Which attention Transformer Engine takes; auto: its own choice."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    moe_aux_loss_coeff: NotNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """megatron-core's names; data parallelism is what the world size leaves over."""

    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2, le=LARGEST[0])] | None = None
    context_parallel_size: Count = 1
    expert_model_parallel_size: Count = 1
    expert_tensor_parallel_size: Count = 1
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = "alltoall"
    """How tokens reach their experts: NCCL's all-to-all, or DeepEP (flex), which is faster across
    nodes and a package of its own."""
    distributed_timeout_s: Seconds = 1800.0
    """Seconds that a rank waits for the others, rollouts and hand-overs of weights included."""
    num_layers_in_first_pipeline_stage: Count | None = None
    num_layers_in_last_pipeline_stage: Count | None = None
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Count | None = None
    recompute_modules: tuple[str, ...] | None = None

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One reasoning-gym task, e.g. ``{name: chain_sum, options: {min_terms: 2, max_terms: 2}}``."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where prompts come from: either ``tasks`` or the dataset at ``path``."""

    tasks: tuple[TaskConfig, ...] = ()
    path: Text | None = None
    """A ``.parquet`` or JSONL file, a folder or a pattern of such files; or ``owner/name`` of a
    dataset on the Hugging Face hub, and after another slash a file, folder or pattern in it."""
    prompt_key: Text = "prompt"
    """The column with a text or a list of messages; ``a.b`` is ``b`` inside the object ``a``."""
    answer_key: Text = "answer"
    template: str | None = None
    """None: ``data.template``."""
    seed: Whole = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The problems to train and evaluate on, and the text around them."""

    train: SourceConfig
    eval: SourceConfig | None = None
    """Held-out problems; training never draws a prompt whose text is among them."""
    template: str = "{prompt}"
    """Text around a prompt, inside the user's turn where there is a chat template. Prompts that
    are lists of messages go into the chat template as they are."""
    apply_chat_template: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as ``{enable_thinking: false}``."""
    on_unverifiable: Literal["error", "drop"] = "error"
    """What becomes of rows whose answer the reward function cannot compare with a response, such as
    ``proof``: the run is refused, or does without them; either says how many there are, and why."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled, and by whom."""

    engine: Literal["in_process", "vllm"] = "in_process"
    """Who generates: the training processes with the training weights (for CPUs and tests), or
    vLLM servers."""
    large_in_process: bool = False
    """Whether the training processes may generate with more than a billion parameters, which takes
    hours where servers take minutes."""
    servers: tuple[str, ...] = ()
    """URLs of vLLM servers, such as ``http://node7:8000``; none: the trainer starts its own. Names
    that end in ``.invalid`` stand for servers that are to be given with the run, for ``plan``."""
    vllm_python: Text | None = None
    """The Python of an environment with vLLM, for the servers that the trainer starts; a relative
    path is one of the working folder."""
    num_servers: Count | None = None
    """Servers that the trainer starts on each node; None: as many as its GPUs hold, and one where
    there are none."""
    server_tensor_parallel_size: Count = 1
    """GPUs of one server that the trainer starts; of servers elsewhere it tells ``plan`` alone."""
    min_servers: Count = 1
    """Servers, of those that one process speaks to, without which a run ends with a checkpoint."""
    async_steps: Annotated[int, Field(ge=0, le=8)] = 0
    """Steps that responses are sampled ahead of their training, with the weights of then: at most
    so many batches and one are asked for and not yet trained on. Servers do it meanwhile."""
    on_new_weights: Literal["wait", "continue"] = "wait"
    """What new weights do about responses that servers are in the middle of: they wait for them, or
    have them continued (partial rollouts), so that the tokens of one come from several weights."""
    colocate: bool = False
    """The servers are on the GPUs of the trainer, and asleep while it trains: they give up their
    weights and memory after every rollout. Else they are on those that no process trains on. Not
    run on a GPU yet."""
    colocate_offload: Literal["gradients", "optimizer", "weights"] = "gradients"
    """What leaves the trainer's GPUs while servers on them are awake: gradients, also the
    optimizer's state, or weights as well."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Part of a GPU's memory that a server on the trainer's GPUs takes while it is awake."""
    weight_transfer: Literal["folder", "nccl"] = "folder"
    """How servers get weights: a folder on a file system that they share, or NCCL, with vLLM's
    sending side. nccl has not been run on GPUs yet."""
    server_concurrency: Count = 256
    """Requests that one server works on at once."""
    server_timeout_s: Seconds = 600.0
    """Seconds that a server may take to start, to answer one request, or to come back."""
    rollout_batch_size: Count = 32
    """Prompts per step, over all ranks."""
    num_generations: Annotated[int, Field(ge=2, le=LARGEST[0])] = 8
    """Responses per prompt (the group size G), which advantages compare with one another."""
    temperature: Positive = 1.0
    top_p: TopP = 1.0
    max_prompt_length: Count = 1024
    max_response_length: Count = 1024
    stop_token_ids: tuple[Whole, ...] = ()
    """Tokens that end a response, beside the tokenizer's eos and those which the model's
    ``generation_config.json`` and ``config.json`` name."""
    generation_batch_size: Count = 256
    """Sequences that one rank generates at once."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and draw new prompts in their place."""
    dynamic_sampling_max_rounds: Count = 8

    @property
    def server_share(self) -> float:
        """Part of a GPU's memory that a server takes: beside the trainer, or vLLM's own default."""
        return self.gpu_memory_utilization if self.colocate else 0.92


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What scores a response."""

    function: str = "exact_match"
    """``reasoning_gym``, ``math_verify``, ``exact_match`` or ``module:function``."""
    timeout_s: Seconds = 10.0
    """Seconds for one response; beyond it there is no reward and ``reward/timeouts`` counts it."""
    num_workers: Count = 1
    """Processes in which each rank that scores does so; a response that hangs holds up but one."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """The routers of a model with experts: what they are made to do, and how they are watched."""

    router_replay: Literal["disabled", "R2", "R3"] = "disabled"
    """Whose experts the training passes use: their own routers' (disabled), those of the old
    policy in the training engine (R2, from the first update on), or the rollout engine's (R3)."""
    replay_threshold: Fraction = 0.0
    """R3 replays an expert only where the router's current score for it is at least this share of
    its score for the weakest of its own choice; the others make room for the router's own. 0: R3
    replays all. Scores are what weighs experts: without the bias that only chooses."""
    observe: bool = True
    """Whether the routers' choices are recorded and compared, and the ratios' variance measured:
    ``routing/*``, ``variance/*``, ``sapo/bound_*``; the rest of this section says how much."""
    decompose_every: Whole = 16
    """Updates between splits of Var[log r] into weights, router and covariance (two more forward
    passes of one mini-batch), and rollouts between those of the difference of the engines (one more
    pass); 0: never."""
    prob_every: Whole = 16
    """Positions between tokens whose router probabilities are kept for ``tv`` and
    ``shift_factor``; 0: none are."""

    @property
    def kept_every(self) -> int:
        """``prob_every`` where routers are observed, else 0."""
        return self.prob_every if self.observe else 0


LossType = Literal["sapo", "grpo", "gspo", "cispo", "vespo"]

CLIP_DEFAULTS: dict[str, tuple[float, float]] = {
    "grpo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 0.28),
}
"""(clip_ratio_low, clip_ratio_high) where the recipe leaves them open."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The policy loss and the advantages that it is given."""

    loss_type: LossType = "sapo"
    old_policy: Literal["recompute", "rollout"] = "recompute"
    """What ratios are to: the policy that a step starts from, in the training engine, or the one
    that sampled, in the engine that did, which saves a forward pass."""
    tau_pos: Positive = 1.0
    tau_neg: Positive = 1.05
    clip_ratio_low: Positive | None = None
    clip_ratio_high: Positive | None = None
    clip_ratio_c: Annotated[float, Field(gt=1, le=LARGEST[1])] | None = None
    """Dual clip: bound on the ratio of negative advantages (grpo only)."""
    importance_sampling_level: Literal["token", "sequence"] | None = None
    """None: what the loss type needs (sequence for gspo and vespo, token for the others)."""
    loss_agg_mode: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"] = (
        "seq-mean-token-mean"
    )
    adv_estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    kl_coef: NotNegative = 0.0
    """Weight of the KL to the frozen initial policy; > 0 keeps a reference model."""
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: NotNegative = 0.0

    @property
    def temperatures(self) -> Temperatures:
        """The temperatures of SAPO's gate. Raises ValueError unless both are finite and > 0."""
        return Temperatures(self.tau_pos, self.tau_neg)

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high) of the clipped losses, defaults filled in."""
        low, high = CLIP_DEFAULTS[self.loss_type]
        return (
            low if self.clip_ratio_low is None else self.clip_ratio_low,
            high if self.clip_ratio_high is None else self.clip_ratio_high,
        )


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """What is done where the rollout engine and the training engine disagree on a token.

    Each multiplies the policy term; KL and entropy terms stay as they are.
    """

    rollout_is: Literal["disabled", "tis", "icepop"] = "disabled"
    """A factor: the training engine's probability over the rollout engine's, cut off at
    ``tis_cap`` (truncated importance sampling), or 0 outside ``icepop_low`` to ``icepop_high``."""
    tis_cap: Positive = 2.0
    icepop_low: Positive = 0.5
    icepop_high: Positive = 5.0
    sequence_mask_kl: Positive | None = None
    """Sequences with a negative advantage whose mean KL from the rollout engine's policy to the
    current one is above this teach nothing."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its learning rate."""

    lr: Positive = 1e-6
    min_lr: NotNegative = 0.0
    lr_warmup_steps: Whole = 0
    """Optimizer steps, as are all lengths of the schedule."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NotNegative = 0.0
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.98
    adam_eps: Positive = 1e-8
    clip_grad: Positive = 1.0
    ess_scaling: bool = False
    """Whether the learning rate of an update is multiplied by sqrt(ESS / B) (arXiv 2602.17616): B
    is the number of its sequences, ESS their effective sample size, where each weighs its
    probability under the current policy over that under the one that sampled it."""
    optimizer_offload_fraction: Fraction = 0.0
    """Share of Adam's state that is kept, and updated, in host memory (GPUs only)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run trains, and how a step is cut into pieces."""

    steps: Whole = 100
    """Rollout batches; each makes ``num_mini_batches`` optimizer steps."""
    num_mini_batches: Count = 4
    max_tokens_per_gpu: Count = 4096
    """Tokens of a micro-batch on one rank; times context_parallel_size for the whole."""
    packing: bool = True
    """Lay the sequences of a micro-batch end to end; False: pad them to one length."""
    logprob: Literal["inplace", "fused"] = "inplace"
    logprob_chunk_size: Count | None = None
    """Rows of logits handled at once; None: sized to stay in cache."""
    on_nonfinite: Literal["skip", "abort"] = "abort"
    """What a NaN or inf in loss or gradient does to the step; 17 skipped in a row end the run."""
    seed: Whole = 1234
    run_dir: Text | None = None
    """None: a new numbered folder under ``runs/<recipe name>``."""


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Supervised warm-up on the training source's own answers, before the first rollout.

    The learning rate stays up after its own warm-up: SAPO then starts from weights that have not
    settled, which leaves it the easy part of the way down.
    """

    steps: Whole = 0
    batch_size: Count = 64
    lr: Positive = 1e-3
    lr_warmup_steps: Whole = 20


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How held-out problems are scored."""

    every: Whole = 0
    """Steps between evaluations; 0: only before and at the end."""
    num_problems: Count = 64
    k: Count = 8
    """Samples per problem for avg@k."""
    temperature: Positive = 1.0
    top_p: TopP = 1.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: Whole = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run writes beside ``metrics.jsonl``."""

    samples_per_step: Whole = 4
    """Groups of each step, prompts with all their responses, that ``samples.jsonl`` and W&B are
    given: the best, the worst and others at random; 0: none."""
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: Text = "sapo-megatron"
    wandb_name: Text | None = None
    dump_every: Whole = 0
    """Updates between dumps of a mini-batch's tokens to ``<run>/dumps``; 0: never."""


GpuName = Literal["a100-80gb", "h100-80gb", "h20-96gb", "h200-141gb", "b200-180gb"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What ``plan`` plans for; training uses the processes it is started with."""

    gpu: GpuName = "h100-80gb"
    nodes: Count | None = None
    """None: as few GPUs as the layout takes."""
    gpus_per_node: Count = 8
    host_memory_gib: Count | None = None
    """Host memory of a node; None: what nodes with such GPUs have at least."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run is told."""

    name: str
    """The file's stem unless the recipe says otherwise."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    routing: RoutingConfig = RoutingConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    correction: CorrectionConfig = CorrectionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()
