"""The first of the kills and the damages of ``make torture``."""

import itertools

import pytest

from tests.torture import damages, kills


@pytest.mark.parametrize(
    ("part", "count"), [(damages, 10), pytest.param(kills, 12, marks=pytest.mark.slow)]
)
def test_runs_survive(part, count, tmp_path):
    outcomes = list(itertools.islice(part.trials(0, tmp_path), count))
    assert len(outcomes) == count
    assert [outcome for outcome in outcomes if outcome.problem] == []
