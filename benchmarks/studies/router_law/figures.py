"""The figures and tables of ``docs/router-variance.md``, from the committed results.

python -m benchmarks.studies.router_law.figures
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.studies.router_law import RESULTS, ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sapo_megatron.routing.variance import LEAST_SWAPS

DOCS = ROOT / "docs"
PAGE = DOCS / "router-variance.md"
BLUE, ORANGE, GREEN, GREY, RED = "#1b6ca8", "#d95f02", "#2a8f57", "#4d4d4d", "#b2182b"
LAWFUL = (
    "base",
    "depth 3",
    "depth 24",
    "8 experts",
    "64 experts",
    "top 1",
    "top 8",
    "length 32",
    "length 512",
    "sigmoid, biased",
    "grouped",
)
"""Models for which the law is meant to hold."""
PAIRS = 6
"""Of a rollout and a trainer, when all are measured."""
CONTROLS = ("dense", "cloned experts", "vanishing weight", "bf16 router", "bf16 weights")


def main() -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    laws = {name: found for name in (*LAWFUL, *CONTROLS) if (found := result("law", name))}
    draw_law(laws)
    draw_foretold(laws)
    draw_controls(laws)
    tables = {"law": law_rows(laws), "controls": control_rows(laws)}
    if engines := {
        n: f for n in ("base", "sigmoid, biased", "dense") if (f := result("engines", n))
    }:
        rounded = {k: v["points"]["1"] for k, v in laws["base"]["kinds"].items() if "weights" in k}
        tables |= {"engines": engine_rows(engines, rounded), "graded": graded_rows(engines)}
        if len(engines["base"]["pairs"]) == PAIRS:
            draw_engines(engines)
    if (path := RESULTS / "small.json").exists():
        small = json.loads(path.read_text())
        small["points"] = {e: p for e, p in small["points"].items() if p["swaps"] >= LEAST_SWAPS}
        draw_small(small)
        tables["small"] = small_rows(small)
    write_page(tables)


def result(part: str, name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{part}-{name.replace(', ', '-').replace(' ', '-')}.json"
    return json.loads(path.read_text()) if path.exists() else None


def kept(kind: dict[str, Any], *, rare: bool = False) -> list[tuple[float, dict[str, Any]]]:
    """(e, point) with enough swaps, and, if ``rare``, under a hundredth of all sets."""
    points = [(float(e), kind["points"][e]) for e in kind["kept"]]
    return [(e, p) for e, p in points if not rare or p["router_flip"][0] < 0.01]


def c_of(kind: dict[str, Any]) -> float:
    """Over the points at which swaps are rare, or the first."""
    points = kept(kind, rare=True) or kept(kind)[:1]
    return float(np.exp(np.mean([np.log(p["c"][0]) for _, p in points]))) if points else np.nan


def bars(ax: Any, points: list[tuple[float, dict[str, Any]]], name: str, **style: Any) -> None:
    x = [e for e, _ in points]
    y = np.array([p[name] for _, p in points]).T
    ax.errorbar(x, y[0], yerr=np.abs(y[1:] - y[0]), marker="o", ms=4, lw=1.2, **style)


def finish(figure: Any, name: str) -> None:
    figure.savefig(DOCS / f"{name}.png", dpi=150)
    plt.close(figure)


def draw_law(laws: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    base = laws["base"]["kinds"]["update"]
    points = kept(base)
    bars(left, points, "var_a", color=GREY, label="Var a: weights, experts held")
    bars(left, points, "var_b", color=BLUE, ls="", label="Var b: swaps of experts")
    e = np.array([p[0] for p in points])
    kappa = base["foretold"]["kappa"]
    left.plot(e, kappa[0] * e, color=ORANGE, lw=1.2)
    left.fill_between(e, kappa[1] * e, kappa[2] * e, color=ORANGE, alpha=0.2, lw=0)
    left.plot([], [], color=ORANGE, label="Var b foretold from margins and forced swaps")
    left.set(xscale="log", yscale="log", xlabel="size of the update, e (1: four updates at 1e-4)")
    left.set_title("Var a falls with e squared, Var b with e")
    left.set_ylabel("variance of the log-ratio (nats$^2$)")
    left.legend(frameon=False, loc="upper left")
    x = np.geomspace(3e-4, 60, 300)
    right.plot(x, 1 / (1 + x), color=GREY, lw=1.2, label="1 / (1 + x)")
    for kind, marker, colour in (("update", "o", BLUE), ("noise", "s", ORANGE)):
        for name in LAWFUL:
            found = laws.get(name, {"kinds": {}})["kinds"].get(kind)
            if found and kept(found):
                c = c_of(found)
                xs = [p["var_a"][0] ** 0.5 / c for _, p in kept(found)]
                ys = [p["share"][0] for _, p in kept(found)]
                right.plot(xs, ys, marker, color=colour, ms=4, alpha=0.6)
        right.plot([], [], marker, color=colour, ms=4, label=f"{kind}, all models")
    right.set(
        xscale="log",
        xlabel="x = sd(a) / c, with one c for each model and kind of change",
        ylabel="router's share of the variance",
    )
    right.set_title("The smaller the change, the more is the router")
    right.axhline(0, color=GREY, lw=0.5)
    right.legend(frameon=False)
    finish(figure, "router-law")


def draw_foretold(laws: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for kind, marker, colour in (("update", "o", BLUE), ("noise", "s", ORANGE)):
        for name, found in laws.items():
            found = found["kinds"].get(kind, {})
            if "foretold" not in found or name == "bf16 router":
                continue
            said = found["foretold"]
            flips = [
                (said["swaps"][f"{e:g}"]["rate"][0], p["first_flip"][0]) for e, p in kept(found)
            ]
            for e, counted in found.get("first_flip_by_layer", {}).items():
                by_layer = [*zip(said["swaps"][e]["rate_by_layer"], counted, strict=True)]
                axes[0].plot(*np.array(by_layer).T, ".", color=GREY, ms=3, alpha=0.5)
            axes[0].plot(*np.array(flips).reshape(-1, 2).T, marker, color=colour, ms=4, alpha=0.6)
        for name in LAWFUL:
            found = laws.get(name, {"kinds": {}})["kinds"].get(kind, {})
            if "foretold" not in found:
                continue
            kappa = found["foretold"]["kappa"][0]
            jumps = [(kappa * e, p["var_b"][0]) for e, p in kept(found)]
            axes[1].plot(*np.array(jumps).reshape(-1, 2).T, marker, color=colour, ms=4, alpha=0.6)
        axes[0].plot([], [], marker, color=colour, ms=4, label=kind)
    axes[0].plot([], [], ".", color=GREY, ms=3, label="single layers")
    for ax, title, unit in (
        (axes[0], "Swaps, from the margins near 0", "share of token-layers that swap"),
        (axes[1], "Var b, from margins and swaps forced one by one", "Var b (nats$^2$)"),
    ):
        ax.set(xscale="log", yscale="log", xlabel=f"foretold: {unit}", ylabel="measured")
        ends = np.array(
            [min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])]
        )
        ax.plot(ends, ends, color=GREY, lw=0.8)
        ax.set_title(title)
    axes[0].legend(frameon=False)
    finish(figure, "router-law-foretold")


def draw_controls(laws: dict[str, Any]) -> None:
    figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    shown = (
        ("base", "ordinary router (e)", BLUE),
        ("vanishing weight", "weight vanishes at the boundary (e$^3$)", GREEN),
        ("bf16 router", "router scores in bf16", ORANGE),
        ("cloned experts", "experts all alike at first (e$^3$)", RED),
    )
    for name, label, colour in shown:
        if name in laws:
            points = [
                (float(e), p)
                for e, p in laws[name]["kinds"]["update"]["points"].items()
                if p["swaps"] >= LEAST_SWAPS
            ]
            bars(ax, points, "var_b", color=colour, label=label)
    if "dense" in laws:
        ax.text(0.03, 0.95, "dense twin: exactly 0, not drawn", transform=ax.transAxes, fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="size of the update, e", ylabel="Var b (nats$^2$)")
    ax.set_title("What swaps add to the variance, where the law says how much")
    ax.legend(frameon=False, fontsize=8)
    finish(figure, "router-law-controls")


def draw_engines(engines: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    pairs = {n: p for n, p in engines["base"]["pairs"].items() if n != "fp32 rollout, fp32 trainer"}
    colours = (BLUE, ORANGE, GREEN, RED, GREY)
    for (name, pair), colour in zip(pairs.items(), colours, strict=False):
        flips = pair["router_flip_by_layer"]
        left.plot(range(1, len(flips) + 1), flips, marker="o", ms=3, color=colour, label=name)
    left.set(xlabel="layer", ylabel="share of tokens with another set")
    left.set_ylim(bottom=0)
    left.set_title("Sets that differ between rollout and trainer")
    left.legend(frameon=False, fontsize=8)
    ways = ("no replay", "0.95", "0.8", "0.5", "R3")
    width = 0.16
    for i, way in enumerate(ways):
        values = []
        for pair in pairs.values():
            k3 = {"no replay": pair["k3"], "R3": pair["k3_held"]}
            values.append((k3[way] if way in k3 else pair["graded"][way]["k3_held"])[0])
        shade = plt.get_cmap("viridis")(i / 5)
        label = f"R3, threshold {way}" if way[0] == "0" else way
        right.bar(np.arange(len(values)) + (i - 2) * width, values, width, color=shade, label=label)
    names = [name.replace(" rollout, ", "\nto ").replace(" trainer", "") for name in pairs]
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.set(yscale="log", ylabel="KL (nats a token, k3)")
    right.set_title("What replay leaves of the KL between engines")
    right.legend(frameon=False, fontsize=8)
    finish(figure, "router-engines")


def draw_small(small: dict[str, Any]) -> None:
    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    x = np.array([p["var_a"][0] for p in small["points"].values()])
    share = np.array([p["share"] for p in small["points"].values()]).T
    ax.errorbar(
        x,
        share[0],
        yerr=np.abs(share[1:] - share[0]),
        color=BLUE,
        marker="o",
        label="all responses",
    )
    for shift, name, colour, label in (
        (0.93, "mini_batch", GREY, "one mini-batch: middle half and 90 percent"),
        (1.07, "median_of_runs", ORANGE, "median of 3 runs of 8 mini-batches"),
    ):
        q = np.array([small["few"][e][name] for e in small["points"]]).T
        ax.vlines(x * shift, q[0], q[4], color=colour, lw=1)
        ax.vlines(x * shift, q[1], q[3], color=colour, lw=4)
        ax.plot(x * shift, q[2], "_", color=colour, ms=12, label=label)
    ax.set(xscale="log", xlabel="Var a (nats$^2$)", ylabel="router's share of the variance")
    ax.set_title("Mini-batches of 128 responses do not see the share")
    ax.axhline(0, color=GREY, lw=0.5)
    ax.legend(frameon=False, fontsize=8)
    finish(figure, "router-few-swaps")


def shown(values: list[float], form: str = "{:.2g}") -> str:
    value, low, high = (form.format(x) for x in values)
    return f"{value} ({low} to {high})"


def law_rows(laws: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["model", "change", "c", "exponent of Var a", "of Var b", "of Var b, swaps rare",
         "swaps, counted / foretold", "Var b / foretold", "Var b / fitted at large e"]
    ]  # fmt: skip
    for name in LAWFUL:
        for change, kind in laws.get(name, {"kinds": {}})["kinds"].items():
            points = kept(kind)
            if points:
                exponents = [
                    shown(kind[key], "{:.2f}") if key in kind else "-"
                    for key in ("exponent_var_a", "exponent_var_b", "exponent_var_b_rare")
                ]
                rows.append([name, change, f"{c_of(kind):.2g}", *exponents, *ratios(kind, points)])
    return rows


def ratios(kind: dict[str, Any], points: list[tuple[float, dict[str, Any]]]) -> list[str]:
    """Of the smallest change with enough swaps; fitted at the largest that swaps under a tenth."""
    found, (e, p) = ["-", "-"], points[0]
    if "foretold" in kind:
        rate, kappa = kind["foretold"]["swaps"][f"{e:g}"]["rate"], kind["foretold"]["kappa"]
        found = [over(p["first_flip"], rate), over(p["var_b"], [k * e for k in kappa])]
    large, q = [(x, q) for x, q in points if q["router_flip"][0] < 0.1 or x == e][-1]
    fitted = [v * e / large for v in q["var_b"]]
    return [*found, f"{over(p['var_b'], fitted)}, {large:g}" if large > e else "-"]


def over(measured: list[float], foretold: list[float]) -> str:
    """Of two values with intervals the ratio, with errors that add as logarithms' do."""
    logs = [np.log(measured), np.log(foretold)]
    spread = [np.hypot(*(x[i] - x[0] for x in logs)) for i in (1, 2)]
    value = logs[0][0] - logs[1][0]
    return shown([np.exp(x) for x in (value, value - spread[0], value + spread[1])], "{:.2f}")


def control_rows(laws: dict[str, Any]) -> list[list[str]]:
    rows = [["control", "e", "swaps", "Var a", "Var b", "share", "exponent of Var b"]]
    for name in CONTROLS:
        if name not in laws:
            continue
        kind = laws[name]["kinds"]["update"]
        for e, p in kind["points"].items():
            if p["swaps"] < LEAST_SWAPS and name != "dense":
                continue
            exponent = kind.get("exponent_var_b_rare", kind.get("exponent_var_b"))
            last = shown(exponent, "{:.2f}") if exponent and np.isfinite(exponent[0]) else "-"
            share = "0" if p["var_b"][0] == 0 else shown(p["share"])
            rows.append([name, e, f"{p['swaps']}", f"{p['var_a'][0]:.1e}",
                         f"{p['var_b'][0]:.1e}", share, last])  # fmt: skip
    return rows


def engine_rows(engines: dict[str, Any], rounded: dict[str, Any]) -> list[list[str]]:
    """``rounded``: points at which weights alone were rounded."""
    pairs = [
        (name, *(word.split()[0] for word in pair.split(", ")), p)
        for name, found in engines.items()
        for pair, p in found["pairs"].items()
    ]
    pairs += [("base", f"fp32, {kind}", "fp32", p) for kind, p in rounded.items()]
    rows = [
        ["model", "rollout", "trainer", "router_flip", "tokens with a flip", "share",
         "replay removes", "KL (k3)", "with R3", "F(2)", "with R3"]
    ]  # fmt: skip
    for name, rollout, trainer, p in pairs:
        enough = p["swaps"] >= LEAST_SWAPS
        rows.append([
            name, rollout, trainer, f"{p['router_flip'][0]:.2%}", f"{p['tokens_flipped'][0]:.1%}",
            shown(p["share"]) if enough else "-", shown(p["replay_removes"]) if enough else "-",
            f"{p['k3'][0]:.1e}", f"{p['k3_held'][0]:.1e}",
            f"{p['extreme'][0]:.1e}", f"{p['extreme_held'][0]:.1e}",
        ])  # fmt: skip
    return rows


def graded_rows(engines: dict[str, Any]) -> list[list[str]]:
    pairs = engines["base"]["pairs"]
    names = list(next(iter(pairs.values()))["graded"])
    rows = [["rollout", "trainer", "no replay", *(f"threshold {n}" for n in names[::-1]), "R3"]]
    for pair, p in pairs.items():
        rollout, trainer = (word.split()[0] for word in pair.split(", "))
        values = [p["k3"], *(p["graded"][n]["k3_held"] for n in names[::-1]), p["k3_held"]]
        rows.append([rollout, trainer, *(f"{v[0]:.2e}" for v in values)])
    return rows


def small_rows(small: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["e", "Var a", "swaps in all", "share, all", "swaps a mini-batch",
         "share, one mini-batch (quartiles)", "median of 3 runs (5 to 95 percent)"]
    ]  # fmt: skip
    for e, p in small["points"].items():
        few = small["few"][e]
        one, runs = few["mini_batch"], few["median_of_runs"]
        rows.append([
            e, f"{p['var_a'][0]:.1e}", str(p["swaps"]), shown(p["share"]), f"{few['swaps']:.1f}",
            f"{one[2]:.3f} ({one[1]:.3f} to {one[3]:.3f})",
            f"{runs[2]:.3f} ({runs[0]:.3f} to {runs[4]:.3f})",
        ])  # fmt: skip
    return rows


def write_page(tables: dict[str, list[list[str]]], page: Path = PAGE) -> None:
    """Replace the tables between the page's markers."""
    text = page.read_text()
    for name, (head, *body) in tables.items():
        lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        marker = f"<!-- table: {name} -->"
        text = re.sub(
            rf"{marker}.*?<!-- end -->",
            f"{marker}\n{table}\n<!-- end -->".replace("\\", r"\\"),
            text,
            flags=re.DOTALL,
        )
    page.write_text(text)


if __name__ == "__main__":
    main()
