"""A Hugging Face ``config.json`` in one vocabulary, whatever its family calls things.

What a family can express and this package does not compute is refused here, before anything is
built; so is every other family, by ``hf/kinds.py``.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sapo_megatron.errors import UserError, one_line
from sapo_megatron.files import read_text
from sapo_megatron.hf.config import Config
from sapo_megatron.hf.fp8 import check_quantization
from sapo_megatron.hf.kinds import not_ours, text_model


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Attention whose query heads share key and value heads (arXiv 2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool
    joint_norm: bool = False
    """Whether that norm is one over all heads (MiniMax-M2), and not one of each."""
    output_gate: bool = False
    """Whether queries come with a gate that what was attended to passes (Qwen3-Next)."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    num_heads: int
    q_lora_rank: int | None
    """None: queries are projected in one step."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet:
    """Linear attention that stands in place of attention in most layers (arXiv 2412.06464)."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_size: int
    """Positions that the convolution over query, key and value sees."""
    layers: tuple[int, ...]
    """Numbers, from 0, of the layers that have it."""

    @property
    def state_size(self) -> int:
        """Numbers, in fp32, that a layer keeps of a sequence, however long it is."""
        return self.num_value_heads * self.key_head_dim * self.value_head_dim

    def kept(self, layers: Iterable[int], dtype: int) -> int:
        """Bytes that those of ``layers`` keep of a sequence: states, and windows in ``dtype``."""
        window = (self.conv_size - 1) * self.mixed_size * dtype
        return len(set(layers) & set(self.layers)) * (4 * self.state_size + window)

    @property
    def mixed_size(self) -> int:
        """Numbers of a token's query, key and value, which the convolution sees."""
        keys = self.num_key_heads * self.key_head_dim
        return 2 * keys + self.num_value_heads * self.value_head_dim


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Long-context rotary scaling (arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (arXiv 2104.09864)."""

    theta: float
    fraction: float = 1.0
    """Share of a head's dimensions that are rotated."""
    yarn: Yarn | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a layer that has them, and its router."""

    number: int
    topk: int
    hidden_size: int
    """Inner width of one routed expert."""
    layers: tuple[int, ...]
    """Numbers, from 0, of the layers with experts."""
    score_function: Literal["softmax", "sigmoid"]
    normalised: bool
    """Whether the scores of the chosen experts are made to add up to 1."""
    scaling_factor: float = 1.0
    bias: bool = False
    """A bias per expert that only chooses (DeepSeek-V3's e_score_correction_bias)."""
    groups: int = 1
    group_topk: int = 1
    shared_hidden_size: int = 0
    """Inner width of the experts that every token passes; 0: none."""
    shared_gate: bool = False
    """Whether a gate says how much of those a token takes."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model is made of: the sizes and choices that ``config.json`` gives."""

    config: dict[str, Any] = field(repr=False)
    """The ``config.json`` itself, as it is of a model that is not quantised."""
    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of a layer without experts."""
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tied_embeddings: bool
    attention: GroupedQueryAttention | LatentAttention
    rope: Rope
    experts: Experts | None
    delta_net: GatedDeltaNet | None = None
    zero_centered_norm: bool = False
    """Whether norms multiply by 1 + weight; never those inside :class:`GatedDeltaNet`."""

    def attends(self, layers: Iterable[int]) -> int:
        """How many of ``layers`` have attention."""
        return len(set(layers) - set(self.delta_net.layers if self.delta_net else ()))


def count_parameters(arch: Architecture) -> int:
    """How many the model has, about: its matrices alone."""
    h, a, e = arch.hidden_size, arch.attention, arch.experts
    if isinstance(a, GroupedQueryAttention):
        mixer = h * a.head_dim * ((2 + a.output_gate) * a.num_heads + 2 * a.num_kv_heads)
    else:
        keys, query = a.qk_nope_head_dim, a.qk_nope_head_dim + a.qk_rope_head_dim
        mixer = h * (a.q_lora_rank or 0) + (a.q_lora_rank or h) * a.num_heads * query
        mixer += h * (a.kv_lora_rank + a.qk_rope_head_dim + a.num_heads * a.v_head_dim)
        mixer += a.kv_lora_rank * a.num_heads * (keys + a.v_head_dim)
    sparse = len(e.layers) if e else 0
    blocks = (arch.num_layers - sparse) * 3 * h * arch.ffn_hidden_size
    if e:
        blocks += sparse * h * (e.number * (3 * e.hidden_size + 1) + 3 * e.shared_hidden_size)
    embeddings = (1 if arch.tied_embeddings else 2) * arch.vocab_size * h
    mixers = arch.attends(range(arch.num_layers)) * mixer
    if d := arch.delta_net:
        values = d.num_value_heads * d.value_head_dim
        projected = d.mixed_size + 2 * values + 2 * d.num_value_heads
        mixers += len(d.layers) * (h * projected + d.conv_size * d.mixed_size)
    return mixers + blocks + embeddings


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a model folder. Raises UserError, naming file and key."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(
            f"model.path: expected a folder with config.json, got {folder}; change it"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.path: cannot read {path}: {one_line(error, 200)}") from None
    return parse_architecture(config, path)


def parse_architecture(config: Any, path: str | Path = "config.json") -> Architecture:
    """What ``config`` says; ``path`` is the file that messages name. Raises UserError."""
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(config).__name__}")
    outer = Config(config, path, "any")
    config = text_model(config)
    kind = config.get("model_type")
    if not (isinstance(kind, str) and kind in _FAMILIES):
        raise not_ours(kind, path)
    c = Config(config, path, kind)
    check_quantization(c.given("quantization_config", dict), path)
    c.only("hidden_act", "silu")
    hybrid = kind in _HYBRID
    if not hybrid:
        c.only("layer_types", "full_attention", listed=True)
    read_attention, read_experts = _FAMILIES[kind]
    attention = read_attention(c)
    arch = Architecture(
        config={key: value for key, value in config.items() if key != "quantization_config"},
        model_type=kind,
        num_layers=c.whole("num_hidden_layers"),
        hidden_size=c.whole("hidden_size"),
        ffn_hidden_size=c.whole(_INNER.get(kind, "intermediate_size")),
        vocab_size=c.whole("vocab_size"),
        max_position_embeddings=c.whole("max_position_embeddings"),
        norm_eps=c.number("rms_norm_eps", most=0.1),
        tied_embeddings=c.flag("tie_word_embeddings", default=False),
        attention=attention,
        rope=_rope(c, latent=isinstance(attention, LatentAttention)),
        experts=read_experts(c) if read_experts else None,
        delta_net=_delta_net(c) if hybrid else None,
        zero_centered_norm=hybrid,
    )
    e = arch.experts
    width = arch.ffn_hidden_size + (e.number * e.hidden_size if e else 0)
    most = arch.hidden_size * (3 * arch.num_layers * width + arch.vocab_size)
    c.must(most < 1e14, "hidden_size", "a model of fewer than 1e14 weights")
    c.check_types()
    outer.check_types()
    return arch


def _grouped_query(
    c: Config, *, qkv_bias: bool, qk_norm: bool, joint_norm: bool = False
) -> GroupedQueryAttention:
    heads = c.whole("num_attention_heads")
    derived = "head_dim" not in c.values
    width = c.whole("hidden_size") // heads if derived else c.whole("head_dim")
    c.must(width % 2 == 0 and width > 0, "head_dim", "an even number (of rotary pairs)")
    kv_heads = c.whole("num_key_value_heads")
    c.must(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of the {heads} heads")
    return GroupedQueryAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        joint_norm=joint_norm,
    )


def _qwen3_attention(c: Config) -> GroupedQueryAttention:
    c.only("attention_bias", False)  # it would put one on the output projection as well
    c.only("use_sliding_window", False)
    return _grouped_query(c, qkv_bias=False, qk_norm=True)


def _gated_attention(c: Config) -> GroupedQueryAttention:
    c.only("attn_output_gate", True)
    return dataclasses.replace(_qwen3_attention(c), output_gate=True)


def _delta_net(c: Config) -> GatedDeltaNet:
    layers, kinds = range(c.whole("num_hidden_layers")), c.given("layer_types", list)
    if not kinds:
        interval = c.whole("full_attention_interval")
        kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in layers]
    known = all(kind in ("full_attention", "linear_attention") for kind in kinds)
    what = f"linear_attention or full_attention for each of the {len(layers)} layers"
    c.must(known and len(kinds) == len(layers), "layer_types", what)
    keys, values = c.whole("linear_num_key_heads"), c.whole("linear_num_value_heads")
    c.must(values % keys == 0, "linear_num_value_heads", f"a multiple of the {keys} key heads")
    return GatedDeltaNet(
        num_key_heads=keys,
        num_value_heads=values,
        key_head_dim=c.whole("linear_key_head_dim"),
        value_head_dim=c.whole("linear_value_head_dim"),
        conv_size=c.whole("linear_conv_kernel_dim", least=2),
        layers=tuple(i for i in layers if kinds[i] == "linear_attention"),
    )


def _glm4_attention(c: Config) -> GroupedQueryAttention:
    bias, norm = c.flag("attention_bias", default=False), c.flag("use_qk_norm", default=False)
    return _grouped_query(c, qkv_bias=bias, qk_norm=norm)


def _minimax_attention(c: Config) -> GroupedQueryAttention:
    c.only("attention_bias", False)
    c.only("attn_type_list", 1, listed=True)  # 0: linear attention
    c.only("use_qk_norm", True)
    c.only("qk_norm_type", "per_layer")
    return _grouped_query(c, qkv_bias=False, qk_norm=True, joint_norm=True)


def _latent_attention(c: Config) -> LatentAttention:
    c.only("attention_bias", False)
    c.only("rope_interleave", True)
    c.only("index_topk", None)  # sparse attention (DeepSeek-V3.2)
    c.must(c.whole("qk_rope_head_dim") % 2 == 0, "qk_rope_head_dim", "an even number")
    return LatentAttention(
        num_heads=c.whole("num_attention_heads"),
        q_lora_rank=None if c.values.get("q_lora_rank") is None else c.whole("q_lora_rank"),
        kv_lora_rank=c.whole("kv_lora_rank"),
        qk_nope_head_dim=c.whole("qk_nope_head_dim"),
        qk_rope_head_dim=c.whole("qk_rope_head_dim"),
        v_head_dim=c.whole("v_head_dim"),
    )


def _topk(c: Config, experts: int) -> int:
    topk = c.whole("num_experts_per_tok")
    if topk > experts:
        raise UserError(
            f"{c.path}: num_experts_per_tok: expected at most the number of experts {experts}, got "
            f"{topk}; correct it"
        )
    return topk


def _qwen3_experts(c: Config) -> Experts:
    dense, step = c.given("mlp_only_layers", list), c.whole("decoder_sparse_step")
    layers = range(c.whole("num_hidden_layers"))
    number = c.whole("num_experts", "num_local_experts")
    known = all(type(i) is int and i in layers for i in dense)
    c.must(known, "mlp_only_layers", f"numbers of layers, from 0 to {layers[-1]}")
    return Experts(
        number=number,
        topk=_topk(c, number),
        hidden_size=c.whole("moe_intermediate_size"),
        layers=tuple(i for i in layers if i not in dense and (i + 1) % step == 0),
        score_function="softmax",
        normalised=c.flag("norm_topk_prob"),
    )


def _gated_experts(c: Config) -> Experts:
    if c.kind == "qwen3_5_moe_text":  # which leaves no choice
        c.only("norm_topk_prob", True)
        c = Config({**c.values, "decoder_sparse_step": 1, "norm_topk_prob": True}, c.path, c.kind)
    return dataclasses.replace(
        _qwen3_experts(c),
        shared_hidden_size=c.whole("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _deepseek_experts(c: Config) -> Experts:
    c.only("scoring_func", "sigmoid")
    c.only("topk_method", "noaux_tc")
    c.only("moe_layer_freq", 1)
    c.only("norm_topk_prob", True)
    hidden = c.whole("moe_intermediate_size")
    number = c.whole("n_routed_experts", "num_local_experts")
    groups, group_topk = c.whole("n_group"), c.whole("topk_group")
    c.must(number % groups == 0, "n_group", f"a divisor of the {number} experts")
    c.must(group_topk <= groups, "topk_group", f"at most the {groups} groups")
    return Experts(
        number=number,
        topk=_topk(c, number),
        hidden_size=hidden,
        layers=c.sparse_layers(),
        score_function="sigmoid",
        normalised=True,
        scaling_factor=c.number("routed_scaling_factor"),
        bias=True,
        groups=groups,
        group_topk=group_topk,
        shared_hidden_size=hidden * c.whole("n_shared_experts", least=0),
    )


def _minimax_experts(c: Config) -> Experts:
    c.only("scoring_func", "sigmoid")
    c.only("use_routing_bias", True)
    c.only("shared_intermediate_size", 0)
    c.only("router_jitter_noise", 0.0)
    number = c.whole("num_local_experts", "num_experts")
    return Experts(
        number=number,
        topk=_topk(c, number),
        hidden_size=c.whole("intermediate_size"),
        layers=tuple(range(c.whole("num_hidden_layers"))),
        score_function="sigmoid",
        normalised=True,
        bias=True,
    )


_FAMILIES: dict[str, tuple[Callable[[Config], Any], Callable[[Config], Any] | None]] = {
    "qwen3": (_qwen3_attention, None),
    "qwen3_moe": (_qwen3_attention, _qwen3_experts),
    "deepseek_v3": (_latent_attention, _deepseek_experts),
    "kimi_k2": (_latent_attention, _deepseek_experts),
    "glm4_moe": (_glm4_attention, _deepseek_experts),
    "glm4_moe_lite": (_latent_attention, _deepseek_experts),
    "minimax_m2": (_minimax_attention, _minimax_experts),
    "qwen3_next": (_gated_attention, _gated_experts),
    "qwen3_5_moe_text": (_gated_attention, _gated_experts),
}
"""``model_type`` -> what reads its attention and its experts."""
_HYBRID = ("qwen3_next", "qwen3_5_moe_text")
_INNER = {"qwen3_5_moe_text": "moe_intermediate_size"}  # of layers without experts, which has none


def _rope(c: Config, *, latent: bool) -> Rope:
    r = c.rope()
    kind = r.values.get("rope_type", "default")
    yarn = None
    if kind == "yarn" and latent:
        r.only("attention_factor", None)
        r.only("truncate", True)
        r.values.update({"beta_fast": 32, "beta_slow": 1, **r.values})
        yarn = Yarn(
            factor=r.number("factor"),
            original_max_position_embeddings=r.whole("original_max_position_embeddings"),
            beta_fast=r.number("beta_fast"),
            beta_slow=r.number("beta_slow"),
            mscale=r.number("mscale"),
            mscale_all_dim=r.number("mscale_all_dim"),
        )
    elif kind != "default":
        raise UserError(
            f"{c.path}: rope_scaling: expected none for {c.kind}, got {kind}, which is not "
            f"supported; remove it"
        )
    if c.kind not in ("glm4_moe", "minimax_m2", *_HYBRID):
        r.only("partial_rotary_factor", 1.0)
    if c.kind != "glm4_moe":  # which has no default
        r.values.setdefault("partial_rotary_factor", 0.25 if c.kind in _HYBRID else 1.0)
    fraction = r.number("partial_rotary_factor")
    if fraction > 1:
        raise UserError(
            f"{c.path}: partial_rotary_factor: expected a share of a head up to 1 (rotary_dim up "
            f"to head_dim), got {fraction:g}; correct it"
        )
    return Rope(theta=r.number("rope_theta"), fraction=fraction, yarn=yarn)
