"""The report of a finished run, of a run without some series, and of folders that are no run."""

import json
import re
from html.parser import HTMLParser
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from sapo_megatron.commands import report
from sapo_megatron.commands.report import write_report
from sapo_megatron.commands.report.drawing import BARS, THEMES, WIDTH, drawn, render
from sapo_megatron.commands.report.figures import SECTIONS
from sapo_megatron.commands.report.router_figures import (
    ENGINES,
    FLIPS,
    ROUTER_FIGURES,
    SHIFT,
    SPLITS,
    buckets_of,
)
from sapo_megatron.errors import UserError
from sapo_megatron.runs.read import read_run
from sapo_megatron.runs.timeline import Event
from sapo_megatron.runs.trackers import SamplesTracker
from tests.support.shown import HOSTILE, SEEN, shown
from tests.support.synthetic_run import write_run

FIGURES = [figure for figures in SECTIONS.values() for figure in figures]
LARGEST_PAGE = 2_000_000
"""Bytes."""


class _Page(HTMLParser):
    """Collects what a page would load, the names of its pictures, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.pictures += [v for k, v in attributes if k == "alt"]
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def sapo_run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "sapo", steps=1000)
    return folder, write_report(folder)


def test_every_figure_is_in_the_folder_and_on_the_page(sapo_run):
    folder, page = sapo_run
    pngs = {path.stem for path in (folder / "report").glob("*.png")}
    assert pngs == {figure.name for figure in FIGURES}
    titles = [figure.title for figure in FIGURES for _ in THEMES]
    assert sorted(_Page(page.read_text()).pictures) == sorted(titles)


def test_the_page_of_a_long_run_is_small(sapo_run):
    assert sapo_run[1].stat().st_size <= LARGEST_PAGE


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
        "1000 of 1000",
        "2h16m",
        "tau_pos 1, tau_neg 1.05",
        "31.0% before, 68.0% after",
        "from 42.0% (+32.0 points)",
        "2 ranks: TP 1, PP 1, CP 1, EP 2",
        "router share",
        "60.0% (58.0 to 63.0) at step 1000, over a window",
        "router share between engines",
        "Experts that changed",
        "at step 1000",
    ):
        assert told in text
    assert "Left out" not in text


@pytest.fixture
def in_light_alone(monkeypatch):
    """Reports are drawn in one theme, and have nothing for the other."""

    def drawn_once(figure, run, theme):
        return render(figure, run, theme) if theme is THEMES["light"] else b""

    monkeypatch.setattr(report, "render", drawn_once)


@pytest.mark.usefixtures("in_light_alone")
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


@pytest.mark.usefixtures("in_light_alone")
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
    page = write_report(folder)
    assert "7 of 12" in _Page(page.read_text()).text


@pytest.mark.usefixtures("in_light_alone")
def test_the_page_shows_what_the_model_wrote_and_nothing_more(tmp_path):
    folder = write_run(tmp_path / "run", steps=2)
    _steps(folder, **{"reward/mean": [0.1, 0.2]})
    assert "<details" not in write_report(folder).read_text()
    tracker = SamplesTracker(folder)
    tracker.show(1, [shown(1, "best", ("an old one", 1.0))])
    hostile = {"prompt": HOSTILE, "answer": HOSTILE, "task": HOSTILE}
    long = shown(2, "worst", ("\u4e2d" * 100_000, 0.0), ("\n  two\nlines", 0.5))
    other = shown(2, "random", ("any other", 0.25), ("a", 0.75))
    left_out = shown(2, "random", ("not this", 0.5))
    tracker.show(2, [shown(2, "best", (HOSTILE, 1.0), **hostile), long, other, left_out])
    html = write_report(folder).read_text()
    page = _Page(html)
    assert html.isascii()
    assert re.findall("[\x00-\x09\x0b-\x1f\x7f]", html) == []
    assert html.count("<details") == html.count("</details>") == 3
    assert "<script" not in html
    assert page.text.count(f"\n{SEEN}") == 3
    assert "best group of the step: 1 responses, mean reward 1, task '</pre>" in page.text
    assert "random group: 2 responses, mean reward 0.5, task 'sums'" in page.text
    facts = "reward 0.5, advantage +0.5, 3 tokens, ended by '</s>', staleness 0"
    assert f"response 2: {facts}" in page.text
    assert "\n\n  two\nlines\n" in page.text, "a pre drops its first line break"
    assert "\u4e2d\n[... 96,000 characters left out, samples.jsonl has them ...]\n" in page.text
    for text in ("any other", "What the model wrote in step 2"):
        assert text in page.text
    for text in ("an old one", "not this"):
        assert text not in page.text
    (folder / "samples.jsonl").write_text('{"step": 2, "picked": 3}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl: expected groups"):
        write_report(folder)


@pytest.mark.usefixtures("in_light_alone")
def test_the_time_says_what_is_in_it(tmp_path):
    folder = write_run(tmp_path / "run", steps=2)
    _steps(folder, **{"reward/mean": [0.1, 0.2], "perf/step_s": [3.0, 4.0]})
    config = folder / "config.yaml"
    assert "Wall time16s\n" in _Page(write_report(folder).read_text()).text
    raw = yaml.safe_load(config.read_text())
    raw["cold_start"]["steps"] = 100
    config.write_text(yaml.safe_dump(raw))
    assert "16s, cold start included" in _Page(write_report(folder).read_text()).text
    (folder / "summary.json").unlink()
    told = "7s in steps, without evaluation and checkpoints"
    assert told in _Page(write_report(folder).read_text()).text


def test_a_report_needs_nothing_but_its_folder(tmp_path):
    folder = write_run(tmp_path / "run", steps=1)
    _steps(folder, **{"reward/mean": [0.1]})
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    gone = str(tmp_path / "gone")
    raw["model"] |= {"path": gone, "tokenizer": gone, "architecture": f"{gone}/config.json"}
    raw["data"]["train"] |= {"tasks": [], "path": f"{gone}/train.jsonl"}
    raw["data"]["eval"] = {"path": f"{gone}/eval.parquet"}
    raw["rollout"] |= {"engine": "vllm", "vllm_python": f"{gone}/bin/python"}
    raw["train"]["run_dir"] = gone
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    assert write_report(folder).exists()


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
    assert buckets_of(run, "layers") == [("0", 1.75, 0.5), ("17+", 5.0, 0.25)]


def test_router_figures_stand_a_run_with_next_to_nothing(tmp_path):
    layer = "routing/slot_flip/layer_"
    run = _steps(
        write_run(tmp_path / "run", steps=1),
        **{name: [0.0] for panel in (*FLIPS, *SHIFT, *ENGINES) for name in panel.names},
        **{f"{split}/total": [0.0] for split in SPLITS},
        **{f"{split}/cov": [None] for split in SPLITS},
        **{f"{split}/router_share_pooled": [-0.5] for split in SPLITS},
        **{f"variance/by_{what}/0": [0.0] for what in ("layers", "context")},
        **{f"variance/by_{what}_share/0": [1.0] for what in ("layers", "context")},
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


# The pictures


def _scaled(folder, factor):
    """A run of which every metric that is one number was ``factor`` times the usual."""
    write_run(folder, steps=6)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.update({name: factor * x for name, x in record.items() if isinstance(x, float)})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return read_run(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sapo_run):
    """Runs of a thousand steps, with values like rounding errors, and with nothing but zeros."""
    folder = tmp_path_factory.mktemp("runs")
    tiny, zero = _scaled(folder / "tiny", 1e-7), _scaled(folder / "zero", 0.0)
    return {"long": read_run(sapo_run[0]), "tiny": tiny, "zero": zero}


@pytest.fixture
def written(monkeypatch):
    """Draws a figure; (its canvas, the texts that stand on it, the renderer)."""

    def written(figure, run):
        texts, draw = {}, Text.draw

        def kept(text, renderer):
            if text.get_visible() and text.get_text().strip():
                texts[id(text)] = text
            draw(text, renderer)

        with monkeypatch.context() as patch:
            patch.setattr(Text, "draw", kept)
            made = drawn(figure, run, THEMES["light"])
        return made.figure, list(texts.values()), made.get_renderer()

    return written


def _within(box, canvas):
    """Whether a box lies on the canvas, give or take a pixel."""
    low, high = min(box.x0, box.y0), (box.x1 - canvas.x1, box.y1 - canvas.y1)
    return low >= -1 and max(high) <= 1


def _apart(one, other):
    """Whether two boxes have no pixel in common, give or take one."""
    return min(one.x1, other.x1) - max(one.x0, other.x0) <= 1 or (
        min(one.y1, other.y1) - max(one.y0, other.y0) <= 1
    )


def test_the_picture_of_a_step_has_room_for_a_cluster(written):
    """Wherever its servers are; it says how many rows it leaves out."""
    servers = [f"http://node-{i:03d}.cluster.example.com:8000 (rank 0)" for i in range(12)]
    stages = [("step", 0.0, 300.0), ("rollout", 10.0, 80.0), ("update", 100.0, 190.0)]
    timeline = [
        Event(step=7, stage=stage, where=where, begin=begin, seconds=seconds)
        for where in [*(f"rank {i}" for i in range(1024)), *servers]
        for stage, begin, seconds in stages[where in servers :]
    ]
    # Of the step before, and from there into this one, as what a checkpoint takes.
    for stage, begin, seconds in (("step", -200.0, 190.0), ("checkpoint", -20.0, 25.0)):
        timeline.append(Event(step=6, stage=stage, where="rank 0", begin=begin, seconds=seconds))
    timeline.append(Event(step=6, stage="update", where="rank 1", begin=-90.0, seconds=50.0))
    (figure,) = (figure for figure in FIGURES if figure.name == "timeline")
    canvas, texts, renderer = written(figure, SimpleNamespace(timeline=timeline))
    assert all(_within(text.get_window_extent(renderer), canvas.bbox) for text in texts)
    bars = [(bar.get_x(), bar.get_width()) for ax in canvas.axes for bar in ax.patches]
    assert (0, 5.0) in bars
    assert all(0 <= left <= left + width <= 300 and width > 0 for left, width in bars)
    told = {text.get_text() for text in texts}
    assert {"rank 7", "server 7", "seconds of step 7 (16 of 1036 rows)"} <= told


def _narrowest_image():
    """Pixels that the page gives to a picture in the narrowest of its columns."""
    css = Path(report.__file__).with_name("template.html").read_text()
    column = float(re.search(r"minmax\(min\(100%, (\S+)rem\)", css)[1])
    padding = float(re.search(r"figure \{ margin: 0; padding: (\S+)rem;", css)[1])
    return 16 * (column - 2 * padding) - 2


@pytest.mark.parametrize("kind", ["long", "tiny", "zero"])
def test_letters_are_legible_and_nothing_is_covered_or_cut_off(written, runs, kind):
    for figure in FIGURES:
        if not figure.available(runs[kind]):
            continue
        canvas, texts, renderer = written(figure, runs[kind])
        boxes = [text.get_window_extent(renderer) for text in texts]
        for text, box in zip(texts, boxes, strict=True):
            assert text.get_fontsize() / 72 / WIDTH * _narrowest_image() >= 9, (figure.name, text)
            assert _contrast(text.get_color(), THEMES["light"].face) >= 4.5, (figure.name, text)
            assert _within(box, canvas.bbox), (figure.name, text)
        for (one, box), (other, beside) in combinations(zip(texts, boxes, strict=True), 2):
            assert _apart(box, beside), (figure.name, one, other)
        legends = [ax.get_legend() for ax in canvas.axes if ax.get_legend()]
        for ax, legend in product(canvas.axes, legends):
            assert _apart(legend.get_window_extent(renderer), ax.bbox), figure.name
        for ax in canvas.axes if figure.name != "bound" else ():  # which leaves out outliers
            low, high = ax.get_ylim()
            for line in (line for line in ax.lines if line.get_transform() == ax.transData):
                y = np.asarray(line.get_ydata(), dtype=np.float64)
                assert np.all(((low <= y) & (y <= high)) | np.isnan(y)), (figure.name, line)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colours_stand_out_from_the_page(theme):
    """The thresholds of WCAG 2.1: 4.5 for letters, 3 for what is drawn."""
    assert _contrast(theme.ink, theme.face) >= 7
    assert _contrast(theme.muted, theme.face) >= 4.5
    assert all(_contrast(color, theme.face) >= 3 for color in theme.series)


def _contrast(one, other):
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(color):
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def _figure(name):
    (found,) = [figure for figure in FIGURES if figure.name == name]
    return found


def test_the_axis_of_what_is_always_0_goes_from_0_to_1(written, runs):
    run = runs["zero"]
    for name in ("flips", "response", "grad_norm", "variance_split", "time", "engines", "loss"):
        canvas, texts, _ = written(_figure(name), run)
        assert {ax.get_ylim() for ax in canvas.axes} == {(0, 1)}, name
        assert not any("e-" in text.get_text() for text in texts), name
    assert {"0%", "100%"} <= {text.get_text() for text in written(_figure("flips"), run)[1]}


def _lines(canvas):
    return {line.get_label(): line for ax in canvas.axes for line in ax.lines}


def test_the_gradient_norm_is_a_running_median_on_a_logarithmic_axis(written, tmp_path):
    norms = [0.1 + 0.001 * i for i in range(60)]
    norms[20], norms[40] = 500.0, 0.0
    run = _steps(write_run(tmp_path / "run", steps=1), **{"actor/grad_norm": norms})
    canvas, texts, _ = written(_figure("grad_norm"), run)
    assert canvas.axes[0].get_yscale() == "log"
    lines = _lines(canvas)
    assert lines["each step"].get_ydata().tolist() == [*norms[:40], *norms[41:]]
    assert lines["0"].get_xdata().tolist() == [41]
    median = lines["running median"].get_ydata()
    assert len(median) == 60
    assert 0.1 <= median.min() <= median.max() < 0.17
    assert median[30] == pytest.approx(0.13)
    assert {"each step", "running median", "0"} <= {text.get_text() for text in texts}


@pytest.mark.parametrize(
    ("figure", "split"),
    [("variance_split", "variance"), ("engine_split", "rollout_train/variance")],
)
def test_the_total_lies_on_the_bars_of_the_variance(written, runs, figure, split):
    run, parts = runs["long"], SPLITS[split]
    canvas, texts, _ = written(_figure(figure), run)
    (ax,) = canvas.axes
    assert len(ax.containers) == len(parts)
    bars = [bar for container in ax.containers for bar in container]
    assert len(ax.containers[0]) <= BARS < len(run.series(f"{split}/total")[0])
    (total,) = ax.collections
    assert total.get_zorder() > max(bar.get_zorder() for bar in bars)
    shown = {t.get_text() for t in texts}
    assert {"total, Var z", *parts.values()} <= shown
    assert ("noise floor" in shown) == (split == "variance")
    segments = total.get_segments()
    for segment, *parts in zip(segments, *ax.containers, strict=True):
        (left, level), (right, _) = segment
        assert level == pytest.approx(sum(bar.get_height() for bar in parts), rel=1e-3)
        assert left == pytest.approx(parts[0].get_x())
        assert right - left == pytest.approx(parts[0].get_width())


@pytest.mark.parametrize(
    ("figure", "split"),
    [("router_share", "variance"), ("engine_share", "rollout_train/variance")],
)
def test_the_routers_share_is_the_pooled_one_with_its_interval(written, tmp_path, figure, split):
    series = {"": [0.9, 0.5, 0.55], "_low": [0.7, 0.4, 0.513], "_high": [1.1, 0.7, 0.626]}
    raw, name = {f"{split}/router_share": [0.9, -0.2, 0.7]}, f"{split}/router_share_pooled"
    run = _steps(
        write_run(tmp_path / "run", steps=1),
        **raw,
        **{name + end: values for end, values in series.items()},
    )
    canvas, _, _ = written(_figure(figure), run)
    lines = _lines(canvas)
    assert lines["router's share"].get_ydata().tolist() == series[""]
    assert "what replay removes" not in lines
    (band,) = canvas.axes[0].collections
    assert set(band.get_paths()[0].vertices[:, 1]) == {*series["_low"], *series["_high"]}
    (told,) = [numbers for _, *numbers in report._router_numbers(run)]
    assert told == ["55.0% (51.3 to 62.6)", "at step 3, over a window"]


def test_no_share_of_few_swaps_is_drawn_or_told(tmp_path):
    few = {"variance/router_share": [0.7], "variance/swaps": [12.0]}
    run = _steps(write_run(tmp_path / "run", steps=1), **few)
    assert not _figure("router_share").available(run)
    (told,) = report._router_numbers(run)
    assert told == ("router share", "unknown", "of fewer than 400 swaps")


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
