"""End a run that saves itself every 3 tokens at random points, and go on from its file every time.

    python scripts/kill_runs.py --model FOLDER [--kills 100] [--tokens 300] [--seed 0] [--signals KILL TERM HUP]

The run is `python -m qwq_mlx.generate --save FILE --save-every 3`, ended by the signals in turns, a random part of its
length after its first checkpoint. Counts, as one JSON line: signals sent, files that were whole, runs that went on to
the very ids of an undisturbed run, exit codes, and temporary files that a kill left (the next run
removes them).
Exit code 1 where one file was not whole, one id differed, or a signal that can be caught gave another exit code than
128 and its number.

Does not: cut power (fsync is trusted).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from qwq_mlx.errors import QwqError
from qwq_mlx.generate.checkpoint import read_checkpoint
from qwq_mlx.generate.options import Limits, Sampling
from qwq_mlx.generate.reasoner import load

_SEED = 4


def main() -> int:
    """Run the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM", "HUP", "INT"), default=["KILL"])
    options = parser.parse_args()
    reasoner = load(options.model)
    run = reasoner.stream("x", sampling=Sampling(temperature=1.0, seed=_SEED), limits=Limits(max_tokens=options.tokens))
    whole = [step.id for step in run]
    draws, counts, codes = random.Random(options.seed), Counter(kills=0, whole=0, same_ids=0, left_behind=0), Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        length_s = _ended(options, path, None, wait_s=0.0)[1]
        sys.stderr.write(f"{len(whole)} tokens, {length_s:.2f} s from the first checkpoint on\n")
        while counts["kills"] < options.kills:
            path.unlink(missing_ok=True)
            name = options.signals[counts["kills"] % len(options.signals)]
            code, _ = _ended(options, path, signal.Signals[f"SIG{name}"], wait_s=draws.uniform(0.0, length_s))
            if code == 0 or (name != "KILL" and code < 0):
                continue  # it was done before, and answers no signals any more
            counts["kills"] += 1
            codes[f"{name} {code}"] += 1
            counts["left_behind"] += len(list(Path(folder).glob("*.tmp"))) + len(list(Path(folder).glob(".*.tmp")))
            try:
                n_saved = len(read_checkpoint(path)[0]["steps"])
            except QwqError as error:
                sys.stderr.write(f"{error}\n")
                continue
            counts["whole"] += 1
            counts["same_ids"] += whole[:n_saved] + [step.id for step in reasoner.resume(path)] == whole
            sys.stderr.write(f"{name}, exit {code}, {n_saved} tokens saved: {dict(counts)}\n")
    print(json.dumps({**counts, "exit_codes": codes, "tokens": len(whole)}))
    expected = {f"{name} {_code_of(name)}" for name in options.signals}
    return 0 if counts["whole"] == counts["same_ids"] == counts["kills"] and set(codes) <= expected else 1


def _code_of(name: str) -> int:
    number = signal.Signals[f"SIG{name}"]
    return -number if name == "KILL" else 128 + number


def _ended(options: argparse.Namespace, path: Path, number: int | None, *, wait_s: float) -> tuple[int, float]:
    """One run, ended wait_s after its first checkpoint; its exit code and the seconds it went on from there."""
    command = [sys.executable, "-m", "qwq_mlx.generate", "--model", options.model, "--prompt", "x", "--temp", "1"]
    command += ["--seed", str(_SEED), "--max-tokens", str(options.tokens), "--save", str(path), "--save-every", "3"]
    process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not path.is_file() and process.poll() is None:
        time.sleep(0.002)
    began_s = time.monotonic()
    if number is not None:
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    return process.wait(), time.monotonic() - began_s


if __name__ == "__main__":
    sys.exit(main())
