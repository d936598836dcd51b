"""SplitMix64 against values that its authors' generator gives."""

import torch

from sapo_megatron.splitmix import GOLDEN, shift_right, splitmix64


def test_published_values():
    """The first outputs from the seed 1234567, as unsigned numbers."""
    found = splitmix64(1234567 + GOLDEN * torch.arange(5))
    assert [value % 2**64 for value in found.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_zeros_come_in_from_the_left():
    assert shift_right(torch.tensor([-1, -2, 8]), 1).tolist() == [2**63 - 1, 2**63 - 1, 4]
