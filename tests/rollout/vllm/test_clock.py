import pytest

from sapo_megatron.metrics import now
from sapo_megatron.rollout.vllm.clock import Clock


def test_what_goes_on_at_once_is_one_time_also_where_it_fails():
    clock, began = Clock(), now()
    with clock.running():
        with pytest.raises(ValueError, match="x"), clock.running():
            raise ValueError("x")
        with clock.running():
            pass
    ((begin, seconds),) = clock.take()
    assert began <= begin <= begin + seconds <= now()
    ((_, idle),) = clock.take()
    assert idle == 0
