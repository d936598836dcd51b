"""The values of a ``config.json``, by any name that a generation of transformers gives them.

transformers 5 calls some keys otherwise than 4 and what is on the hub: ``rope_parameters`` holds
what were ``rope_theta``, ``partial_rotary_factor`` (or ``rotary_dim``) and ``rope_scaling``,
``num_local_experts`` is ``num_experts``, ``mlp_layer_types`` lists what ``first_k_dense_replace``
counts, ``dtype`` is ``torch_dtype``. Either name is read, and both are written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sapo_megatron.errors import UserError

Given = TypeVar("Given", dict[str, Any], list[Any])

_ROPE = ("rope_theta", "partial_rotary_factor")
"""Keys of ``rope_parameters`` that stood outside before."""
MULTI_TOKEN = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers")
"""Keys that say how many layers there are for multi-token prediction."""
MOST_PARTS, LARGEST = 2**16, 2**24
"""The most layers, heads and experts, and the largest other size, that are taken for meant."""
_COUNTS = ("num_", "n_", "first_k_", "topk_", "linear_num_")
_TYPES: dict[type, str] = {
    int: "bos_token_id decoder_sparse_step ep_size first_k_dense_replace full_attention_interval "
    "head_dim image_token_id kv_lora_rank linear_conv_kernel_dim linear_key_head_dim "
    "linear_num_key_heads linear_num_value_heads linear_value_head_dim max_window_layers "
    "moe_intermediate_size moe_layer_freq mtp_num_hidden_layers mtp_transformer_layers "
    "n_group n_routed_experts n_shared_experts num_experts num_experts_per_tok "
    "num_key_value_heads num_local_experts num_mtp_modules num_nextn_predict_layers "
    "pad_token_id pretraining_tp q_lora_rank qk_nope_head_dim qk_rope_head_dim rotary_dim "
    "shared_expert_intermediate_size shared_intermediate_size sliding_window topk_group "
    "v_head_dim video_token_id vision_end_token_id vision_start_token_id",
    float: "attention_dropout aux_loss_alpha initializer_range partial_rotary_factor "
    "routed_scaling_factor router_aux_loss_coef router_jitter_noise",
    bool: "attention_bias attn_output_gate mtp_use_dedicated_embeddings norm_topk_prob "
    "output_router_logits qkv_bias seq_aux use_cache use_mtp use_qk_norm use_routing_bias "
    "use_sliding_window",
    str: "dtype hidden_act model_type qk_norm_type scoring_func topk_method torch_dtype "
    "transformers_version",
    list: "architectures attn_type_list layer_types mlp_layer_types mlp_only_layers",
    dict: "auto_map text_config vision_config",
}
"""Of keys that some family reads, or that only others do, the types."""


def _any(value: Any) -> bool:
    return True


def _small(value: int) -> bool:
    return -1 <= value <= LARGEST


def _share(value: float) -> bool:
    return 0 <= value <= 1000


class Config:
    """Typed look-ups in a ``config.json``. Each raises UserError, naming file and key.

    A look-up of several names takes the one that is there; where more than one is, they must agree.
    """

    def __init__(self, values: dict[str, Any], path: str | Path, kind: str) -> None:
        """``path`` is the file that messages name, ``kind`` the family."""
        self.values, self.path, self.kind = values, path, kind

    def whole(self, *names: str, least: int = 1) -> int:
        most = MOST_PARTS if names[0].startswith(_COUNTS) else LARGEST
        what = f"a whole number >= {least} and <= {most}"
        return self._get(names, int, what, lambda x: least <= x <= most)

    def number(self, *names: str, most: float = 1e12) -> float:
        what = f"a finite number > 0 and <= {most:g}"
        return float(self._get(names, (int, float), what, lambda x: 1e-30 < x <= most))

    def must(self, holds: bool, name: str, expected: str) -> None:
        """Raises UserError unless ``holds``."""
        if not holds:
            got = json.dumps(self.values.get(name))
            raise UserError(f"{self.path}: {name}: expected {expected}, got {got}; correct it")

    def check_types(self) -> None:
        """Raises UserError for a value of another type, also in a key that is only exported."""
        for kind, names in _TYPES.items():
            for name in filter(lambda name: self.values.get(name) is not None, names.split()):
                if kind is int:
                    self._get((name,), int, f"a whole number >= -1 and <= {LARGEST}", _small)
                elif kind is float:
                    self._get((name,), (int, float), "a number >= 0 and <= 1000", _share)
                else:
                    self._get((name,), kind, f"{kind.__name__.replace('dict', 'object')}", _any)
        ends = self.values.get("eos_token_id")
        tokens = ends if isinstance(ends, list) else [ends]
        whole = all(token is None or type(token) is int for token in tokens)
        self.must(whole, "eos_token_id", "a whole number, or a list of them")

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        if default is not None and self.values.get(name) is None:
            return default
        return self._get((name,), bool, "true or false", _any)

    def given(self, name: str, kind: type[Given]) -> Given:
        """An object or a list; an empty one where it is left out."""
        if self.values.get(name) is None:
            return kind()
        return self._get((name,), kind, "an object" if kind is dict else "a list", _any)

    def only(self, name: str, value: Any, *, listed: bool = False) -> None:
        """Raises UserError for any other value of a key, which may be left out.

        Where it is ``listed``: for a list that has another element.
        """
        got = self.values.get(name)
        given = got if listed and isinstance(got, list) else [] if got is None else [got]
        same_kind = isinstance(value, bool)
        others = [x for x in given if x != value or isinstance(x, bool) is not same_kind]
        if others:
            raise UserError(
                f"{self.path}: {name}: expected {json.dumps(value)} for {self.kind}, got "
                f"{json.dumps(others[0])}, which is not supported; use another model"
            )

    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers, from 0, of the layers with experts: behind the first few, or as listed."""
        count, kinds = self.whole("num_hidden_layers"), self.given("mlp_layer_types", list)
        if not kinds:
            return tuple(range(self.whole("first_k_dense_replace", least=0), count))
        if len(kinds) != count or any(kind not in ("dense", "sparse") for kind in kinds):
            raise UserError(
                f"{self.path}: mlp_layer_types: expected dense or sparse for each of {count} "
                f"layers, got {json.dumps(kinds)}; correct it"
            )
        layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")
        if self.values.get("first_k_dense_replace") is not None:
            first = self.whole("first_k_dense_replace", least=0)
            if layers != tuple(range(first, count)):
                raise self._contradiction("first_k_dense_replace", first, "mlp_layer_types", kinds)
        return layers

    def rope(self) -> "Config":
        """What is said of rotary positions, wherever it stands."""
        values = {name: self.values[name] for name in _ROPE if self.values.get(name) is not None}
        if self.values.get("rotary_dim") is not None:
            share = self.whole("rotary_dim") / self.whole("head_dim")
            if values.setdefault("partial_rotary_factor", share) != share:
                given = values["partial_rotary_factor"]
                raise self._contradiction(
                    "partial_rotary_factor", given, "rotary_dim / head_dim", share
                )
        for section in ("rope_scaling", "rope_parameters"):
            inside = self.given(section, dict)
            if "type" in inside:  # what rope_type was called
                inside = {"rope_type": inside["type"], **inside}
            for name, value in inside.items():
                if value is not None and values.setdefault(name, value) != value:
                    raise self._contradiction(name, values[name], f"{section}.{name}", value)
        return Config(values, self.path, self.kind)

    def _get(
        self, names: tuple[str, ...], kind: Any, what: str, holds: Callable[[Any], bool]
    ) -> Any:
        found = [name for name in names if self.values.get(name) is not None]
        if not found:
            raise UserError(f"{self.path}: {names[0]}: missing; a {self.kind} model needs it")
        for name in found:
            value = self.values[name]
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not (right and holds(value)):
                raise UserError(f"{self.path}: {name}: expected {what}, got {value!r}; correct it")
            if value != self.values[found[0]]:
                raise self._contradiction(found[0], self.values[found[0]], name, value)
        return self.values[found[0]]

    def _contradiction(self, name: str, value: Any, other: str, got: Any) -> UserError:
        return UserError(
            f"{self.path}: {other}: expected {value!r} as {name} says, got {got!r}; two names of "
            f"one thing: correct one"
        )


def in_both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with both names of what transformers 5 calls otherwise than 4."""
    both = dict(config)
    c = Config(config, "config.json", str(config.get("model_type")))
    for old, new in (("num_experts", "num_local_experts"), ("torch_dtype", "dtype")):
        for name, other in ((old, new), (new, old)):
            if name in both:
                both.setdefault(other, both[name])
    if c.kind == "glm4_moe_lite":  # the one family with either name for its layers
        layers, count = c.sparse_layers(), c.whole("num_hidden_layers")
        both["mlp_layer_types"] = ["sparse" if i in layers else "dense" for i in range(count)]
        if layers == tuple(range(count - len(layers), count)):
            both["first_k_dense_replace"] = count - len(layers)
    rope = c.rope().values
    if rope:
        outside = {name: rope[name] for name in _ROPE if name in rope}
        scaling = {name: value for name, value in rope.items() if name not in _ROPE}
        kind = scaling.setdefault("rope_type", "default")
        both |= outside
        both["rope_scaling"] = None if kind == "default" else scaling
        both["rope_parameters"] = {**scaling, **outside}
        if c.kind == "minimax_m2" and "partial_rotary_factor" in rope:
            both["rotary_dim"] = round(rope["partial_rotary_factor"] * c.whole("head_dim"))
    return both


def tokenizer_for_both(settings: dict[str, Any]) -> dict[str, Any]:
    """A ``tokenizer_config.json`` that transformers 4 reads as well as 5."""
    both = dict(settings)
    if both.get("tokenizer_class") == "TokenizersBackend":  # what 5 calls that of the other name
        both["tokenizer_class"] = "PreTrainedTokenizerFast"
        both.setdefault("clean_up_tokenization_spaces", False)  # otherwise 4 cleans up, 5 does not
    if isinstance(both.get("extra_special_tokens"), list):
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    return both
