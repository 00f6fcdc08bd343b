"""Kill a batch of questions at random points until it is done, many times over, and count what was lost or done twice.

    python scripts/kill_batch.py MODEL [--kills 100] [--questions 12] [--seed 0]

A process answers questions with few tokens each and is killed with SIGKILL after a random time, most of them while it
answers or writes; the next one goes on. When a file is done it is compared with one that was never interrupted (all but
"measured"), and the next file is begun. Prints one JSON object with the counts; exit code 1 where any file differs.

MODEL should have a chat template that is known (the pocket has): any other starts a process for each question.

Does not: cut power (fsync is trusted), or share its output with a second process.
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

ROOT = Path(__file__).resolve().parent.parent


def _command(model: str, source: Path, output: Path) -> list[str]:
    given = ["--model", model, "--input", str(source), "--output", str(output)]
    settings = ["--seed", "5", "--temp", "1", "--max-tokens", "40", "--quiet"]
    return [sys.executable, "-m", "qwq_mlx.generate", *given, *settings]


def _compared(output: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name != "measured"} for line in lines]


def main() -> int:
    """Run until there were as many kills as asked for."""
    parser = argparse.ArgumentParser(description="Kill a batch at random points and count what was lost.")
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    counts = dict.fromkeys(("kills", "kills_while_answering", "torn_lines", "files", "files_that_differ"), 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        source.write_text("".join(f'{{"question": "number {i}", "id": "q{i}"}}\n' for i in range(options.questions)))
        whole, began_s = folder / "whole.jsonl", time.monotonic()
        subprocess.run(_command(options.model, source, whole), env=environment, check=True)
        most_s = time.monotonic() - began_s
        expected = _compared(whole)
        while counts["kills"] < options.kills:
            counts["files"] += 1
            output = folder / f"out{counts['files']}.jsonl"
            while True:
                process = subprocess.Popen(_command(options.model, source, output), env=environment)
                n_before = output.stat().st_size if output.exists() else 0
                if counts["kills"] < options.kills:
                    # starting takes most of the time, so wait for the first new line or for a while, then a random bit
                    deadline = time.monotonic() + draw.uniform(0.0, most_s)
                    while time.monotonic() < deadline and process.poll() is None:
                        if output.exists() and output.stat().st_size != n_before:
                            time.sleep(draw.expovariate(8.0))
                            break
                        time.sleep(0.0005)
                    process.kill()
                code = process.wait()
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    sys.exit(f"{output}: the command ended with {code} by itself")
                counts["kills"] += 1
                data = output.read_bytes() if output.exists() else b""
                counts["kills_while_answering"] += len(data) != n_before
                counts["torn_lines"] += not data.endswith(b"\n") and bool(data)
            counts["files_that_differ"] += _compared(output) != expected
    print(json.dumps({**counts, "questions": options.questions}))
    return 1 if counts["files_that_differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
