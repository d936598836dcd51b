"""A recipe: YAML -> frozen dataclasses. The only place with defaults.

``load(path, overrides)`` merges ``base:`` recipes, the file and the command line, checks names and
types, and then the rules of :mod:`sapo_megatron.check`. User mistakes raise :class:`UserError`, in
one line.
"""

import dataclasses
import difflib
import json
import os
import re
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError


class UserError(ValueError):
    """The user's input is wrong: what, expected, got, how to fix it; exit status 2."""


class RunFailed(RuntimeError):
    """The work itself failed (a diverged run, a plan that does not fit); exit status 1."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Hugging Face model folder, or a name on the hub such as ``Qwen/Qwen3-30B-A3B``."""
    architecture: str | None = None
    """A ``config.json`` whose sizes the model must have; ``plan`` reads it where the model is not
    on this machine."""
    tokenizer: str | None = None
    """Folder, sentencepiece ``.model`` file or name on the hub; None: ``path``."""
    trust_remote_code: bool = False
    """Whether a tokenizer may run the Python code that comes with it."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the weights at ``path``, or from random ones of its architecture."""
    params_dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    moe_aux_loss_coeff: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """megatron-core's names; data parallelism is what the world size leaves over."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] | None = None

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One reasoning-gym task, e.g. ``{name: chain_sum, options: {min_terms: 2, max_terms: 2}}``."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where prompts come from: either ``tasks`` or the dataset at ``path``."""

    tasks: tuple[TaskConfig, ...] = ()
    path: str | None = None
    """A ``.parquet`` or JSONL file, a folder or a pattern of such files; or ``owner/name`` of a
    dataset on the Hugging Face hub, and after another slash a file, folder or pattern in it."""
    prompt_key: str = "prompt"
    """The column with a text or a list of messages; ``a.b`` is ``b`` inside the object ``a``."""
    answer_key: str = "answer"
    template: str | None = None
    """None: ``data.template``."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: SourceConfig
    eval: SourceConfig | None = None
    """Held-out problems; training never draws a prompt whose text is among them."""
    template: str = "{prompt}"
    """Text around a prompt, inside the user's turn where there is a chat template. Prompts that
    are lists of messages go into the chat template as they are."""
    apply_chat_template: bool = False


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    engine: Literal["in_process", "vllm"] = "in_process"
    """Who generates: the training processes with the training weights, or vLLM servers."""
    servers: tuple[str, ...] = ()
    """URLs of vLLM servers, such as ``http://node7:8000``; none: the trainer starts its own."""
    vllm_python: str | None = None
    """The Python of an environment with vLLM, for the servers that the trainer starts."""
    num_servers: int = 1
    """Servers that the trainer starts."""
    async_steps: Literal[0, 1] = 0
    """1: the servers sample the next step's responses while this step trains, with the weights from
    before it."""
    colocate: bool = False
    """The servers are on the GPUs of the trainer, and asleep while it trains: they give up their
    weights and memory after every rollout. Not run on a GPU yet."""
    weight_transfer: Literal["folder", "nccl"] = "folder"
    """How servers get weights: a folder on a file system that they share, or NCCL, with vLLM's
    sending side. nccl has not been run on GPUs yet."""
    server_concurrency: int = 256
    """Requests that one server works on at once."""
    server_timeout_s: float = 600.0
    """Seconds that a server may take to start, to answer one request, or to come back."""
    rollout_batch_size: int = 32
    """Prompts per step, over all ranks."""
    num_generations: int = 8
    """Responses per prompt (the group size G)."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_prompt_length: int = 1024
    max_response_length: int = 1024
    generation_batch_size: int = 256
    """Sequences that one rank generates at once."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and draw new prompts in their place."""
    dynamic_sampling_max_rounds: int = 8


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    function: str = "exact_match"
    """``reasoning_gym``, ``math_verify``, ``exact_match`` or ``module:function``."""
    timeout_s: float = 10.0
    """Seconds for one response; beyond it the reward is 0 and ``reward/timeouts`` counts it."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """The routers of a model with experts: what they are made to do, and how they are watched."""

    router_replay: Literal["disabled", "R2", "R3"] = "disabled"
    """Whose experts the training passes use: their own routers' (disabled), those of the old
    policy in the training engine (R2, from the first update on), or the rollout engine's (R3)."""
    decompose_every: int = 16
    """Updates between splits of Var[log r] into weights, router and covariance (two more forward
    passes of one mini-batch); 0: never."""
    prob_every: int = 16
    """Positions between tokens whose router probabilities are kept for ``tv`` and
    ``shift_factor``; 0: none are."""


LossType = Literal["sapo", "grpo", "gspo", "cispo"]

CLIP_DEFAULTS: dict[str, tuple[float, float]] = {
    "grpo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 0.28),
}
"""(clip_ratio_low, clip_ratio_high) where the recipe leaves them open."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    loss_type: LossType = "sapo"
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    clip_ratio_c: float | None = None
    """Dual clip: bound on the ratio of negative advantages (grpo only), > 1."""
    importance_sampling_level: Literal["token", "sequence"] | None = None
    """None: what the loss type needs (sequence for gspo, token for the others)."""
    loss_agg_mode: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"] = (
        "seq-mean-token-mean"
    )
    adv_estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    kl_coef: float = 0.0
    """Weight of the KL to the frozen initial policy; > 0 keeps a reference model."""
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0

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
    """By the ratio of the training engine's probability to the rollout engine's: cut off at
    ``tis_cap`` (truncated importance sampling), or 0 outside ``icepop_low`` to ``icepop_high``."""
    tis_cap: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    sequence_mask_kl: float | None = None
    """Sequences with a negative advantage whose mean KL from the rollout engine's policy to the
    current one is above this teach nothing."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_warmup_steps: int = 0
    """Optimizer steps, as are all lengths of the schedule."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    optimizer_offload_fraction: float = 0.0
    """Share of Adam's state that is kept, and updated, in host memory (GPUs only)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 100
    """Rollout batches; each makes ``num_mini_batches`` optimizer steps."""
    num_mini_batches: int = 4
    max_tokens_per_gpu: int = 4096
    """Tokens of a micro-batch on one rank; times context_parallel_size for the whole."""
    packing: bool = True
    """Lay the sequences of a micro-batch end to end; False: pad them to one length."""
    logprob: Literal["inplace", "fused"] = "inplace"
    logprob_chunk_size: int | None = None
    """Rows of logits handled at once; None: sized to stay in cache."""
    on_nonfinite: Literal["skip", "abort"] = "abort"
    """What a NaN or inf in loss or gradient does to the step."""
    seed: int = 1234
    run_dir: str | None = None
    """None: a new numbered folder under ``runs/<recipe name>``."""


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Supervised warm-up on the training source's own answers, before the first rollout.

    The learning rate stays up after its own warm-up: SAPO then starts from weights that have not
    settled, which leaves it the easy part of the way down.
    """

    steps: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    lr_warmup_steps: int = 20


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations; 0: only before and at the end."""
    num_problems: int = 64
    k: int = 8
    """Samples per problem for avg@k."""
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "sapo-megatron"
    wandb_name: str | None = None
    dump_every: int = 0
    """Updates between dumps of a mini-batch's tokens to ``<run>/dumps``; 0: never."""


GpuName = Literal["a100-80gb", "h100-80gb", "h20-96gb", "h200-141gb", "b200-180gb"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What ``plan`` plans for; training uses the processes it is started with."""

    gpu: GpuName = "h100-80gb"
    nodes: int | None = None
    """None: as few GPUs as the layout takes."""
    gpus_per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
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


PEER_KEYS = {
    "sapo_tau_pos": "algorithm.tau_pos",
    "sapo_tau_neg": "algorithm.tau_neg",
    "sapo_temperature_pos": "algorithm.tau_pos",
    "sapo_temperature_neg": "algorithm.tau_neg",
    "loss_mode": "algorithm.loss_type",
    "policy_loss": "algorithm.loss_type",
    "epsilon": "algorithm.clip_ratio_low",
    "epsilon_high": "algorithm.clip_ratio_high",
    "eps_clip": "algorithm.clip_ratio_low",
    "eps_clip_high": "algorithm.clip_ratio_high",
    "eps_clip_c": "algorithm.clip_ratio_c",
    "clip_ratio": "algorithm.clip_ratio_low",
    "delta": "algorithm.clip_ratio_c",
    "advantage_estimator": "algorithm.adv_estimator",
    "beta": "algorithm.kl_coef",
    "kl_loss_coef": "algorithm.kl_coef",
    "kl_loss_type": "algorithm.kl_type",
    "n_samples_per_prompt": "rollout.num_generations",
    "group_size": "rollout.num_generations",
    "num_iterations": "train.num_mini_batches",
    "num_steps_per_rollout": "train.num_mini_batches",
    "steps_per_generation": "train.num_mini_batches",
    "train_batch_size": "rollout.rollout_batch_size",
    "max_completion_length": "rollout.max_response_length",
    "rollout_max_response_len": "rollout.max_response_length",
    "learning_rate": "optimizer.lr",
    "use_tis": "correction.rollout_is",
    "tis_clip": "correction.tis_cap",
    "rollout_is_threshold": "correction.tis_cap",
    "rollout_importance_sampling_mode": "correction.rollout_is",
    "rollout_importance_sampling_threshold": "correction.tis_cap",
    "off_policy_sequence_mask_delta": "correction.sequence_mask_kl",
    "routing_replay": "routing.router_replay",
    "use_routing_replay": "routing.router_replay",
    "use_rollout_routing_replay": "routing.router_replay",
    "enable_rollout_routing_replay": "routing.router_replay",
    "moe_enable_routing_replay": "routing.router_replay",
    "enable_routing_replay": "routing.router_replay",
    "router_replay_mode": "routing.router_replay",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
}
"""Names that peers give to keys of ours (ms-swift, TRL, verl, slime, AReaL)."""

_PATH_KEYS = (
    "model.path",
    "model.architecture",
    "model.tokenizer",
    "data.train.path",
    "data.eval.path",
    "rollout.vllm_python",
)
_MODEL = r"(\w[\w.-]*/[\w.-]+)(?<!\.model)"
_DATASET = r"(\w[\w.-]*/[\w.-]+)(?<!\.jsonl)(?<!\.parquet)(/.*)?"
_HUB_NAMES = {
    "model.path": _MODEL,
    "model.tokenizer": _MODEL,
    "data.train.path": _DATASET,
    "data.eval.path": _DATASET,
}
"""Keys that may name something on the Hugging Face hub, and how such a name (owner/name) looks."""


def load(path: str | Path, overrides: dict[str, str] | None = None) -> Recipe:
    """Read a recipe and check it.

    ``overrides`` maps ``section.key`` (or a bare key that only one section has) to YAML text.
    Relative paths mean: beside the recipe that holds them, or, in an override, the working folder.
    Raises UserError for anything that is wrong with either.
    """
    from sapo_megatron.check import check  # the rules are written against this module

    path = Path(path)
    raw = _read(path)
    raw.setdefault("name", path.stem)
    for key, text in (overrides or {}).items():
        _override(raw, key, text)
    try:
        recipe = _ADAPTER.validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    check(recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as ``load`` reads it back."""
    return yaml.safe_dump(_ADAPTER.dump_python(recipe, mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML with 1e-6 as a number and without a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file with its ``base:`` merged below it and its paths made absolute."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base: expected a recipe that is not its own base; remove it")
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        of = f" (base of {seen[-1]})" if seen else ""
        raise UserError(f"recipe: no such file: {path}{of}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_yaml_problem(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {_show(raw)}")
    raw = {key: value for key, value in raw.items() if value is not None}
    for key in _PATH_KEYS:
        _absolute(raw, key, path.parent)
    base = raw.pop("base", None)
    if base is None:
        return raw
    low = _read(path.parent / str(base), (*seen, path.resolve()))
    low.pop("name", None)
    return _merge(low, raw)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f":{error.problem_mark.line + 1}: not YAML as recipes want it: {error.problem}"
    return f": not YAML: {' '.join(str(error).split())}"


def _absolute(raw: dict[str, Any], key: str, folder: Path) -> None:
    """Make a path of the recipe absolute, unless it is a name on the hub and no folder here."""
    *sections, name = key.split(".")
    node: Any = raw
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not (isinstance(node, dict) and isinstance(node.get(name), str)):
        return
    given = node[name]
    if key == "rollout.vllm_python" and "/" not in given:  # a program that is looked for
        return
    hub = re.fullmatch(_HUB_NAMES[key], given) if key in _HUB_NAMES else None
    if hub is None or (folder / hub[1]).exists():
        node[name] = os.path.abspath(folder / Path(given).expanduser())


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(raw: dict[str, Any], key: str, text: str) -> None:
    dotted = _find_key(key)
    *sections, name = dotted.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"{section}: expected a section (keys and values), got {_show(node)}")
    try:
        node[name] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        node[name] = text
    if dotted in _PATH_KEYS:
        _absolute(raw, dotted, Path.cwd())


def _find_key(key: str) -> str:
    """The full name of a key given on the command line. Raises UserError with the nearest key."""
    known = _known_keys()
    key = key.replace("-", "_")
    if key in known:
        return key
    matches = [k for k in known if k.rsplit(".", 1)[-1] == key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{key}: several sections have it; say one of {', '.join(matches)}")
    raise UserError(f"{key}: no such key; {_nearest(key)}")


def _nearest(key: str) -> str:
    last = key.rsplit(".", 1)[-1]
    if last in PEER_KEYS:
        return f"here it is called {PEER_KEYS[last]}"
    known = _known_keys()
    by_name = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    named = difflib.get_close_matches(last, by_name, n=1, cutoff=0.7)
    if named:
        return f"the nearest is {by_name[named[0]]}"
    return f"the nearest is {difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]}"


def _known_keys(cls: type = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of every value, and of the sections that may be null."""
    keys: list[str] = []
    for f in dataclasses.fields(cls):
        section, nullable = _section_of(typing.get_type_hints(cls)[f.name])
        if section:
            keys += _known_keys(section, f"{prefix}{f.name}.")
        if section is None or nullable:
            keys.append(prefix + f.name)
    return keys


def _section_of(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that a field holds (None: it holds a value), and whether null may stand."""
    options = (hint, *typing.get_args(hint)) if typing.get_origin(hint) is not tuple else (hint,)
    section = next((t for t in options if dataclasses.is_dataclass(t)), None)
    return section, type(None) in options


def _explain(error: ValidationError) -> str:
    """The most telling problem of a validation, in one line: an unknown key before all others."""
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "unexpected_keyword_argument"]
    problem = (unknown or problems)[0]
    key, got = ".".join(str(part) for part in problem["loc"]), problem["input"]
    if unknown:
        while isinstance(got, dict) and got:
            name, got = next(iter(got.items()))
            key = f"{key}.{name}"
        return f"{key}: no such key; {_nearest(key)}"
    if problem["type"] == "missing":
        return f"{key}: missing; set it in the recipe"
    wanted = _WANTED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
    return f"{key}: expected {wanted}, got {_show(got)}; change it"


_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text (quote it)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping (keys and values)",
    "dataclass_type": "a section (keys and values)",
}
"""pydantic's error types in our words."""


def _show(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, default=str), 80, placeholder=" ...")


def _sections(cls: type = Recipe) -> list[type]:
    """``cls`` and every dataclass that its fields name, at any depth."""
    hints = typing.get_type_hints(cls).values()
    named = [
        t for hint in hints for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)
    ]
    return [cls, *(inner for section in named for inner in _sections(section))]


for _section in _sections():
    _section.__pydantic_config__ = ConfigDict(extra="forbid")
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
