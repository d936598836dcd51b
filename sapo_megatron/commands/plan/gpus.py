"""What `plan` knows of GPUs and of the machines around them."""

from dataclasses import dataclass

from sapo_megatron.policy.flops import PEAK_TFLOPS
from sapo_megatron.recipe.schema import GpuName

GIB = 2**30
RESERVE = 4 * GIB
"""CUDA context, NCCL's buffers, workspaces, fragmentation of a process. Assumed, not measured."""
BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What data sheets say, in bytes/s one direction where not said (docs/plan-arithmetic.md)."""

    memory_gib: float
    """What the driver reports as total (``nvidia-smi``, MiB / 1024)."""
    host_memory_gib: float
    """Of a node with eight. Assumed: about the least of NVIDIA's DGX and the large clouds."""
    tflops: float
    """Peak of dense bf16 matrix products, 1e12 FLOP/s."""
    memory: float
    nvlink: float
    network: float
    """To other nodes: one network card a GPU."""
    pcie: float
    host: float
    """Of the host memory of a node with eight."""


def _gpu(tflops: float, mib: float, *rest: float) -> Gpu:
    names = ("host_memory_gib", "memory", "nvlink", "network", "pcie", "host")
    return Gpu(memory_gib=mib / 1024, tflops=tflops, **dict(zip(names, rest, strict=True)))


_SHEETS: dict[GpuName, tuple[float, ...]] = {
    "a100-80gb": (81920, 1152, 2.04e12, 300e9, 25e9, 32e9, 410e9),
    "h100-80gb": (81559, 1740, 3.35e12, 450e9, 50e9, 64e9, 614e9),
    "h20-96gb": (97871, 1740, 4.0e12, 450e9, 50e9, 64e9, 614e9),
    "h200-141gb": (143771, 1850, 4.8e12, 450e9, 50e9, 64e9, 614e9),
    "b200-180gb": (183359, 2000, 8.0e12, 900e9, 50e9, 64e9, 717e9),
}
GPUS = {name: _gpu(PEAK_TFLOPS[name], *sheet) for name, sheet in _SHEETS.items()}
"""SXM boards, eight to a node as NVIDIA's HGX systems have them."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What data sheets do not say, for no model alone; sources: docs/plan-arithmetic.md."""

    matrix: float = 0.39
    """Share of the peak that matrix products and attention reach."""
    bandwidth: float = 0.75
    """Share of a memory's or a link's bandwidth that is reached."""
    launch: float = 2.5e-3
    """Seconds in which a process launches a layer's forward pass, kernel by kernel."""
    graph: float = 130e-6
    """Seconds of a layer in a decode step of a server, which replays CUDA graphs, beyond what it
    reads, computes and sends: small kernels and the gaps between them."""
    hop: float = 60e-6
    """Seconds that each further node adds to a small all-reduce."""
    tensor: float = 0.75e-3
    """Seconds to gather one tensor of the model and to load it into a server."""
    files: float = 4e9
    """Bytes/s with which a node writes to and reads from a shared file system."""


CONSTANTS = Constants()
