"""In-process generation with the training model and its KV cache.

Sampling is a pure function of (seed, sample uid, position): the same run samples the same tokens
however it is laid out, and resuming needs no generator state.

Shape legend: B sequences generated at once, V vocabulary, L longest sequence.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from sapo_megatron.metrics import Metrics
from sapo_megatron.rollout.engine import Arrived, Request, SamplingParams
from sapo_megatron.sample import DecodedRoutes, Sample
from sapo_megatron.splitmix import shift, splitmix64


class Decoder(Protocol):
    """The model as generation needs it; each call is collective over the ranks that share it."""

    device: torch.device

    def generating(self, *, record: bool = False) -> AbstractContextManager[Any]:
        """The model made ready for a rollout; ``record``: with the routes of what it is fed."""

    def start(self, batch_size: int, max_length: int) -> None:
        """Begin a batch with an empty KV cache."""

    def logits(self, tokens: Tensor) -> Tensor | None:
        """Feed ``tokens [B, s]`` -> logits ``[B, V]`` after the last; None where they are not."""

    def agree(self, tokens: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens and log-probs ``[B]`` of the rank that has logits, on every rank."""

    def any(self, flag: bool) -> bool:
        """Whether any rank that must stay in step says True."""

    def routes(self) -> DecodedRoutes | None:
        """The routes of what was fed since ``start``; None where they are not recorded."""


class InProcess:
    """The training model as the engine of rollouts: its weights are always the policy's."""

    background = False
    by_prompt = False

    def __init__(self, decoder: Decoder, *, batch_size: int) -> None:
        """``batch_size``: sequences that one rank generates at once."""
        self._decoder = decoder
        self._batch_size = batch_size
        self._version = 0

    @contextmanager
    def serving(self, *, version: int, record: bool) -> Iterator[Metrics]:
        self._version = version
        with self._decoder.generating(record=record):
            yield Metrics()

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        arrived: Arrived,
        *,
        first: bool = False,
    ) -> Future[Metrics]:
        metrics = Metrics()
        with metrics.timed("time/rollout"):
            for sample in generate(self._decoder, requests, params, batch_size=self._batch_size):
                sample.versions = [self._version] * len(sample.response_tokens)
                arrived(sample)
        done: Future[Metrics] = Future()
        done.set_result(metrics)
        return done

    def spent(self, name: str) -> Metrics:
        return Metrics()


def generate(
    decoder: Decoder, requests: Sequence[Request], params: SamplingParams, *, batch_size: int
) -> list[Sample]:
    """A response to every request, in their order.

    Ranks that stay in step must call with the same number of requests and the same
    ``batch_size``. Responses end with a stop token or at ``max_new_tokens`` (then
    ``truncated``).
    """
    by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_tokens))
    samples: dict[int, Sample] = {}
    for start in range(0, len(requests), batch_size):
        rows = by_length[start : start + batch_size]
        batch = [requests[i] for i in rows]
        samples.update(zip(rows, _generate_batch(decoder, batch, params), strict=True))
    return [samples[i] for i in range(len(requests))]


@torch.no_grad()
def _generate_batch(
    decoder: Decoder, requests: Sequence[Request], params: SamplingParams
) -> list[Sample]:
    """Prompts of unequal length run in one batch: all are prefilled to the shortest, and where a
    prompt goes on its own next token is fed instead of the sampled one.
    """
    device = decoder.device
    prompt_lengths = [len(r.prompt_tokens) for r in requests]
    shortest, longest = min(prompt_lengths), max(prompt_lengths)
    tokens = torch.full((len(requests), longest + params.max_new_tokens), params.stop_ids[0])
    for row, request in enumerate(requests):
        tokens[row, : len(request.prompt_tokens)] = torch.tensor(request.prompt_tokens)
    tokens = tokens.to(device)
    logprobs = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
    begin = torch.tensor(prompt_lengths, device=device)
    end = begin + params.max_new_tokens
    stops = torch.tensor(params.stop_ids, device=device)
    uids = torch.tensor([r.uid for r in requests], device=device)

    decoder.start(len(requests), tokens.shape[1])
    done = torch.zeros(len(requests), dtype=torch.bool, device=device)
    fed = tokens[:, :shortest]
    position = shortest
    # In step with the ranks that share experts: all go on until the last of them is done.
    while decoder.any(not bool(done.all())):
        logits = decoder.logits(fed)
        column = min(position, tokens.shape[1] - 1)
        if logits is None:
            token, logprob = tokens[:, column], logprobs[:, column]
        else:
            noise = uniform(params.seed, uids, position - begin)
            token, logprob = sample(logits, noise, params.temperature, params.top_p)
        token, logprob = decoder.agree(token, logprob)
        writes = (position >= begin) & (position < end) & ~done
        tokens[:, column] = torch.where(writes, token, tokens[:, column])
        logprobs[:, column] = torch.where(writes, logprob, logprobs[:, column])
        done |= writes & (torch.isin(token, stops) | (position + 1 >= end))
        fed = tokens[:, column : column + 1]
        position += 1
    return _to_samples(requests, tokens.cpu(), logprobs.cpu(), params, decoder.routes())


def _to_samples(
    requests: Sequence[Request],
    tokens: Tensor,
    logprobs: Tensor,
    params: SamplingParams,
    routes: DecodedRoutes | None,
) -> list[Sample]:
    samples = []
    for row, request in enumerate(requests):
        begin = len(request.prompt_tokens)
        response = tokens[row, begin : begin + params.max_new_tokens].tolist()
        length = next((n for n, t in enumerate(response, 1) if t in params.stop_ids), None)
        response = response[:length]
        samples.append(
            Sample(
                uid=request.uid,
                prompt_tokens=request.prompt_tokens,
                response_tokens=response,
                rollout_logprobs=logprobs[row, begin : begin + len(response)].tolist(),
                truncated=length is None,
                routes=routes.of(row, begin + len(response) - 1) if routes else None,
            )
        )
    return samples


def sample(
    logits: Tensor, noise: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw from ``logits [B, V]`` with ``noise [B]`` in [0, 1) by inverting the cumulative sum.

    Returns token ids ``[B]`` and their fp64 log-probs ``[B]`` with ``temperature`` applied and
    ``top_p`` not (at temperature 0, the most likely token and its log-prob at temperature 1).
    """
    logprobs = torch.log_softmax(logits.double() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logprobs.argmax(dim=-1)
    else:
        probs = logprobs.exp()
        if top_p < 1:
            probs = nucleus(probs, top_p)
        cumulative = probs.cumsum(dim=-1)
        threshold = noise.double()[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        # Logits that are not a number lead beyond the end; the update will find and report them.
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """``probs [B, V]`` with zeros outside the smallest set of tokens that holds ``top_p``."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probs).scatter(-1, order, ordered.where(before < top_p, 0.0))


def uniform(seed: int, uids: Tensor, positions: Tensor) -> Tensor:
    """fp64 noise in [0, 1) for each (uid, position), both int64 ``[B]``, by SplitMix64."""
    state = splitmix64(torch.full_like(uids, seed))
    bits = splitmix64(splitmix64(state ^ uids) ^ positions)
    return shift(bits, 11).double() * 2.0**-53
