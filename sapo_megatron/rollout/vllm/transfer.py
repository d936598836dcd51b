"""Weights to vLLM servers over NCCL, with the sending side that vLLM has for it.

This process and all workers of all servers are one process group. vLLM's sender tells the servers
over HTTP what comes, and broadcasts tensor after tensor meanwhile. It has not been run on GPUs.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
from torch import Tensor

from sapo_megatron.errors import RunFailed, UserError, one_line, with_type
from sapo_megatron.hf.folder import Listed


class Transfer:
    """Sends a model's tensors to all servers; on the first rank, which makes one once."""

    def __init__(self, urls: Sequence[str], listing: list[Listed], *, timeout_s: float) -> None:
        """Join this process and the servers' workers, at once, in a process group.

        ``listing``: what every ``send`` will bring. Raises UserError without vLLM, and RunFailed
        where a server does not take part.
        """
        info, trainer_init = _vllm()
        self._source = _Source(listing)
        self._client = _Client(urls, timeout_s, self._abort)
        address = _own_address(urls[0])
        init_info = info(
            master_address=address,
            master_port=_free_port(address),
            world_size=1 + sum(self._client.world_sizes),
            rank=0,
        )
        with self._failing():
            self._sender = trainer_init(init_info, client=self._client, source=self._source)

    def send(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Put the tensors into all servers. Raises RunFailed; no other ``send`` may follow then."""
        self._source.tensors = tensors
        with self._failing():
            self._sender.send_weights()

    def _abort(self) -> None:
        """Let this process out of a broadcast that a server does not take part in."""
        self._sender.shutdown()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What NCCL and torch raise in vLLM's sender becomes RunFailed, of a server if it has one.

        The sender goes on for a while without the server that has failed.
        """
        try:
            yield
        except RunFailed:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            if self._client.problem:
                raise self._client.problem from error
            raise RunFailed(
                f"rollout.weight_transfer: expected vLLM to send the weights over NCCL, got "
                f"{with_type(error)}; restart all servers, and resume the run"
            ) from error


class _Source:
    """vLLM's ``WeightSource``, as far as its NCCL sender reads it."""

    def __init__(self, listing: list[Listed]) -> None:
        self._listing = listing
        self.tensors: Iterator[tuple[str, Tensor]] = iter([])

    def metadata(self) -> list[Listed]:
        return self._listing

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.tensors


class _Client:
    """vLLM's ``VLLMWeightSyncClient`` for several servers at once."""

    def __init__(self, urls: Sequence[str], timeout_s: float, abort: Callable[[], None]) -> None:
        self._urls = tuple(urls)
        self._http = httpx.Client(timeout=timeout_s, trust_env=False)
        self._abort = abort
        self.problem: RunFailed | None = None
        """Why a server does not take what is sent."""
        self.world_sizes = [
            self._call("GET", url, "get_world_size").json()["world_size"] for url in self._urls
        ]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first, bodies = init_info["rank_offset"], []
        for size in self.world_sizes:
            bodies.append({"init_info": init_info | {"rank_offset": first}})
            first += size
        self._post("init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        try:
            self._post("update_weights", [{"update_info": update_info}] * len(self._urls))
        except RunFailed as error:
            self.problem = error
            self._abort()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update")

    def _post(self, path: str, bodies: Sequence[dict[str, Any] | None] = ()) -> None:
        """Ask all servers at once: none may have to wait for another. Raises the first error."""
        bodies = bodies or [None] * len(self._urls)
        executor = ThreadPoolExecutor(len(self._urls))
        calls = [
            executor.submit(self._call, "POST", url, path, body)
            for url, body in zip(self._urls, bodies, strict=True)
        ]
        executor.shutdown(wait=False)
        for call in as_completed(calls):
            call.result()

    def _call(self, method: str, url: str, path: str, body: Any = None) -> httpx.Response:
        try:
            response = self._http.request(method, f"{url}/{path}", json=body)
        except httpx.TransportError as error:
            raise RunFailed(_told(url, path, with_type(error))) from None
        if response.status_code != 200:
            text = f"HTTP {response.status_code}: {one_line(response.text, 300)}"
            raise RunFailed(_told(url, path, text))
        return response


def _told(url: str, path: str, problem: str) -> str:
    return (
        f"{url}: /{path}: expected it to take weights over NCCL, got {problem}; look at its log, "
        f"restart all servers, and resume the run"
    )


def _vllm() -> tuple[Any, Any]:
    """The arguments of vLLM's sender, and what makes it. Raises UserError without vLLM."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise UserError(
            f"rollout.weight_transfer: expected vLLM beside Megatron, which nccl sends with, got "
            f"none ({error}); install it there, or set rollout.weight_transfer=folder"
        ) from None
    return NCCLTrainerInitInfo, WeightTransferTrainerFactory.trainer_init


def _own_address(url: str) -> str:
    """The address of this machine, as the server at ``url`` sees it."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80)) as connection:
        return connection.getsockname()[0]


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        return free.getsockname()[1]
