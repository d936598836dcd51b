"""The study of stability: its verdicts, and that the page says what its results are."""

import pytest

from benchmarks.studies.stability import cases, drawing
from benchmarks.studies.stability.__main__ import RESULTS
from benchmarks.studies.stability.criterion import Verdict, better, steadier, verdict

SOUND = {"failed": None, "finite": True, "curve": [[0, 0.5], [16, 0.7], [32, 0.5], [48, 0.45],
                                                   [64, 0.46]]}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "collapsed"),
    [
        ({}, False),  # 0.47, within the 0.044 of 64 right answers in 128
        ({"curve": [[0, 0.5], [16, 0.45], [32, 0.45], [48, 0.46]]}, True),
        ({"curve": [[0, 0.5], [16, 0.1], [32, 0.5], [48, 0.5], [64, 0.5]]}, False),
        ({"failed": "the loss is not finite"}, True),
        ({"finite": False}, True),
    ],
)
def test_a_collapse(changed, collapsed):
    assert verdict(SOUND | changed).collapsed == collapsed


def test_a_fall_is_from_the_best_to_the_end():
    found = verdict(SOUND)
    assert (found.before, found.end, found.fall) == pytest.approx((0.5, 0.47, 0.23))


def of(*falls, collapsed=0):
    """Runs that end at 0.5 after such falls, of which so many count as collapsed."""
    return [Verdict(0.4, 0.5 - f, f, i < collapsed) for i, f in enumerate(falls)]


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        (of(0.0, 0.1, 0.1), of(0.1, 0.2, 0.2), 1),
        (of(0.1, 0.2, 0.2), of(0.0, 0.1, 0.1), -1),
        (of(0.0, 0.1, 0.3), of(0.1, 0.2, 0.2), 0),  # seeds disagree
        (of(0.0, 0.1, 0.1), of(0.01, 0.11, 0.11), 0),  # less than a standard error
        (of(0.1, 0.1, 0.1), of(0.1, 0.3, 0.3), 0),  # a seed on which they are alike
    ],
)
def test_an_order_is_one_on_every_seed(ours, theirs, found):
    assert steadier(ours, theirs) == better(ours, theirs) == found


def test_collapses_come_before_falls():
    assert steadier(of(0.2, 0.2, 0.2), of(0.1, 0.1, 0.1, collapsed=1)) == 1


def test_runs_are_those_that_the_page_asks_for():
    asked = {(*arm, seed) for arm in [*drawing.SYNC, *drawing.ASYNC] for seed in cases.SEEDS}
    made = [(case.loss, case.n, case.k, case.old_policy, case.seed) for case in cases.cases()]
    assert set(made) == asked
    assert len(made) == len(asked)


def test_the_page_says_what_the_results_are(tmp_path, monkeypatch):
    page = tmp_path / drawing.PAGE.name
    page.write_text(drawing.PAGE.read_text())
    monkeypatch.setattr(drawing, "PAGE", page)
    results = drawing.read(RESULTS)
    drawing.write_page(results)
    drawing.draw(results)
    assert page.read_text() == (drawing.ROOT / "docs" / page.name).read_text()
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {"stability-mini-batches.png", "stability-staleness.png"}
