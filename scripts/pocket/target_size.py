"""What a target size is worth: bits chosen by `--target-size` beside the uniform recipe of the same bytes, by KL.

    python scripts/pocket/target_size.py [--tokens 2048] [--on-grid]

For 2.5 to 6 bits: uniform least squares where there is such a recipe, and a target size of exactly its bytes; between
them sizes that no uniform recipe has. The source is the pocket off the 4-bit grid that it was trained on (see
measure_recipes.py), the text held-out traces. A table goes to stderr, one JSON object to stdout.

Does not: measure the 32B, or run on Metal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from measure_recipes import add_divergence, off_grid, write_texts  # noqa: E402

from qwq_mlx.convert import convert_checkpoint, convert_recipes  # noqa: E402
from qwq_mlx.convert.options import ConvertOptions  # noqa: E402
from qwq_mlx.pocket import FOLDER  # noqa: E402

UNIFORM = {"2bit": 2, "3bit": 3, "4bit": 4, "5bit": 5, "6bit": 6}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of held-out traces (default: %(default)s)")
    parser.add_argument("--on-grid", action="store_true", help="on the pocket as it was trained")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = FOLDER if options.on_grid else off_grid(work / "off-grid")
        rows = measure_all(source, work, options.tokens)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
    print(json.dumps({"text_positions": options.tokens, "rows": rows}))
    return 0


def measure_all(source: Path, work: Path, n_positions: int) -> list[dict[str, Any]]:
    """Rows of a name, bits per weight, bytes and KL, by size."""
    quiet = ConvertOptions(quality=False)
    done = list(convert_recipes(source, {work / name: name for name in UNIFORM}, quiet))
    sizes = [each.output_bytes for each in done]
    between = [(low + high) // 2 for low, high in itertools.pairwise(sizes)]
    for n_bytes in sorted([*sizes[1:], *between]):
        folder = work / f"target-{n_bytes}"
        done.append(convert_checkpoint(source, folder, recipe="4bit", target_bytes=n_bytes, quality=False))
    done.sort(key=lambda each: each.output_bytes)
    rows: list[dict[str, Any]] = [
        {"name": each.output.name, "bits_per_weight": round(each.bits_per_weight, 3), "bytes": each.output_bytes}
        for each in done
    ]
    add_divergence(source, rows, [each.output for each in done], write_texts(work)["held-out"], n_positions)
    return rows


if __name__ == "__main__":
    sys.exit(main())
