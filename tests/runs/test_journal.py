"""What a run remembers of its router: moments of the last measurements, pooled exactly."""

import json
import math
import time

import pytest
import torch

from sapo_megatron.metrics import Mean, Metrics, Variance
from sapo_megatron.routing.variance import Swaps
from sapo_megatron.runs.journal import LONGEST, SPLITS, WINDOW, Journal
from sapo_megatron.runs.state import RunState


def state(journal):
    return RunState(
        step=1,
        start="weights",
        model={},
        recipe={},
        data="",
        cursor={},
        eval={"avg@8": 0.25},
        moments=json.loads(json.dumps(journal.moments())),
        wall_s=100.0,
        world_size=1,
        updates=4,
    )


def measured(a, b, split="variance"):
    """A step's metrics that split z = a + b; every token, a sequence of its own, is a swap."""
    metrics = Metrics()
    metrics.add(f"{split}/total", Variance.of(a + b))
    metrics.add(f"{split}/swaps", swaps(a, b))
    metrics.add("routing/slot_flip", Mean.of(b > 0))
    return metrics.to_host()


def swaps(a, b):
    ones = torch.ones(len(a), dtype=torch.int64)
    sequences = {"sequence_ids": torch.arange(len(a)), "num_sequences": len(a)}
    return Swaps.of(a + b, a, ones > 0, layers_flipped=ones, **sequences)


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(3)
    sizes = range(60, 60 + WINDOW + 3)
    return [torch.randn(2, size, dtype=torch.float64, generator=generator) for size in sizes]


@pytest.mark.parametrize("split", SPLITS)
def test_measurements_are_pooled_over_the_window(parts, split):
    journal = Journal(None, began=time.monotonic())
    assert journal.router() == {}
    assert journal.told() == ""
    for a, b in parts:
        metrics = measured(a, b, split)
        journal.note(metrics)
    a, b = torch.cat(parts[-WINDOW:], dim=1)
    whole = measured(a, b).values()
    found = {name.replace(f"{split}/", "variance/"): v for name, v in journal.router().items()}
    assert {name: found[name] for name in whole} == pytest.approx(whole)
    shares = swaps(a, b).shares()
    assert len(shares) == 2
    for name, share in shares.items():
        numbers = [share.value, share.low, share.high]
        names = [f"{name}{end}" for end in ("", "_low", "_high")]
        assert [found[f"variance/{n}"] for n in names] == pytest.approx(numbers)
        pooled = [f"{split}/{name}_pooled{end}" for end in ("", "_low", "_high")]
        assert [metrics.values()[n] for n in pooled] == pytest.approx(numbers)
    changed = 100 * whole["routing/slot_flip"]
    share = f"{SPLITS[split]} {shares['router_share']}"
    assert journal.told() == f"{share}, experts changed {changed:.2f}%"


def test_no_share_is_told_of_few_swaps():
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 40, dtype=torch.float64, generator=generator)
    journal = Journal(None, began=time.monotonic())
    for count in range(1, 10):
        metrics = measured(a, b)
        journal.note(metrics)
        assert not any(
            "share" in n or "removes" in n for n in [*journal.router(), *metrics.values()]
        )
        assert journal.told().startswith(f"router share unknown ({40 * count} of 400 swaps), ")
    metrics = measured(a, b)
    journal.note(metrics)
    pooled = swaps(a.repeat(10), b.repeat(10)).shares()["router_share"]
    assert metrics.values()["variance/router_share_pooled"] == pytest.approx(pooled.value)
    journal.note(measured(a, b))
    assert journal.router()["variance/swaps"] == 400, "no more of the past than a share takes"


def test_what_hardly_ever_swaps_is_not_kept_for_ever():
    journal = Journal(None, began=time.monotonic())
    one = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    for _ in range(LONGEST + 5):
        journal.note(measured(*one))
    assert journal.router()["variance/swaps"] == 2 * LONGEST


def test_a_step_without_a_measurement_leaves_the_window_as_it_is(parts):
    journal = Journal(None, began=time.monotonic())
    journal.note(measured(*parts[0]))
    before = journal.router()
    nothing = torch.full((4,), math.nan, dtype=torch.float64)
    for metrics in (Metrics(), measured(nothing, nothing)):
        metrics = metrics.to_host()
        journal.note(metrics)
    assert journal.router()["variance/swaps"] == before["variance/swaps"]
    assert journal.router()["variance/total"] == before["variance/total"]


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
