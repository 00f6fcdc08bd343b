"""What a target size is worth: bits chosen by `--target-size` beside recipes of the package of the same bytes, by KL.

    python scripts/pocket/target_size.py [--texts 4] [--first-seed 21] [--only 2bit-g32 ...] [--problems 0] [--on-grid]

For each recipe of 2.5 to 6.5 bits per weight: the recipe, and a target size of exactly its bytes. The source is the
pocket off the 4-bit grid that it was trained on (see measure_recipes.py), the texts held-out traces of other draws.
Below 4 bits a few tokens carry most of the KL, so one text of a thousand tokens may turn an order around: see the KL of
each text beside their mean, and with --problems how many held-out equations of 9 numbers are solved. Rows go to stderr
as they come, one JSON object to stdout.

Does not: measure the 32B, or run on Metal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from measure_recipes import add_divergence, add_solved, off_grid, say, write_held_out  # noqa: E402

from qwq_mlx.convert import convert_checkpoint  # noqa: E402
from qwq_mlx.pocket import FOLDER  # noqa: E402

RECIPES = (
    *("2bit", "2bit-g32", "mixed_2_6", "3bit", "mixed_3_4", "mixed_3_6", "3bit-g32"),
    *("4bit-g128", "4bit", "mixed_4_6", "4bit-g32", "5bit", "6bit"),
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of each text (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=4, help="draws of held-out traces (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=21, help="of these draws (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, metavar="RECIPE", help="(default: all)")
    parser.add_argument("--problems", type=int, default=0, help="equations to solve with each (default: %(default)s)")
    parser.add_argument("--on-grid", action="store_true", help="on the pocket as it was trained")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = FOLDER if options.on_grid else off_grid(work / "off-grid")
        rows = convert_all(source, work, options.only)
        folders = [work / row["name"] for row in rows]
        for number in range(options.texts):
            text = write_held_out(work / f"text-{number}.jsonl", seed=options.first_seed + number)
            one: list[dict[str, Any]] = [{} for _ in rows]
            add_divergence(source, one, folders, text, options.tokens)
            for row, found in zip(rows, one, strict=True):
                row["kl_of_texts"].append(found["kl"])
                row["n_tokens"] += found["n_tokens"]
                row["kl"] = sum(row["kl_of_texts"]) / len(row["kl_of_texts"])
                say(row)
        for row, folder in zip(rows, folders, strict=True):
            add_solved(row, folder, options.problems)
            say(row)
    print(json.dumps({"text_positions": options.tokens, "rows": rows}))
    return 0


def convert_all(source: Path, work: Path, recipes: list[str]) -> list[dict[str, Any]]:
    """A row for each recipe and for the target size of its bytes, whose bits are fitted by least squares."""
    rows: list[dict[str, Any]] = []
    for name in recipes:
        known = convert_checkpoint(source, work / name, recipe=name, quality=False)
        target = work / f"as-{name}"
        chosen = convert_checkpoint(source, target, recipe="4bit", target_bytes=known.output_bytes, quality=False)
        rows += [
            {"name": each.output.name, "bits_per_weight": round(each.bits_per_weight, 3), "n_tokens": 0}
            for each in (known, chosen)
        ]
    for row in rows:
        row["kl_of_texts"] = []
    return rows


if __name__ == "__main__":
    sys.exit(main())
