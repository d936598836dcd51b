"""What the CPU has in the place of a compiler."""

import functools

import pytest

from sapo_megatron.policy.cpu import _as_it_is as compiled


def double(x):
    return 2 * x


@pytest.mark.parametrize(
    "made",
    [
        compiled(double),
        compiled(model=double),
        compiled(double, dynamic=True, backend="inductor"),
        compiled(dynamic=True)(double),
        compiled()(double),
        functools.partial(compiled, fullgraph=True)(double),
    ],
)
def test_a_compiled_function_is_the_function(made):
    """However torch.compile is called: its argument has that name."""
    assert made is double
