"""From a command to its first token with the weights on disk and not in the system's cache, beside mlx-lm.

    python scripts/measure_first_token.py --model FOLDER [--repeats 5] [--warm]

Each contestant is a fresh process, in turns, each round beginning with another one: our `generate` as it is, the same
without reading shards ahead (`files/read_ahead.py`), and mlx_lm.generate. Before each the files of the folder are
dropped from the page cache (posix_fadvise, so Linux only; the Python libraries stay in it). Beside them the time of a
plain read of the weight files, dropped likewise: what the disk gives. Prints one JSON object.

Does not: drop files that another process maps, or say what a quiet machine does on a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_QUESTION = "What is 3 + 4?"
_BLOCK_BYTES = 8 << 20
_WITHOUT = """
import sys
from qwq_mlx.generate import load_plan
load_plan.read_ahead = lambda paths: None
from qwq_mlx.generate.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="conversion or checkpoint")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--warm", action="store_true", help="leave the files in the cache")
    options = parser.parse_args()
    ours = ["--model", str(options.model), "--max-tokens", "1", "-p", _QUESTION, "--quiet"]
    theirs = ["--model", str(options.model), "--max-tokens", "1", "--prompt", _QUESTION]
    contestants: dict[str, Callable[[], None]] = {
        "reading the files": lambda: _read(options.model),
        "qwq_mlx": lambda: _run(["-m", "qwq_mlx.generate", *ours]),
        "qwq_mlx, not read ahead": lambda: _run(["-c", _WITHOUT, *ours]),
        "mlx-lm": lambda: _run(["-m", "mlx_lm.generate", *theirs]),
    }
    names, seconds = list(contestants), {name: list[float]() for name in contestants}
    for round_number in range(options.repeats + 1):  # the first warms the libraries
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            if not options.warm:
                _drop(options.model)
            started = time.perf_counter()
            contestants[name]()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
            print(f"round {round_number}: {name}: {time.perf_counter() - started:.2f} s", file=sys.stderr)
    n_bytes = sum(path.stat().st_size for path in _shards(options.model))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    result = {
        "model": options.model.name,
        "bytes": n_bytes,
        "is_cold": not options.warm,
        "load_average": os.getloadavg()[0],
        "seconds": {name: [round(value, 3) for value in each] for name, each in seconds.items()},
        "median_s": {name: round(value, 3) for name, value in medians.items()},
        "disk_bytes_per_s": round(n_bytes / medians["reading the files"]),
        "fraction_of_the_disk": {
            name: round(medians["reading the files"] / value, 3) for name, value in medians.items()
        },
    }
    print(json.dumps(result))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _drop(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(folder: Path) -> None:
    block = bytearray(_BLOCK_BYTES)
    for path in _shards(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


if __name__ == "__main__":
    _main()
