"""What `plan` knows of GPUs."""

from dataclasses import dataclass

from sapo_megatron.recipe.schema import GpuName


@dataclass(frozen=True, kw_only=True)
class Gpu:
    memory_gib: float
    """What the driver reports as total (``nvidia-smi``, MiB / 1024)."""
    host_memory_gib: float
    """Of a node with eight. Assumed: about the least of NVIDIA's DGX and the large clouds."""
    tflops: float
    """Peak of dense bf16 matrix products, 1e12 FLOP/s, from NVIDIA's data sheet."""


GPUS: dict[GpuName, Gpu] = {
    "a100-80gb": Gpu(memory_gib=81920 / 1024, host_memory_gib=1152, tflops=312),
    "h100-80gb": Gpu(memory_gib=81559 / 1024, host_memory_gib=1740, tflops=989),
    "h20-96gb": Gpu(memory_gib=97871 / 1024, host_memory_gib=1740, tflops=148),
    "h200-141gb": Gpu(memory_gib=143771 / 1024, host_memory_gib=1850, tflops=989),
    "b200-180gb": Gpu(memory_gib=183359 / 1024, host_memory_gib=2000, tflops=2250),
}
"""SXM boards, eight to a node as NVIDIA's HGX systems have them."""
