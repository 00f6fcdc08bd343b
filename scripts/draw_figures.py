"""Draw the figures of the README and of docs/benchmarks.md into docs/figures.

    python scripts/draw_figures.py [real | recipes | trace]

real: bits per weight against KL on a real model, from what `measure_real.py` printed. recipes: bytes against equations
solved, off the pocket's training grid. Both from the newest file of that name in benchmarks/; docs/benchmarks.md has
them as tables. trace: one Game of 24 by the bundled pocket model, drawn by
`qwq_mlx.plot_trace`. Needs the extra "plot".

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
sys.path.insert(0, str(ROOT))

QUESTION = "Use the numbers 2, 5, 7, 9 with + - * / to get 24."
COLORS = ("#1f4e79", "#c0392b", "#2e8b57", "#888888", "#b07d2b", "#8e44ad", "#444444")
MARKERS = "osDxv^+"
METHODS = {
    "min-max (mlx_lm.convert)": ("3mm.toml", "4bit-min-max", "5mm.toml"),
    "least squares (default)": ("3bit", "4bit", "5bit"),
    "--target-size": ("size-of-3bit", "size-of-4bit"),
    "--calibrate": ("3bit+calibrate", "4bit+qwq"),
    "--target-size --calibrate": ("size-of-4bit+qwq",),
}
"""Of draw_real: method -> forms in the results."""
CONNECTED = ("our recipes", "ours, --target-size")  # of the others there are only 2, 3 and 4 bits


def main() -> int:
    """Draw what was asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    draw = {"real": draw_real, "recipes": draw_recipes, "trace": draw_trace}
    parser.add_argument("figure", nargs="?", choices=draw, help="the one to draw (default: all)")
    chosen = parser.parse_args().figure
    # Text stays text, and date and ids are fixed: a figure is small and changes only with its numbers.
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "qwq_mlx"
    for name in [chosen] if chosen else draw:
        path = FIGURES / f"{name}.svg"
        draw[name](path)
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def newest(name: str) -> dict[str, Any]:
    """The results of that name with the latest date."""
    results: dict[str, Any] = json.loads(max((ROOT / "benchmarks").glob(f"*-{name}.json")).read_text(encoding="utf-8"))
    return results


def draw_real(path: Path) -> None:
    """Bits per weight against KL, one line a method."""
    rows = newest("real-forms-0.5b")["rows"]
    by_form = {Path(row["form"]).name: row for row in rows}
    weights = by_form["4bit-min-max"]["bytes"] / 4.5  # of a bit each, with scales and biases of groups of 64
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (method, forms), color, marker in zip(METHODS.items(), COLORS, MARKERS, strict=False):
        points = sorted((by_form[form]["bytes"] / weights, by_form[form]["kl"]) for form in forms)
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=method)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("KL to bfloat16, nats a token")
    axes.set_title(
        f"Qwen2.5-Coder-0.5B-Instruct, {rows[0]['n_tokens']:,} tokens that QwQ-32B-Preview wrote", fontsize=9
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper right", fontsize=9)
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
