"""The rules a recipe must keep, beyond names, types and ranges.

``check`` needs nothing but the recipe, ``check_architecture`` and ``check_generation`` the model's
architecture, and ``check_world`` the number of processes. Each raises :class:`UserError` for the
first rule that is broken: what, expected, got, how to fix it.
"""

import dataclasses
import logging
import math
import re

from sapo_megatron.errors import UserError, hint
from sapo_megatron.hf.architecture import Architecture, GroupedQueryAttention, count_parameters
from sapo_megatron.recipe.schema import (
    CLIP_DEFAULTS,
    AlgorithmConfig,
    CorrectionConfig,
    DataConfig,
    ParallelConfig,
    Recipe,
    RolloutConfig,
    SourceConfig,
)
from sapo_megatron.recipe.together import check_together

logger = logging.getLogger(__name__)


REWARD_FUNCTIONS = ("reasoning_gym", "math_verify", "exact_match")
NOT_OF_TEMPLATES = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
"""What prompts are rendered with in any case, and settings of transformers: no template's own."""
IN_PROCESS_PARAMETERS = 1e9
"""Of the largest model that the training processes generate with, unless the recipe says so."""
RECOMPUTE_MODULES = (
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "shared_experts",
)


def check(recipe: Recipe) -> None:
    """Every rule that needs neither processes nor files. Raises UserError; warns twice at most."""
    if not re.fullmatch(r"\w[\w.+-]*", recipe.name):
        raise UserError(
            f"name: expected letters, digits and . _ + - (it names the run's folder), got "
            f"{recipe.name[:80]!r}; change name or the recipe file's name"
        )
    _check_data(recipe)
    check_together(recipe)
    _check_servers(recipe.rollout)
    _check_algorithm(recipe.algorithm)
    _check_correction(recipe.correction)
    _check_batches(recipe)
    _check_pipeline(recipe.parallel)
    _check_recompute(recipe.parallel)
    if recipe.routing.replay_threshold and recipe.routing.router_replay != "R3":
        raise UserError(
            f"routing.replay_threshold: expected 0 with routing.router_replay "
            f"{recipe.routing.router_replay} (it grades the experts that R3 replays), got "
            f"{recipe.routing.replay_threshold:g}; remove it or set routing.router_replay=R3"
        )
    if recipe.logging.dump_every and not recipe.routing.observe:
        raise UserError(
            f"logging.dump_every: expected 0 with routing.observe false, which looks at no token, "
            f"got {recipe.logging.dump_every}; remove one of the two"
        )
    _warn(recipe)


def check_architecture(recipe: Recipe, arch: Architecture) -> None:
    """The layout against the model's architecture. Raises UserError."""
    p = recipe.parallel
    tp, ep = p.tensor_model_parallel_size, p.expert_model_parallel_size
    etp = p.expert_tensor_parallel_size
    attention = arch.attention
    sizes = (
        ("parallel.tensor_model_parallel_size", tp),
        ("rollout.server_tensor_parallel_size", recipe.rollout.server_tensor_parallel_size),
    )
    for key, size in sizes:
        if attention.num_heads % size:
            raise _indivisible(key, size, f"number of attention heads {attention.num_heads}")
        if isinstance(attention, GroupedQueryAttention):
            kv_heads = attention.num_kv_heads
            if kv_heads % size and size % kv_heads:
                raise UserError(
                    f"{key}: expected a divisor or a multiple of the model's num_key_value_heads "
                    f"{kv_heads}, got {size}; change it"
                )
    ranks = tp * p.context_parallel_size
    if arch.delta_net and (keys := arch.delta_net.num_key_heads) % ranks:
        key = "parallel.context_parallel_size x tensor_model_parallel_size"
        raise _indivisible(key, ranks, f"linear_num_key_heads {keys}")
    longest = recipe.rollout.max_prompt_length + recipe.rollout.max_response_length
    if longest > arch.max_position_embeddings:
        raise UserError(
            f"rollout.max_response_length: expected max_prompt_length + max_response_length of at "
            f"most the model's max_position_embeddings {arch.max_position_embeddings}, got "
            f"{longest}; lower it"
        )
    _check_layers(p, arch.num_layers)
    if arch.experts is None:
        if ep > 1 or etp > 1:
            raise UserError(
                f"parallel.expert_model_parallel_size: expected 1, and expert_tensor_parallel_size "
                f"1, for a model without experts, got {ep} and {etp}; remove them"
            )
        if recipe.routing.router_replay != "disabled":
            raise UserError(
                f"routing.router_replay: expected disabled for a model without experts, got "
                f"{recipe.routing.router_replay}; remove it"
            )
        return
    known = recipe.rollout.engine == "in_process" or recipe.routing.router_replay == "R3"
    if recipe.algorithm.old_policy == "rollout" and recipe.routing.observe and not known:
        raise UserError(
            "routing.observe: expected false with algorithm.old_policy rollout on servers without "
            "routing.router_replay R3, of whose experts nothing is known, got true; change one"
        )
    if arch.experts.number % ep:
        experts = f"number of experts {arch.experts.number}"
        raise _indivisible("parallel.expert_model_parallel_size", ep, experts)
    if arch.experts.hidden_size % etp:
        width = f"expert width {arch.experts.hidden_size}"
        raise _indivisible("parallel.expert_tensor_parallel_size", etp, width)


def check_generation(r: RolloutConfig, arch: Architecture) -> None:
    """Who generates against the model's size. Raises UserError."""
    parameters = count_parameters(arch)
    if r.engine == "in_process" and parameters > IN_PROCESS_PARAMETERS and not r.large_in_process:
        raise UserError(
            f"rollout.engine: expected vllm for a model of {parameters / 1e9:.3g} billion "
            f"parameters, got in_process, which is for CPUs and tests; set rollout.engine=vllm "
            f"with rollout.vllm_python or rollout.servers, or rollout.large_in_process=true"
        )


def check_world(recipe: Recipe, world_size: int) -> None:
    """The rules that depend on the number of processes. Raises UserError."""
    p = recipe.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    cp, ep = p.context_parallel_size, p.expert_model_parallel_size
    etp = p.expert_tensor_parallel_size
    dense, moe = tp * pp * cp, etp * ep * pp
    least = smallest_world(p)
    for product, names in ((dense, "tp x pp x cp"), (moe, "etp x ep x pp")):
        if world_size % product:
            raise UserError(
                f"parallel: expected a world size that {names} = {product} divides, got "
                f"{world_size} processes; start a multiple of {least}, e.g. "
                f"torchrun --nproc-per-node {least} -m sapo_megatron train ..."
            )
    sequences = recipe.rollout.rollout_batch_size * recipe.rollout.num_generations
    generators = world_size // (tp * pp) if recipe.rollout.engine != "vllm" else 1
    if sequences % generators:
        raise UserError(
            f"rollout.rollout_batch_size: expected rollout_batch_size x num_generations = "
            f"{sequences} to divide by the {generators} ranks that generate "
            f"(world size / (tp x pp)), got a remainder of {sequences % generators}; change it"
        )


def smallest_world(p: ParallelConfig) -> int:
    """The least number of processes that the layout divides."""
    return math.lcm(
        p.model_parallel_size * p.context_parallel_size,
        p.pipeline_model_parallel_size
        * p.expert_model_parallel_size
        * p.expert_tensor_parallel_size,
    )


def _check_data(recipe: Recipe) -> None:
    sources = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    for where, source in sources.items():
        if source:
            _check_source(where, source)
            if recipe.reward.function == "reasoning_gym" and source.path:
                raise UserError(
                    f"reward.function: expected exact_match, math_verify or module:function for "
                    f"the data in {where}.path, got reasoning_gym, which scores its own tasks only"
                )
    _check_template("data.template", recipe.data.template)
    _check_template_arguments(recipe.data)
    function = recipe.reward.function
    if function not in REWARD_FUNCTIONS and not re.fullmatch(r"[\w.]+:[\w.]+", function):
        raise UserError(
            f"reward.function: expected {', '.join(REWARD_FUNCTIONS)} or module:function, got "
            f"{function!r}{hint(function, REWARD_FUNCTIONS)}"
        )


def _check_source(where: str, source: SourceConfig) -> None:
    if bool(source.tasks) == bool(source.path):
        raise UserError(
            f"{where}: expected either tasks or path, got "
            f"{'both' if source.tasks else 'neither'}; keep one of them"
        )
    if source.template is not None:
        _check_template(f"{where}.template", source.template)


def _check_template(key: str, template: str) -> None:
    if "{prompt}" not in template:
        got = repr(template[:80])
        raise UserError(f"{key}: expected a text with {{prompt}} in it, got {got}; add it")


def _check_template_arguments(data: DataConfig) -> None:
    given = data.chat_template_kwargs
    if given and not data.apply_chat_template:
        raise UserError(
            f"data.chat_template_kwargs: expected none with data.apply_chat_template false, got "
            f"{given}; remove it or set data.apply_chat_template=true"
        )
    for name in given:
        if name in NOT_OF_TEMPLATES:
            raise UserError(
                f"data.chat_template_kwargs.{name}: expected variables of the chat template's own, "
                f"such as enable_thinking, got one that is set for it; remove it"
            )


def _check_servers(r: RolloutConfig) -> None:
    if r.engine != "vllm":
        for name, value in (("servers", list(r.servers)), ("vllm_python", r.vllm_python)):
            if value:
                raise UserError(
                    f"rollout.{name}: expected none with rollout.engine {r.engine}, got {value}; "
                    f"remove it or set rollout.engine=vllm"
                )
        if r.weight_transfer != "folder":
            raise UserError(
                f"rollout.weight_transfer: expected folder with rollout.engine {r.engine}, which "
                f"has no servers, got {r.weight_transfer}; remove it or set rollout.engine=vllm"
            )
        return
    if bool(r.servers) == bool(r.vllm_python):
        raise UserError(
            f"rollout.servers: expected either the URLs of running servers, or rollout.vllm_python "
            f"to start some with, got {'both' if r.servers else 'neither'}; set one of them"
        )
    if r.weight_transfer == "nccl" and (r.colocate or r.vllm_python):
        name = "colocate" if r.colocate else "vllm_python"
        raise UserError(
            f"rollout.weight_transfer: expected folder with rollout.{name}, whose servers share "
            f"the trainer's GPUs (NCCL wants one for each process), got nccl; remove one of the two"
        )
    if r.servers and r.min_servers > len(r.servers):
        raise UserError(
            f"rollout.min_servers: expected at most {len(r.servers)}, the number of "
            f"rollout.servers, got {r.min_servers}; lower it, or name more"
        )
    for url in r.servers:
        if not re.fullmatch(r"https?://[\w.-]+(:\d+)?|https?://\[[\da-fA-F:]+\](:\d+)?", url):
            raise UserError(
                f"rollout.servers: expected URLs such as http://node7:8000, got {url!r}; change it"
            )
    if len(set(r.servers)) < len(r.servers):
        twice = next(url for url in r.servers if r.servers.count(url) > 1)
        raise UserError(
            f"rollout.servers: expected each server once, got {twice} twice; remove one"
        )


def _check_algorithm(a: AlgorithmConfig) -> None:
    level = "sequence" if a.loss_type in ("gspo", "vespo") else "token"
    if a.importance_sampling_level not in (None, level):
        reason = {
            "sapo": "SAPO gates each token by its own ratio; sequence ratios are GSPO's",
            "gspo": "GSPO's ratio is the sequence's; token ratios are those of grpo and sapo",
            "vespo": "VESPO weighs a sequence by the product of its ratios",
        }.get(a.loss_type, f"{a.loss_type} uses token ratios")
        raise UserError(
            f"algorithm.importance_sampling_level: expected {level} with loss_type "
            f"{a.loss_type}, got {a.importance_sampling_level} ({reason}); remove it or change "
            f"loss_type"
        )
    if a.loss_type not in CLIP_DEFAULTS:
        weight = "its soft gate, tau_pos and tau_neg," if a.loss_type == "sapo" else "a weight"
        for name in ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"):
            clip = dataclasses.asdict(a)[name]
            if clip is not None:
                raise UserError(
                    f"algorithm.{name}: expected no clip range with loss_type {a.loss_type}, got "
                    f"{clip} ({weight} takes the place of clipping); remove it or change loss_type"
                )
    if a.clip_ratio_c is not None and a.loss_type != "grpo":
        raise UserError(
            f"algorithm.clip_ratio_c: expected none with loss_type {a.loss_type}, got "
            f"{a.clip_ratio_c} (dual clip belongs to grpo); remove it or change loss_type"
        )


def _check_correction(c: CorrectionConfig) -> None:
    if c.icepop_low >= c.icepop_high:
        raise UserError(
            f"correction.icepop_low: expected less than icepop_high {c.icepop_high:g}, got "
            f"{c.icepop_low:g}; change one of them"
        )


def _check_batches(recipe: Recipe) -> None:
    r = recipe.rollout
    sequences = r.rollout_batch_size * r.num_generations
    if sequences % recipe.train.num_mini_batches:
        raise UserError(
            f"train.num_mini_batches: expected a divisor of rollout_batch_size x num_generations "
            f"= {sequences}, got {recipe.train.num_mini_batches}; change one of them"
        )
    cp = recipe.parallel.context_parallel_size
    longest = r.max_prompt_length + r.max_response_length
    room = recipe.train.max_tokens_per_gpu * cp
    if longest > room:
        raise UserError(
            f"train.max_tokens_per_gpu: expected max_tokens_per_gpu x context_parallel_size to "
            f"hold max_prompt_length + max_response_length = {longest}, got {room}; raise it"
        )
    if cp > 1 and recipe.train.max_tokens_per_gpu % 2:
        raise UserError(
            f"train.max_tokens_per_gpu: expected an even number with context_parallel_size {cp} "
            f"(each rank holds two chunks of a sequence), got {recipe.train.max_tokens_per_gpu}; "
            f"add 1"
        )
    if cp > 1 and not recipe.train.packing:
        raise UserError(
            f"train.packing: expected true with context_parallel_size {cp} (context parallelism "
            f"runs on packed sequences), got false; remove it or context_parallel_size"
        )
    if recipe.optimizer.min_lr > recipe.optimizer.lr:
        raise UserError(
            f"optimizer.min_lr: expected at most lr {recipe.optimizer.lr:g}, got "
            f"{recipe.optimizer.min_lr:g}; lower it"
        )


def _check_pipeline(p: ParallelConfig) -> None:
    given = {
        "virtual_pipeline_model_parallel_size": p.virtual_pipeline_model_parallel_size,
        "num_layers_in_first_pipeline_stage": p.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": p.num_layers_in_last_pipeline_stage,
    }
    for name, value in given.items():
        if value is not None and p.pipeline_model_parallel_size == 1:
            raise UserError(
                f"parallel.{name}: expected none with one pipeline stage, got {value}; remove it "
                f"or raise pipeline_model_parallel_size"
            )


def _check_recompute(p: ParallelConfig) -> None:
    granularity = p.recompute_granularity
    only_full = {
        "recompute_method": p.recompute_method,
        "recompute_num_layers": p.recompute_num_layers,
    }
    for name, value in only_full.items():
        if granularity == "full" and value is None:
            raise UserError(
                f"parallel.{name}: missing; recompute_granularity full needs recompute_method "
                f"and recompute_num_layers, e.g. uniform and 1"
            )
        if granularity != "full" and value is not None:
            raise UserError(
                f"parallel.{name}: expected none unless recompute_granularity is full, got "
                f"{value!r}; remove it or change recompute_granularity"
            )
    if p.recompute_modules is None:
        return
    if granularity != "selective":
        raise UserError(
            f"parallel.recompute_modules: expected none unless recompute_granularity is "
            f"selective, got {list(p.recompute_modules)}; remove it or change "
            f"recompute_granularity"
        )
    for module in p.recompute_modules:
        if module not in RECOMPUTE_MODULES:
            raise UserError(
                f"parallel.recompute_modules: expected any of {', '.join(RECOMPUTE_MODULES)}, got "
                f"{module!r}{hint(module, RECOMPUTE_MODULES)}"
            )


def _check_layers(p: ParallelConfig, layers: int) -> None:
    """Megatron's split: the outer stages as given, the others equal, each cut into chunks."""
    pp = p.pipeline_model_parallel_size
    outer = [
        n
        for n in (p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage)
        if n is not None
    ]
    rest, stages = layers - sum(outer), pp - len(outer)
    if rest < stages or (rest % stages if stages else rest):
        split = f" after {' + '.join(map(str, outer))} on the outer stages" if outer else ""
        raise UserError(
            f"parallel.pipeline_model_parallel_size: expected the model's {layers} layers to "
            f"leave an equal number on each of {stages} stages{split}, got {rest} over {stages}; "
            f"change it or set num_layers_in_first_pipeline_stage / _last_"
        )
    chunks = p.virtual_pipeline_model_parallel_size
    for stage in [*outer, *([rest // stages] if stages else [])]:
        if chunks is not None and stage % chunks:
            raise _indivisible(
                "parallel.virtual_pipeline_model_parallel_size",
                chunks,
                f"{stage} layers of a stage",
            )


def _warn(recipe: Recipe) -> None:
    a = recipe.algorithm
    if a.loss_type != "sapo":
        return
    if a.tau_neg < a.tau_pos:
        logger.warning(
            "algorithm.tau_neg %g < algorithm.tau_pos %g: negative advantages then decay slower "
            "than positive ones, which the paper found least stable (arXiv 2511.20347)",
            a.tau_neg,
            a.tau_pos,
        )
    if recipe.train.num_mini_batches == 1 and a.old_policy == "recompute":
        logger.warning(
            "train.num_mini_batches is 1: every ratio is 1 and the SAPO gate cannot act; the "
            "paper uses 4"
        )


def _indivisible(key: str, size: int, of: str) -> UserError:
    return UserError(f"{key}: expected a divisor of the model's {of}, got {size}; change it")
