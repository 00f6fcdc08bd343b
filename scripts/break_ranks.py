"""End, or stop, one of two processes that hold the pocket together, at random moments, and see who is named, and when.

    python scripts/break_ranks.py [--points 20] [--seed 0]

For each rank and each of SIGKILL and SIGSTOP: --points runs, each hit at a moment between the first process's start and
the end of its answer. Prints one JSON line: named wrongly or not at all, the longest time until the command ended, and
processes that were left. Exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.cli.hosts import Launch
from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.errors import RankError

_MOST_S = 8.0  # of a run on a quiet machine


def main() -> int:
    """Parse, break, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, wrong, longest, n_runs, n_left = random.Random(options.seed), [], 0.0, 0, 0
    for rank in (0, 1):
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for _ in range(options.points):
                hit, named, seconds, left = False, None, 0.0, 0
                while not hit:  # an answer may have ended before its moment came
                    hit, named, seconds, left = _break(rank, number, rng.uniform(0.3, _MOST_S))
                n_runs, n_left, longest = n_runs + 1, n_left + left, max(longest, seconds)
                if named != rank:
                    wrong.append(f"{number.name} of {rank}: {named}")
                sys.stderr.write(f"{number.name} of process {rank}: named {named} after {seconds:.1f} s\n")
    print(json.dumps({"runs": n_runs, "wrong": wrong, "longest_s": round(longest, 1), "left": n_left}))
    return 1 if wrong or n_left else 0


def _break(rank: int, number: signal.Signals, after_s: float) -> tuple[bool, int | None, float, int]:
    """Whether the process still ran at that moment; who was named, seconds until then, and processes that were left."""
    arguments = ["--model", str(pocket_checkpoint()), "--temp", "0", "--max-tokens", "3000", "--on-loop", "off"]
    launch = Launch([*arguments, "--prompt", "-", "--no-save", "--quiet"], 2, text="Count.")
    hits: list[float] = []

    def later() -> None:
        time.sleep(after_s)
        process = launch._processes[rank]
        if process.poll() is None:
            hits.append(time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    thread = threading.Thread(target=later)
    thread.start()
    named = None
    try:
        launch.work()
    except RankError as error:
        named = int(str(error).split()[1])
    ended = time.monotonic()
    thread.join()
    left = sum(process.poll() is None for process in launch._processes)
    return bool(hits), named, max(0.0, ended - hits[0]) if hits else 0.0, left


if __name__ == "__main__":
    sys.exit(main())
