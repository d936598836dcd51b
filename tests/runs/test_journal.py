"""What a run remembers of its router: moments of the last measurements, pooled exactly."""

import json
import time

import pytest
import torch

from sapo_megatron.metrics import Mean, Metrics, Share, Variance
from sapo_megatron.runs.journal import WINDOW, Journal
from sapo_megatron.runs.state import RunState


def state(journal):
    return RunState(
        step=1,
        start="weights",
        model={},
        cursor={},
        eval={"avg@8": 0.25},
        moments=json.loads(json.dumps(journal.moments())),
        wall_s=100.0,
        layout={},
        world_size=1,
    )


def measured(a, b):
    """A step's metrics that split z = a + b."""
    metrics = Metrics()
    metrics.add("variance/total", Variance.of(a + b))
    metrics.add("variance/router_share", Share.of(a, b))
    metrics.add("routing/slot_flip", Mean.of(b > 0))
    return metrics.to_host()


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(3)
    steps = WINDOW + 3
    return [
        torch.randn(2, 5 + step, dtype=torch.float64, generator=generator) for step in range(steps)
    ]


def test_measurements_are_pooled_over_the_window(parts):
    journal = Journal(None, began=time.monotonic())
    assert journal.router() == {}
    for a, b in parts:
        metrics = measured(a, b)
        journal.note(metrics)
    a, b = torch.cat(parts[-WINDOW:], dim=1)
    whole = measured(a, b).values()
    assert journal.router() == pytest.approx(whole)
    assert (
        metrics.values()["variance/router_share_pooled"]
        == journal.router()["variance/router_share"]
    )
    assert journal.router() != pytest.approx(measured(*parts[-1]).values())


def test_a_step_without_a_measurement_leaves_the_window_as_it_is(parts):
    journal = Journal(None, began=time.monotonic())
    journal.note(measured(*parts[0]))
    before = journal.router()
    constant = torch.ones(4, dtype=torch.float64)
    for metrics in (Metrics(), measured(constant, 0 * constant)):  # the other's share is not known
        metrics = metrics.to_host()
        journal.note(metrics)
    assert journal.router()["variance/router_share"] == before["variance/router_share"]


def test_a_resumed_run_goes_on_with_the_window(parts):
    straight, first = (Journal(None, began=time.monotonic()) for _ in range(2))
    for a, b in parts:
        straight.note(measured(a, b))
    for a, b in parts[:4]:
        first.note(measured(a, b))
    resumed = Journal(state(first), began=time.monotonic())
    for a, b in parts[4:]:
        resumed.note(measured(a, b))
    assert resumed.router() == straight.router()
    assert resumed.before == {"avg@8": 0.25}


def test_time_before_a_resume_counts():
    journal = Journal(state(Journal(None, began=0.0)), began=time.monotonic() - 5)
    assert 105 <= journal.wall_s < 165
