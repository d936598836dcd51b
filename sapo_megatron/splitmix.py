"""SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): random bits as a function of a number."""

from torch import Tensor

GOLDEN, _FIRST, _SECOND = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""The generator's step from one state to the next; the factors of its output."""


def splitmix64(state: Tensor) -> Tensor:
    """64 random bits for each ``state``, int64 of any shape: the generator's output there.

    Its sequence from a seed is the output at seed, seed + GOLDEN, seed + 2 GOLDEN, and so on. Sums
    and products wrap around.
    """
    bits = state + GOLDEN
    bits = (bits ^ shift_right(bits, 30)) * _FIRST
    bits = (bits ^ shift_right(bits, 27)) * _SECOND
    return bits ^ shift_right(bits, 31)


def shift_right(bits: Tensor, by: int) -> Tensor:
    """int64 shifted as if it had no sign: zeros come in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
