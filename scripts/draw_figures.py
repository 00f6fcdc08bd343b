"""Draw the figures of the README and of docs/benchmarks.md into docs/figures.

    python scripts/draw_figures.py [bench | real | recipes | trace] [--output FOLDER]

bench: decoding, passes of several rows, and samples beside mlx-lm, by the newest line in benchmarks/ that has all three
of what `python -m qwq_mlx.bench --output benchmarks` wrote. real: bits per weight against KL on a real model, from what
`measure_real.py` printed. recipes: bytes against equations solved, off the pocket's training grid. These two from the
newest files of their names in benchmarks/. docs/benchmarks.md has all as tables. trace: one Game of 24 by the bundled
pocket model, drawn by `qwq_mlx.plot_trace`. Needs the extra "plot".

Does not: measure a recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(ROOT))

QUESTION = "Use the numbers 2, 5, 7, 9 with + - * / to get 24."
COLORS = ("#1f4e79", "#c0392b", "#2e8b57", "#888888", "#b07d2b", "#8e44ad", "#444444")
MARKERS = "osDxv^+"
METHODS = {
    "min-max (mlx_lm.convert)": ("3mm.toml", "4bit-min-max", "5mm.toml"),
    "least squares (default)": ("3bit", "4bit"),
    "--target-size": ("size-of-3bit", "size-of-4bit"),
    "--calibrate": ("3bit+calibrate", "4bit+calibrate"),
    "--target-size --calibrate": ("size-of-3bit+calibrate", "size-of-4bit+calibrate"),
}
"""Of draw_real: method -> forms in the results."""
KINDS = {
    "real-calibrated-0.5b": "of puzzles and riddles, as the calibration text has",
    "real-calibrated-other-0.5b": "of code and mathematics, as it does not have",
}
"""Of draw_real: results -> what was judged, a panel each; of the second only some forms were measured."""
BENCH_SCHEMA = 2
PANELS = {
    "decode": "one row: tokens a second",
    "rows": "a pass of several rows: ms",
    "samples": "samples of one prompt: tokens a second",
}
"""Of draw_bench: subject -> title."""
CONTESTANTS = ("qwq_mlx", "mlx-lm, same arrays")
CONNECTED = ("our recipes", "ours, --target-size")  # of the others there are only 2, 3 and 4 bits


def main() -> int:
    """Draw what was asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    draw = {"bench": draw_bench, "real": draw_real, "recipes": draw_recipes, "trace": draw_trace}
    parser.add_argument("figure", nargs="?", choices=draw, help="the one to draw (default: all)")
    parser.add_argument(
        "--output", type=Path, default=FIGURES, metavar="FOLDER", help="where to (default: docs/figures)"
    )
    options = parser.parse_args()
    # Text stays text, and date and ids are fixed: a figure is small and changes only with its numbers.
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "qwq_mlx"
    for name in [options.figure] if options.figure else draw:
        path = options.output / f"{name}.svg"
        draw[name](path)
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def newest(name: str) -> dict[str, Any]:
    """The results of that name with the latest date."""
    results: dict[str, Any] = json.loads(max(BENCHMARKS.glob(f"*-{name}.json")).read_text(encoding="utf-8"))
    return results


def newest_bench() -> dict[str, Any]:
    """The latest result of the benchmarks that has every panel's subject, so that one machine measured all of them."""
    lines = (line for each in BENCHMARKS.glob("????-??-??.jsonl") for line in each.read_text("utf-8").splitlines())
    results = [each for each in map(json.loads, lines) if each["schema"] == BENCH_SCHEMA]
    whole = [each for each in results if PANELS.keys() <= {row["subject"] for row in each["rows"]}]
    if not whole:
        raise SystemExit(
            f"No result in {BENCHMARKS} is of schema {BENCH_SCHEMA} and has {', '.join(PANELS)}. Measure them: "
            f"python -m qwq_mlx.bench {' '.join(PANELS)} --output benchmarks"
        )
    return max(whole, key=lambda each: str(each["date"]))


def draw_bench(path: Path) -> None:
    """Medians of ours and mlx-lm's with the smallest and largest run, one panel a subject."""
    result = newest_bench()
    model = result["rows"][0]["model"]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (subject, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        rows = [row for row in result["rows"] if (row["subject"], row["model"]) == (subject, model)]
        for place, (name, color) in enumerate(zip(CONTESTANTS, COLORS, strict=False)):
            medians = [row["median"][name] for row in rows]
            below = [median - min(row["runs"][name]) for median, row in zip(medians, rows, strict=True)]
            above = [max(row["runs"][name]) - median for median, row in zip(medians, rows, strict=True)]
            places = [at + 0.4 * (place - 0.5) for at in range(len(rows))]
            axes.bar(places, medians, 0.4, yerr=(below, above), capsize=3, color=color, label=name)
        limits = {f"{row['byte_limit']:,.0f} ({row['fraction_of_limit']:.0%})" for row in rows if row["byte_limit"]}
        if limits:
            axes.plot([], [], " ", label=f"byte limit {', '.join(sorted(limits))}")
        axes.set_xticks(range(len(rows)), [_short(row["setting"]) for row in rows], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.3)
        axes.legend(loc="upper left", fontsize=7)
    machine = result["machine"]
    on = f"{machine['device']}, {machine['cores']} cores, {machine['backend']}"
    figure.suptitle(f"{model} on {on}; {result['date'][:10]}, load before {result['load_before']:.1f}", fontsize=9)
    figure.savefig(path)


def _short(setting: str) -> str:
    """What tells a setting from others of its subject."""
    words = setting.removesuffix(", context 0").replace(", context", "").split()
    return words[0] if words[0].isdigit() else "\n".join(words)


def draw_real(path: Path) -> None:
    """Bits per weight against KL, one line a method, a panel for each kind of judged text."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharex=True, sharey=True)
    for axes, (name, kind) in zip(panels, KINDS.items(), strict=True):
        by_form = {row["form"]: row for row in newest(name)["rows"]}
        weights = by_form["4bit-min-max"]["bytes"] / 4.5  # of a bit each, with scales and biases of groups of 64
        for (method, forms), color, marker in zip(METHODS.items(), COLORS, MARKERS, strict=False):
            measured = [by_form[form] for form in forms if form in by_form]
            points = sorted((row["bytes"] / weights, row["kl"]) for row in measured)
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=method)
        axes.set_title(f"{by_form['4bit-min-max']['n_tokens']:,} tokens {kind}", fontsize=9)
        axes.set_xlabel("bits per weight")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_yscale("log")
    panels[0].set_ylabel("KL to bfloat16, nats a token")
    panels[0].legend(loc="upper right", fontsize=8)
    figure.suptitle("Qwen2.5-Coder-0.5B-Instruct on what QwQ-32B-Preview wrote", fontsize=9)
    figure.savefig(path)


def draw_recipes(path: Path) -> None:
    """Bytes against equations solved, one line a method."""
    data = newest("recipes")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    sizes = data["gb_of_the_32b"]
    for series, color, marker in zip(data["series"], COLORS, MARKERS, strict=True):
        names = sorted(series["solved"], key=lambda name: sizes[name])
        axes.plot(
            [sizes[name] for name in names],
            [series["solved"][name] for name in names],
            linestyle="-" if series["name"] in CONNECTED else "none",
            color=color,
            marker=marker,
            label=series["name"],
        )
    axes.set_xlabel("size of the 32B in the same format, GB")
    axes.set_ylabel(f"held-out equations solved of {data['n_problems']}")
    axes.set_title(f"Measured on {data['model']}", fontsize=10)
    axes.set_ylim(-10, 520)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path)


def draw_trace(path: Path) -> None:
    """One run of the bundled model: where it was unsure, and what it answered."""
    import qwq_mlx
    from qwq_mlx.pocket import FOLDER

    trace = qwq_mlx.load(FOLDER).generate(QUESTION, sampling=qwq_mlx.Sampling(temperature=0.7, seed=1))
    qwq_mlx.plot_trace(trace, path)


if __name__ == "__main__":
    sys.exit(main())
