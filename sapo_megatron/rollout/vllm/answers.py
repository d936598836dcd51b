"""What servers answer: read, checked field by field, turned into samples.

Every error says the server, the field, what was expected and what came.
"""

import base64
import binascii
import io
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from sapo_megatron.errors import RunFailed, UserError, first_problem, one_line
from sapo_megatron.hf.architecture import Architecture, Experts
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.sample import Sample, SampleRoutes

ROUTES_FLAG = "--enable-return-routed-experts"
SLEEP_FLAG = "--enable-sleep-mode"
WHOLE_FLAG = "--no-enable-chunked-prefill"
PLAIN_FLAG = ("--hf-overrides", '{"quantization_config": null}')
"""Has a server take weights that are not quantised, which those of a training are, also where
the model's folder has fp8."""
TRANSFER_FLAG = '--weight-transfer-config \'{"backend": "nccl"}\''

MINUS_INFINITY = -9999.0
"""What vLLM writes for it, which no token that was drawn can have."""
LogProb = Annotated[float, Field(gt=MINUS_INFINITY, le=0.0, allow_inf_nan=False)]


class Unusable(Exception):
    """A response that may be drawn again: its log-probs are missing, or no numbers."""


class Version(BaseModel):
    """``/version``: the release of vLLM."""

    version: str


class Description(BaseModel):
    """What a server serves: ``Worker.sapo_describe``."""

    weights: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    generation_config: str
    quantized: bool
    """Whether its weights are to come in fp8 or the like."""
    routed_experts: bool
    sleep_mode: bool
    weight_transfer: str | None
    on_cpu: bool
    chunked_prefill: bool
    """Whether a prompt may be taken in pieces."""


class Loaded(BaseModel):
    """``Worker.sapo_load``."""

    found: bool


class Descriptions(BaseModel):
    """One for each worker of a server."""

    results: Annotated[list[Description], Field(min_length=1)]


class Loads(BaseModel):
    results: Annotated[list[Loaded], Field(min_length=1)]


class Reset(BaseModel):
    """``/reset_prefix_cache``."""

    success: bool


class Awake(BaseModel):
    """``/wake_up``."""

    status: Literal["awake", "sleeping"]
    """Whether all of its memory is there again."""


class _LogProbs(BaseModel):
    token_logprobs: list[float | None]


class _Response(BaseModel):
    token_ids: list[int]
    logprobs: _LogProbs | None = None
    finish_reason: Literal["stop", "length", "abort"]
    routed_experts: str | None = None


class Completion(BaseModel):
    """``/v1/completions`` with ``return_token_ids`` and ``logprobs``."""

    choices: Annotated[list[_Response], Field(min_length=1, max_length=1)]

    @property
    def aborted(self) -> bool:
        """Whether the server has given up on the request, as it does when it is stopped."""
        return self.choices[0].finish_reason == "abort"


class _Entry(BaseModel):
    logprob: LogProb


class _Scored(BaseModel):
    prompt_logprobs: list[dict[int, _Entry] | None]


class Scores(BaseModel):
    """``/v1/completions`` with ``prompt_logprobs``."""

    choices: Annotated[list[_Scored], Field(min_length=1, max_length=1)]


Answer = TypeVar("Answer", bound=BaseModel)


def read(kind: type[Answer], content: bytes, url: str) -> Answer:
    """The JSON object ``content`` as ``kind``. Raises RunFailed, naming server and field."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _wrong(url, first_problem(error)) from None


def check_description(
    got: Description,
    url: str,
    arch: Architecture,
    *,
    longest: int,
    with_routes: bool,
    sleeps: bool,
    over_nccl: bool,
) -> None:
    """Refuse a server that does not serve this model and ``longest`` tokens as we need it.

    Raises UserError, naming server and setting.
    """
    for name in ("model_type", "num_layers", "hidden_size", "vocab_size"):
        if (served := getattr(got, name)) != (value := getattr(arch, name)):
            raise UserError(
                f"{url}: {name}: expected {value}, as model.path has it, got {served}; start "
                f"the server with the model that is trained"
            )
    refused = (
        (
            got.max_model_len < longest,
            f"max_model_len: expected at least rollout.max_prompt_length + max_response_length = "
            f"{longest}, got {got.max_model_len}; start the server with --max-model-len {longest}",
        ),
        (
            got.generation_config != "vllm",
            f"generation_config: expected vllm (others bring the model's own stop tokens), got "
            f"{got.generation_config}; start the server with --generation-config vllm",
        ),
        (
            got.on_cpu and got.chunked_prefill,
            f"enable_chunked_prefill: expected false on a CPU, where vLLM 0.32 dies of a seeded "
            f"prompt that is taken in pieces, got true; start the server with {WHOLE_FLAG}",
        ),
        (
            got.quantized,
            f"quantization_config: expected none, as weights come in the dtype that they are "
            f"trained in, got one; start the server with --load-format dummy {PLAIN_FLAG[0]} "
            f"'{PLAIN_FLAG[1]}'",
        ),
        (
            with_routes and not got.routed_experts,
            f"routed_experts: expected a server that returns them, as routing.router_replay R3 "
            f"needs and the others do, got one that does not; start it with {ROUTES_FLAG}",
        ),
        (
            sleeps and not got.sleep_mode,
            f"sleep_mode: expected a server that can sleep, which rollout.colocate needs, got one "
            f"that keeps its memory; start it with {SLEEP_FLAG}",
        ),
        (
            over_nccl and got.weight_transfer != "nccl",
            f"weight_transfer: expected nccl, as rollout.weight_transfer has it, got "
            f"{got.weight_transfer or 'none'}; start the server with {TRANSFER_FLAG}",
        ),
    )
    if message := next((message for wrong, message in refused if wrong), None):
        raise UserError(f"{url}: {message}")


def to_sample(
    answer: Completion,
    url: str,
    request: Request,
    params: SamplingParams,
    arch: Architecture,
    *,
    begun: Sample | None = None,
    version: int = 0,
    with_routes: bool = False,
) -> Sample:
    """The response to ``request``, or its beginning where the answer is ``aborted``.

    ``begun``: what came before, which the answer goes on from; ``version``: of the weights behind
    the answer. Raises Unusable for log-probs that are none, RunFailed for what else is wrong, or
    UserError where routes are missing.
    """
    (choice,) = answer.choices
    new = choice.token_ids
    logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
    if not new and not answer.aborted:
        raise _wrong(url, "token_ids: expected at least one token, got none")
    if len(logprobs) != len(new):
        raise Unusable(
            f"token_logprobs: expected one of each of {len(new)} tokens, got {len(logprobs)}"
        )
    usable = [x for x in logprobs if x is not None and MINUS_INFINITY < x <= 0]
    if len(usable) < len(new):
        wrong = next(x for x in logprobs if x not in usable)
        raise Unusable(f"token_logprobs: expected numbers of at most 0, got {wrong}")
    tokens = [*(begun.response_tokens if begun else ()), *new]
    truncated = not answer.aborted and _check_tokens(tokens, url, params, arch)
    routes = None
    if with_routes and not answer.aborted:
        fed = len(request.prompt_tokens) + len(tokens) - 1
        routes = read_routes(choice.routed_experts, url, fed, arch)
    return Sample(
        uid=request.uid,
        prompt_tokens=request.prompt_tokens,
        response_tokens=tokens,
        rollout_logprobs=[*(begun.rollout_logprobs if begun else ()), *usable],
        versions=[*(begun.versions if begun else ()), *[version] * len(new)],
        truncated=truncated,
        routes=routes,
    )


def _check_tokens(tokens: list[int], url: str, params: SamplingParams, arch: Architecture) -> bool:
    """Whether a response is truncated. Raises RunFailed for one that ``params`` do not allow."""
    for token in tokens:
        if not 0 <= token < arch.vocab_size:
            raise _wrong(
                url, f"token_ids: expected ids from 0 to {arch.vocab_size - 1}, got {token}"
            )
    stops = list(params.stop_ids)
    truncated = tokens[-1] not in stops
    if any(token in stops for token in tokens[:-1]):
        raise _wrong(url, f"token_ids: expected no token after one of {stops}, got {tokens}")
    if len(tokens) > params.max_new_tokens or (truncated and len(tokens) < params.max_new_tokens):
        expected = f"expected one of {stops} or {params.max_new_tokens} tokens"
        raise _wrong(url, f"token_ids: {expected}, got {len(tokens)} that end with {tokens[-1]}")
    return truncated


def read_routes(text: str | None, url: str, fed: int, arch: Architecture) -> SampleRoutes:
    """The experts of the ``fed`` tokens: ``.npy`` bytes in base64, ``[fed, layers, k]``.

    vLLM counts all layers of the model; those without experts hold nothing of use. Raises
    UserError where there is nothing, and RunFailed for anything else than such an array.
    """
    if text is None:
        raise UserError(
            f"{url}: routed_experts: expected the experts of {fed} tokens, which the server says "
            f"it returns, got none; start the server with {ROUTES_FLAG}"
        )
    assert arch.experts is not None
    experts = _array(text, url)
    shape = (fed, arch.num_layers, arch.experts.topk)
    if experts.shape != shape or experts.dtype.kind not in "ui":
        got = f"{experts.dtype} {list(experts.shape)}"
        raise _wrong(url, f"routed_experts: expected whole numbers {list(shape)}, got {got}")
    experts = experts[:, list(arch.experts.layers)]
    _check_range(experts, url, arch.experts)
    return SampleRoutes(experts=experts.astype(np.int16))


def _array(text: str, url: str) -> npt.NDArray[np.generic]:
    try:
        array = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise _wrong(
            url,
            f"routed_experts: expected an .npy array in base64, got {one_line(text, 80)} ({error})",
        ) from None
    if not isinstance(array, np.ndarray):
        raise _wrong(url, "routed_experts: expected one .npy array in base64, got an archive")
    return array


def _check_range(experts: npt.NDArray[np.generic], url: str, layer: Experts) -> None:
    low, high = int(experts.min()), int(experts.max())
    if low < 0 or high >= layer.number:
        raise _wrong(
            url, f"routed_experts: expected experts 0 to {layer.number - 1}, got {low} to {high}"
        )


def to_logprobs(answer: Scores, url: str, tokens: tuple[int, ...]) -> list[float]:
    """The log-probs of ``tokens[1:]`` as a prompt, at temperature 1. Raises RunFailed."""
    entries = answer.choices[0].prompt_logprobs
    if len(entries) != len(tokens):
        raise _wrong(
            url,
            f"prompt_logprobs: expected one of each of {len(tokens)} tokens, got {len(entries)}",
        )
    found = []
    for token, entry in zip(tokens[1:], entries[1:], strict=True):
        if entry is None or token not in entry:
            raise _wrong(url, f"prompt_logprobs: expected that of token {token}, got {entry}")
        found.append(entry[token].logprob)
    return found


def _wrong(url: str, problem: str) -> RunFailed:
    return RunFailed(f"{url}: {problem}; is this a vLLM server that works?")
