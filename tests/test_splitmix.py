"""SplitMix64 against the values that its authors' generator gives."""

import torch

from sapo_megatron.splitmix import GOLDEN, splitmix64


def test_published_values():
    """Of the seed 1234567, as unsigned numbers."""
    states = 1234567 + GOLDEN * torch.arange(5)
    assert [number % (1 << 64) for number in splitmix64(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_no_two_states_share_a_number():
    states = torch.cat([torch.arange(-5000, 5000), torch.arange(5000) << 40])
    assert len(splitmix64(states).unique()) == len(states.unique())
