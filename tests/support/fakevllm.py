"""A server that speaks as vLLM does and can be made to misbehave; it has no model."""

import contextlib
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sapo_megatron.rollout.engine import Request, SamplingParams
from sapo_megatron.sample import Sample

EOS = 1
DESCRIPTION = {
    "model_type": "qwen3_moe",
    "num_layers": 2,
    "hidden_size": 32,
    "vocab_size": 104,
    "max_model_len": 22,
    "generation_config": "vllm",
    "quantized": False,
    "routed_experts": False,
    "sleep_mode": False,
    "weight_transfer": None,
    "on_cpu": True,
    "chunked_prefill": False,
}
TRANSFER = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
)
Answer = tuple[int, Any]
"""Status, and bytes or what becomes JSON."""
HANG_UP: Answer = (0, b"")
"""Close the connection without a word."""


class FakeVllm:
    """``with FakeVllm() as server: server.url``; set ``fault`` to answer otherwise.

    ``fault(path, body, own)`` returns what to answer, where ``own()`` is the regular answer.
    """

    def __init__(self, port: int = 0) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.description: dict[str, Any] = dict(DESCRIPTION)
        self.release = "0.32.0"
        self.weights = "initial"
        self.asleep: set[str] = set()
        self.folders: list[str] = []
        self.fault: Callable[[str, dict[str, Any], Callable[[], Answer]], Answer] | None = None
        self._open: set[Any] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> "FakeVllm":
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Be gone: no listener, and connections that break off."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # the other side has closed it
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def prompts(self) -> list[tuple[int, ...]]:
        """Those of the completions that were asked for."""
        return [tuple(body["prompt"]) for path, body in self.calls if "seed" in body]

    def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        self.calls.append((path, body))
        if self.fault:
            return self.fault(path, body, lambda: self._own(path, body))
        return self._own(path, body)

    def _own(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/health":
            return 200, b""
        if path == "/version":
            return 200, {"version": self.release}
        if path == "/sleep?level=2":
            self.asleep = {"weights", "kv_cache"}
            return 200, {"status": "sleeping", "level": 2}
        if path.startswith("/wake_up?tags="):
            tag = path.split("=")[1]
            self.asleep -= {tag}
            return 200, {"status": "sleeping" if self.asleep else "awake", "tags": [tag]}
        loads = "weights" not in self.asleep and body.get("method") == "sapo_load"
        if self.asleep and not loads and body.get("method") != "sapo_describe":
            return 500, b"asleep"
        if path == "/abort_requests":
            return 200, {"status": "aborted", "aborted": 0}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/collective_rpc" and body["method"] == "sapo_describe":
            return 200, {"results": [{"weights": self.weights, **self.description}]}
        if path == "/get_world_size":
            return 200, {"world_size": 2}
        if path in TRANSFER:
            return 200, {"message": "as asked"}
        if path == "/collective_rpc" and body["method"] == "sapo_label":
            (self.weights,) = body["args"]
            return 200, {"results": [None]}
        if path == "/collective_rpc":
            folder, self.weights = body["args"]
            self.folders.append(folder)
            return 200, {"results": [{"found": True}]}
        if "prompt_logprobs" in body:
            entries = [None, *({str(t): {"logprob": logprob(t)}} for t in body["prompt"][1:])]
            return 200, {"choices": [{"prompt_logprobs": entries}]}
        return 200, completion(response(body))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake._open.add(self.connection)

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                text = self.rfile.read(length)
                if len(text) < length:  # whoever asked has given up in the middle
                    self.close_connection = True
                    return
                status, content = fake._answer(self.path, json.loads(text or b"{}"))
                if status == 0:
                    self.close_connection = True
                    return
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                """Nothing: tests read what the client says."""

        return Handler


def logprob(token: int) -> float:
    return -0.5 - token / 100


def response(body: dict[str, Any]) -> list[int]:
    """Tokens that are a function of the request, as a seeded engine's are."""
    mark = zlib.crc32(json.dumps([body["prompt"], body["seed"]]).encode())
    length = 1 + mark % body["max_tokens"]
    tokens = [2 + (mark >> i) % 100 for i in range(length)]
    return tokens if length == body["max_tokens"] else [*tokens[:-1], EOS]


def completion(tokens: list[int], **changes: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "text": "",
        "token_ids": tokens,
        "logprobs": {"token_logprobs": [logprob(t) for t in tokens]},
        "finish_reason": "stop" if tokens[-1:] == [EOS] else "length",
        "routed_experts": None,
    }
    return {"object": "text_completion", "choices": [{**choice, **changes}]}


def after(seconds: float) -> Callable[[str, dict[str, Any], Callable[[], Answer]], Answer]:
    """A fault: to answer completions, but slowly."""

    def fault(path: str, body: dict[str, Any], own: Callable[[], Answer]) -> Answer:
        if "seed" in body:
            time.sleep(seconds)
        return own()

    return fault


class Held:
    """A fault: completions wait until they are let go, or aborted behind two tokens."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self._end = threading.Event()
        self._aborted = False
        self._status = 200
        self.partial = completion([7, 8], finish_reason="abort")

    def __call__(self, path: str, body: dict[str, Any], own: Callable[[], Answer]) -> Answer:
        if path == "/abort_requests" and not body.get("request_ids"):
            self._aborted = not self._end.is_set()
            self._end.set()
        if "seed" not in body or self._end.is_set():
            return own()
        self.begun.release()
        assert self._end.wait(60)
        return (self._status, self.partial) if self._aborted or self._status > 200 else own()

    def let_go(self, status: int = 200) -> None:
        self._status = status
        self._end.set()


def behind(
    other: FakeVllm,
) -> Callable[[str, dict[str, Any], Callable[[], Answer]], Answer]:
    """A fault: to answer completions only once another server has been asked for some."""

    def fault(path: str, body: dict[str, Any], own: Callable[[], Answer]) -> Answer:
        last = time.monotonic() + 60.0
        while "seed" in body and not other.prompts() and time.monotonic() < last:
            time.sleep(0.01)
        return own()

    return fault


def sampled(engine: Any, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
    """What an engine samples, in the order of the requests."""
    found: list[Sample] = []
    engine.begin(requests, params, found.append).result(timeout=200)
    by_uid = {s.uid: s for s in found}
    assert len(by_uid) == len(found) == len(requests)
    return [by_uid[r.uid] for r in requests]
