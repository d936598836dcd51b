"""The report of a finished run, of a run without some series, and of folders that are no run."""

import json
import re
from html.parser import HTMLParser

import matplotlib.image
import pytest

from sapo_megatron.commands.report import write_report
from sapo_megatron.commands.report.drawing import THEMES, render
from sapo_megatron.commands.report.figures import FIGURES
from sapo_megatron.commands.report.router_figures import (
    ENGINES,
    FLIPS,
    ROUTER_FIGURES,
    SHIFT,
    by_layers,
)
from sapo_megatron.errors import UserError
from sapo_megatron.runs.read import read_run
from tests.support.synthetic_run import write_run


class _Page(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def sapo_run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "sapo")
    return folder, write_report(folder)


def test_every_figure_is_drawn_and_legible(sapo_run):
    folder, _ = sapo_run
    pngs = {path.stem for path in (folder / "report").glob("*.png")}
    assert pngs == {figure.name for figure in FIGURES}
    for name in pngs:
        image = matplotlib.image.imread(folder / "report" / f"{name}.png")
        assert image.shape[1] >= 1000
        assert image.std() > 0.02, f"{name} is blank"


def test_the_page_loads_nothing_from_outside(sapo_run):
    html = sapo_run[1].read_text()
    page = _Page(html)
    assert len(page.loads) == 2 * len(FIGURES)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not re.search(r"https?://|@import|url\(|<script", html)
    assert html.isascii()


def test_the_page_tells_the_main_numbers(sapo_run):
    text = _Page(sapo_run[1].read_text()).text
    for told in (
        "60 of 60",
        "8m12s",
        "tau_pos 1, tau_neg 1.05",
        "31.0% before, 68.0% after",
        "from 42.0% (+32.0 points)",
        "2 ranks: TP 1, PP 1, CP 1, EP 2",
        "router's share of the variance",
        "Experts that changed",
        "at step 60",
    ):
        assert told in text
    assert "Left out" not in text


def test_a_second_report_replaces_the_first_and_leaves_nothing_behind(tmp_path):
    folder = write_run(tmp_path / "run", loss_type="grpo", steps=3, experts=False)
    before = {path.name for path in folder.iterdir()}
    (folder / "report").mkdir()
    (folder / "report" / "stale.png").touch()
    page = write_report(folder)
    assert {path.name for path in folder.iterdir()} == before | {"report"}
    assert not (folder / "report" / "stale.png").exists()
    assert not (folder / "report" / "gate_hist.png").exists()
    text = _Page(page.read_text()).text
    assert "Left out, because this run did not log their series: Gate weights" in text
    assert "low 0.2, high 0.2" in text
    assert all(figure.title in text for figure in ROUTER_FIGURES)
    assert "The router" not in re.findall("<h2>(.*)</h2>", page.read_text())
    assert "at step" not in text


def test_a_run_that_was_cut_off_still_has_a_report(tmp_path):
    folder = write_run(tmp_path / "run", steps=12)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [json.dumps({"step": 0, "eval/avg@8": 0.25}), *lines[:7], lines[7][:50]]
    (folder / "metrics.jsonl").write_text("\n".join(kept))
    run = read_run(folder)
    assert run.steps_done == 7
    assert run.evaluations() == {}
    assert run.wall_s == pytest.approx(7 * 8.2, rel=0.3)
    assert "7 of 12" in _Page(write_report(folder).read_text()).text


def test_histograms_add_up_over_the_steps(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=5))
    _, positive = run.histogram("ratio/hist_pos")
    _, negative = run.histogram("ratio/hist_neg")
    assert positive.sum() + negative.sum() == 5 * 4000


def test_the_evaluation_before_the_first_step_is_that_of_step_0(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    steps, scores = read_run(folder).series("eval/avg@8")
    assert steps.tolist() == [0, 10, 20]
    assert scores[0] == 0.31
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "eval/avg@8": 0.25}))
    assert read_run(folder).series("eval/avg@8")[1][0] == 0.25


def _steps(folder, **series):
    """``folder`` with the metrics replaced: name -> one value a step."""
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    lines = [json.dumps({"step": i, **row}) for i, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return read_run(folder)


def test_variance_by_layers_weighs_the_last_third_by_tokens(tmp_path):
    stem, share = "variance/by_layers/", "variance/by_layers_share/"
    run = _steps(
        write_run(tmp_path / "run", steps=1),
        **{stem + "0": [9.0] * 4 + [1.0, 4.0], share + "0": [1.0] * 4 + [0.75, 0.25]},
        **{stem + "17+": [None] * 5 + [5.0], share + "17+": [0.0] * 5 + [0.5]},
        **{stem + "3-4": [5.0] + [None] * 5, share + "3-4": [0.5] + [0.0] * 5},
        **{stem + "9-16": [None] * 6, share + "9-16": [0.0] * 6},
    )
    assert by_layers(run) == [("0", 1.75, 0.5), ("17+", 5.0, 0.25)]


def test_router_figures_stand_a_run_with_next_to_nothing(tmp_path):
    layer = "routing/flip_fraction/layer_"
    run = _steps(
        write_run(tmp_path / "run", steps=1),
        **{name: [0.0] for panel in (*FLIPS, *SHIFT, *ENGINES) for name in panel.names},
        **{"variance/total": [0.0], "variance/cov": [None], "variance/router_share": [-0.5]},
        **{"variance/by_layers/0": [0.0], "variance/by_layers_share/0": [1.0]},
        **{"sapo/bound_points": [{"points": [[0.0, 0.0], [1e-3, 9e-4]]}]},
        **{layer + "2": [0.0], layer + "10": [0.1]},
    )
    for figure in ROUTER_FIGURES:
        assert figure.available(run)
        assert render(figure, run, THEMES["dark"])


def test_points_at_zero_are_no_figure(tmp_path):
    points = [{"points": [[0.0, 0.0], [1e-16, 2e-16]]}, {"points": []}]
    run = _steps(write_run(tmp_path / "run", steps=1), **{"sapo/bound_points": points})
    assert run.points("sapo/bound_points").tolist() == [[1, 0, 0], [1, 1e-16, 2e-16]]
    assert "bound" not in {figure.name for figure in FIGURES if figure.available(run)}


def test_a_folder_without_metrics_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected at least one step"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_is_named(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "[1]", lines[2]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: expected a JSON object with step"):
        write_report(folder)
