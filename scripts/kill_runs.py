"""Kill a run that is kept on disk (Keeper, every 3 tokens) at random points, and go on from its file every time.

    python scripts/kill_runs.py --model FOLDER [--kills 100] [--tokens 300] [--seed 0]

Counts, as one JSON line: kills, files that were whole, runs that went on to the very ids of an undisturbed run, and
temporary files left behind. Exit code 1 where one file was not whole or one id differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwq_mlx.errors import QwqError
from qwq_mlx.generate.checkpoint import read_checkpoint
from qwq_mlx.generate.keeping import Keeper
from qwq_mlx.generate.options import Limits, Sampling, Thinking
from qwq_mlx.generate.reasoner import Reasoner, load
from qwq_mlx.generate.run import Run


def main() -> int:
    """Run the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reasoner = load(options.model)
    whole = [step.id for step in _started(reasoner, options.tokens)]
    draws, counts = random.Random(options.seed), {"kills": 0, "whole": 0, "same_ids": 0, "left_behind": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        for _ in range(options.kills):
            path.unlink(missing_ok=True)
            _kill(reasoner, path, options.tokens, wait_s=draws.random())
            counts["kills"] += 1
            counts["left_behind"] += len(list(Path(folder).glob("*.tmp"))) + len(list(Path(folder).glob(".*.tmp")))
            try:
                n_saved = len(read_checkpoint(path)[0]["steps"])
            except QwqError as error:
                sys.stderr.write(f"{error}\n")
                continue
            counts["whole"] += 1
            counts["same_ids"] += whole[:n_saved] + [step.id for step in reasoner.resume(path)] == whole
            sys.stderr.write(f"killed with {n_saved} tokens saved: {counts}\n")
    print(json.dumps(counts))
    return 0 if counts["whole"] == counts["same_ids"] == counts["kills"] else 1


def _started(reasoner: Reasoner, n_tokens: int) -> Run:
    return reasoner.stream(
        "x", sampling=Sampling(temperature=1.0, seed=4), limits=Limits(max_tokens=n_tokens), thinking=Thinking()
    )


def _kill(reasoner: Reasoner, path: Path, n_tokens: int, *, wait_s: float) -> None:
    """One run in a process of its own, killed wait_s (a part of its length) after its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", str(reasoner.model.folder), str(path), str(n_tokens)]
    )
    while not path.is_file() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(wait_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _child(folder: str, path: str, n_tokens: int) -> int:
    run = _started(load(folder), n_tokens)
    with Keeper(Path(path), every=3, warn=sys.stderr.write) as keeper:
        for _ in keeper.steps(run):
            pass
        time.sleep(5)
    return 0


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[2:4], int(sys.argv[4])) if sys.argv[1:2] == ["--child"] else main())
