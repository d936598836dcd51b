"""What `plan` knows of GPUs and of the machines around them."""

from dataclasses import dataclass

from sapo_megatron.recipe.schema import GpuName


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Figures of data sheets (docs/plan.md); of a node, of one with eight GPUs."""

    memory_gib: float
    """What the driver reports as total (``nvidia-smi``, MiB / 1024)."""
    host_memory_gib: float
    """Of a node. Assumed: about the least of NVIDIA's DGX and the large clouds."""
    tflops: float
    """Peak of dense bf16 matrix products, 1e12 FLOP/s."""
    memory: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s to the other GPUs of a node, in one direction, as all that follow."""
    network: float
    """Bytes/s to other nodes: one network card a GPU."""
    pcie: float
    """Bytes/s to the host."""
    host: float
    """Bytes/s of a node's host memory."""


_HOPPER = {"tflops": 989.0, "nvlink": 450e9, "network": 50e9, "pcie": 64e9, "host": 614e9}

GPUS: dict[GpuName, Gpu] = {
    "a100-80gb": Gpu(
        **{"memory_gib": 81920 / 1024, "host_memory_gib": 1152, "tflops": 312, "memory": 2.04e12},
        **{"nvlink": 300e9, "network": 25e9, "pcie": 32e9, "host": 410e9},
    ),
    "h100-80gb": Gpu(**_HOPPER, memory_gib=81559 / 1024, host_memory_gib=1740, memory=3.35e12),
    "h20-96gb": Gpu(
        **{**_HOPPER, "tflops": 148}, memory_gib=97871 / 1024, host_memory_gib=1740, memory=4.0e12
    ),
    "h200-141gb": Gpu(**_HOPPER, memory_gib=143771 / 1024, host_memory_gib=1850, memory=4.8e12),
    "b200-180gb": Gpu(
        **{"memory_gib": 183359 / 1024, "host_memory_gib": 2000, "tflops": 2250, "memory": 8.0e12},
        **{"nvlink": 900e9, "network": 50e9, "pcie": 64e9, "host": 717e9},
    ),
}
"""SXM boards, eight to a node as NVIDIA's HGX systems have them."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What data sheets do not say: each with its source in docs/plan.md, none for one model."""

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
