"""SAPO in Megatron-LM's own GRPO.

The checks of ``megatron_checks.py`` run on a double with the host's exact signatures, and with
``SAPO_MEGATRON_LM`` naming a checkout (and what it imports installed) on the host itself.
"""

import os

import pytest

from tests.hosts.megatron_checks import CHECKS, run_checks
from tests.support.gloo import run_ranks
from tests.support.tiny import ROOT

CHECKOUT = os.environ.get("SAPO_MEGATRON_LM")


@pytest.fixture(scope="module", params=["double", "checkout"])
def found(request):
    real = request.param == "checkout"
    if real and not CHECKOUT:
        pytest.skip("SAPO_MEGATRON_LM names no checkout of Megatron-LM")
    with pytest.MonkeyPatch.context() as patch:
        if real:
            # Which ranks take over; behind our own, since the checkout has a package ``tests``.
            patch.syspath_prepend(CHECKOUT)
            patch.syspath_prepend(ROOT)
        return run_ranks(2, run_checks, real, fresh=real)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_megatron_rl(found, name):
    for rank, results in enumerate(found):
        assert results[name] is None, f"rank {rank}: {results[name]}"
