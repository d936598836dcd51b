"""SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): numbers that a key determines."""

import torch
from torch import Tensor

GOLDEN, _MIX_1, _MIX_2 = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def splitmix64(state: Tensor) -> Tensor:
    """The output of the generator at each ``state``, int64 of any shape, as int64."""
    assert state.dtype == torch.int64
    x = state + GOLDEN
    x = (x ^ shift(x, 30)) * _MIX_1
    x = (x ^ shift(x, 27)) * _MIX_2
    return x ^ shift(x, 31)


def shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
