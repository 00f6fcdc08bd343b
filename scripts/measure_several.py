"""Several recipes in one pass beside a conversion for each: wall time, CPU time, memory and source bytes read.

    python scripts/measure_several.py [--layers 1] [--rounds 1] [--recipes 4bit 6bit 3bit] [--tiny]

The source is QwQ-shaped with random weights (scripts/qwq_shaped.py) and lies in the page cache. For the first 2, 3 ...
of the recipes: one command with all of them, then a command for each, in turns; each a process of its own into new
folders, with everything that a conversion does but measuring quality. Bytes read are what the process asked the system
for (Linux), the output's reading back included. The wall ratio of a busy machine says little, CPU time more; the
`others` of a row are the cores that other processes used meanwhile. The table goes to stderr as it grows, one JSON
object to stdout.

Does not: fetch, calibrate or compare quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from measure_conversion import Run, make_source, run, warm  # noqa: E402 - the path must be set first

COMMAND = """
import re, sys
from pathlib import Path
from qwq_mlx.convert.__main__ import main
code, io = main(sys.argv[2:]), Path("/proc/self/io")
read = int(re.search(r"rchar: (\\d+)", io.read_text())[1]) if io.exists() else 0
with open(sys.argv[1], "a") as file:
    print(read, file=file)
sys.exit(code)
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="of the source (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of which medians are taken (default: %(default)s)")
    parser.add_argument("--recipes", nargs="+", default=["4bit", "6bit", "3bit"], help="(default: 4bit 6bit 3bit)")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="several-", dir=options.work) as home:
        source = make_source(Path(home), options.layers, options)
        source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        rows = [
            compare(Path(home), source, options.recipes[:count], options.rounds)
            for count in range(2, len(options.recipes) + 1)
        ]
    print(json.dumps({"layers": options.layers, "source_bytes": source_bytes, "rows": rows}))
    return 0


def compare(home: Path, source: Path, recipes: Sequence[str], n_rounds: int) -> dict[str, Any]:
    """Together and apart: medians over the rounds; of runs apart times and bytes add up, the peak is the highest."""
    rounds: list[dict[str, Any]] = []
    for _ in range(n_rounds):
        together, read = convert(home, source, recipes)
        apart = [convert(home, source, [recipe]) for recipe in recipes]
        rounds.append(
            {
                "together": summed([together], [read]),
                "apart": summed([each for each, _ in apart], [read for _, read in apart]),
            }
        )
    row: dict[str, Any] = {"recipes": list(recipes)}
    for name in ("together", "apart"):
        row[name] = {key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]}
    for key in ("wall_s", "cpu_s", "peak_bytes", "read_bytes"):
        row[f"{key}_ratio"] = round(row["together"][key] / max(row["apart"][key], 1e-9), 3)
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def convert(home: Path, source: Path, recipes: Sequence[str]) -> tuple[Run, int]:
    """One command with these recipes; what it took, and the bytes that it read."""
    made, counted = home / "made", home / "read.txt"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    counted.unlink(missing_ok=True)
    warm(source)
    pairs = [part for name in recipes for part in ("--recipe", name, "--output", str(made / Path(name).stem))]
    command = [sys.executable, "-c", COMMAND, str(counted), "--quiet", "--no-quality", "--source", str(source), *pairs]
    return run(command, made), int(counted.read_text())


def summed(runs: Sequence[Run], read: Sequence[int]) -> dict[str, float]:
    """Of commands one after another."""
    return {
        "wall_s": round(sum(each.wall_s for each in runs), 2),
        "cpu_s": round(sum(each.cpu_s for each in runs), 2),
        "peak_bytes": max(each.peak_bytes for each in runs),
        "read_bytes": sum(read),
        "others": max(each.others or 0.0 for each in runs),
    }


if __name__ == "__main__":
    sys.exit(main())
