"""One vLLM server over HTTP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import httpx

from sapo_megatron.errors import RunFailed, UserError, one_line, with_type
from sapo_megatron.hf.architecture import Architecture
from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.rollout.vllm.answers import (
    SLEEP_FLAG,
    Awake,
    Completion,
    Description,
    Descriptions,
    Loads,
    Reset,
    Scores,
    Version,
    read,
    to_logprobs,
    to_sample,
)
from sapo_megatron.sample import Sample

EXTENSION = "sapo_megatron.rollout.vllm.worker.Worker"
RELEASE = "0.32"
"""Of vLLM, in whose workers the extension changes weights and log-probs: in those of another it
might change nothing, without a word."""

_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said in every request, so that no server adds its own."""


class Away(Exception):
    """A server cannot be reached or is in trouble; another try, there or elsewhere, may help."""


class _Trouble(Away):
    """HTTP 5xx."""


class Server:
    """The calls; all raise ``Away``, and RunFailed or UserError where another try is no use."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self._http = http

    async def describe(self) -> Description:
        """What the server serves. Raises UserError for anything but vLLM's ``RELEASE``."""
        try:
            found = read(Version, await self._call("GET", "/version"), self.url).version
        except RunFailed as error:
            found = f"none ({one_line(str(error), 90)})"
        if not found.startswith(f"{RELEASE}."):
            raise UserError(
                f"{self.url}: expected a server of vLLM {RELEASE}, the release in "
                f"requirements-gpu.txt and requirements-vllm.txt, got {found}; name another URL, "
                f"or serve with that release"
            )
        content = await self._rpc("sapo_describe")
        return read(Descriptions, content, self.url).results[0]

    async def load(self, folder: Path, label: str) -> None:
        """Put the weights of a Hugging Face folder into the running server.

        Raises RunFailed also where its machine has no such folder.
        """
        content = await self._rpc("sapo_load", str(folder), label)
        if not all(load.found for load in read(Loads, content, self.url).results):
            raise RunFailed(
                f"{self.url}: expected the weights in {folder}, got no such folder on that "
                f"machine; write them to a file system that it shares"
            )

    async def label(self, label: str) -> None:
        """Name the weights that it gets another way than by ``load``."""
        await self._rpc("sapo_label", label)

    async def forget_prefixes(self) -> bool:
        """Drop the cached keys and values; False while requests hold some of them."""
        content = await self._call("POST", "/reset_prefix_cache")
        return read(Reset, content, self.url).success

    async def sleep(self) -> None:
        """Drop the weights and free their memory, and that of keys and values.

        Raises RunFailed where that is not certain, so also for a server that is away.
        """
        try:
            await self._call("POST", "/sleep?level=2")
        except (Away, _Refused) as error:
            reason = f"HTTP {error.status}" if isinstance(error, _Refused) else str(error)
            raise RunFailed(
                f"{self.url}: /sleep: expected it to leave its memory to training, got {reason}; "
                f"look at its log; it needs VLLM_SERVER_DEV_MODE=1 and {SLEEP_FLAG}"
            ) from None

    async def wake_up(self, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory for weights, or for keys and values, again, with nothing in it.

        Nothing for a server that is awake. Raises RunFailed where it cannot.
        """
        try:
            content = await self._call("POST", f"/wake_up?tags={what}")
        except _Trouble as error:
            raise RunFailed(
                f"{self.url}: /wake_up: expected it to take its memory again, got {error}; look at "
                f"its log, and start it with a smaller --gpu-memory-utilization"
            ) from None
        read(Awake, content, self.url)

    async def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of ``tokens[1:]``, each after those before it, at temperature 1."""
        body = {
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "return_tokens_as_token_ids": True,
            **_NEUTRAL,
        }
        content = await self._call("POST", "/v1/completions", body)
        return to_logprobs(read(Scores, content, self.url), self.url, tuple(tokens))

    async def complete(
        self,
        request: Request,
        params: SamplingParams,
        seed: int,
        arch: Architecture,
        *,
        begun: Sample | None,
        version: int,
        with_routes: bool,
    ) -> tuple[Sample, bool]:
        """A response to ``request``, and whether it is whole: :meth:`abort` leaves its beginning.

        ``begun``: the beginning to go on from; ``version``: of the server's weights.
        """
        drawn = begun.response_tokens if begun else []
        body = {
            "prompt": [*request.prompt_tokens, *drawn],
            "max_tokens": params.max_new_tokens - len(drawn),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": True,  # and generation_config.json's; what counts is in stop_token_ids
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # do without a tokenizer
            **_NEUTRAL,
        }
        answer = read(Completion, await self._call("POST", "/v1/completions", body), self.url)
        sample = to_sample(
            answer,
            self.url,
            request,
            params,
            arch,
            begun=begun,
            version=version,
            with_routes=with_routes,
        )
        return sample, not answer.aborted

    async def abort(self) -> None:
        """Have the responses that the server is in the middle of end where they are."""
        await self._call("POST", "/abort_requests", {})

    async def check_abort(self) -> None:
        """Raises UserError for a server that does not know how to :meth:`abort`."""
        try:
            await self._call("POST", "/abort_requests", {"request_ids": ["none"]})
        except _Refused as error:
            raise UserError(
                f"{self.url}: /abort_requests: expected a server whose responses can be "
                f"interrupted, as rollout.on_new_weights continue needs, got HTTP {error.status}; "
                f"start vLLM 0.32 with VLLM_SERVER_DEV_MODE=1, or set on_new_weights wait"
            ) from None

    async def _rpc(self, method: str, *args: str) -> bytes:
        """Call a method of our extension on the server's workers.

        Raises UserError where the server was started without it.
        """
        try:
            return await self._call("POST", "/collective_rpc", {"method": method, "args": args})
        except _Refused as error:
            if error.status != 404:
                raise
            raise UserError(
                f"{self.url}: expected the endpoint /collective_rpc, got a server without it; "
                f"start it with VLLM_SERVER_DEV_MODE=1 in its environment"
            ) from None
        except Away as error:
            if f"has no attribute '{method}'" in str(error):
                raise UserError(
                    f"{self.url}: expected a server with our worker extension, got one without; "
                    f"start it with --worker-extension-cls {EXTENSION} and the folder that holds "
                    f"sapo_megatron on its PYTHONPATH"
                ) from None
            if "collective_rpc method failed" in str(error):
                raise RunFailed(
                    f"{self.url}: {method}: {error}; look at its log, and restart it"
                ) from None
            raise

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            response = await self._http.request(method, self.url + path, json=body)
        except httpx.TransportError as error:
            raise Away(with_type(error)) from None
        if response.status_code >= 500:
            raise _Trouble(f"HTTP {response.status_code}: {_message(response)}")
        if response.status_code >= 300:
            raise _Refused(self.url, path, response)
        return response.content


class _Refused(RunFailed):
    """The server understands the request and does not take it."""

    def __init__(self, url: str, path: str, response: httpx.Response) -> None:
        self.status = response.status_code
        super().__init__(
            f"{url}: {path}: expected an answer, got HTTP {self.status}: {_message(response)}; is "
            f"this a vLLM server, of the release in requirements-vllm.txt?"
        )


def _message(response: httpx.Response) -> str:
    """What the server says about an error, in one line."""
    try:
        text = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return one_line(text, 300)
