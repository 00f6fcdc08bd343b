"""Kill a batch of questions at random points until it is done, many times over, and count what was lost or done twice.

    python scripts/kill_batch.py MODEL [--kills 100] [--questions 12] [--width N] [--seed 0] [--signals KILL TERM]
                                       [--evaluate]

A process answers questions with few tokens each and is killed (SIGKILL, or the signals named, in turns) after a random
time, most of them while it answers or writes; the next one goes on. When a file is done it is compared with one that
was never interrupted and took the questions one by one (all but "measured"), and the next file is begun. Prints one
JSON object with the counts; exit code 1 where any file differs.

MODEL should have a chat template that is known (the pocket has): any other starts a process in each run.

Does not: cut power (fsync is trusted), or share its output with a second process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwq_mlx.evaluate import __main__ as evaluation
from qwq_mlx.generate import __main__ as command
from qwq_mlx.model.upstream import import_mlx_lm


def _start(model: str, source: Path, output: Path, *, evaluates: bool, width: int | None) -> int:
    """The command in a child that has all imports already, so that it is killed at work and not while it starts."""
    asked = ["--task", str(source), "--output", str(output.parent), "--no-verify"]
    given = asked if evaluates else ["--input", str(source), "--output", str(output)]
    settings = ["--model", model, "--seed", "5", "--temp", "1", "--max-tokens", "12", "--quiet"]
    settings += [] if width is None else ["--width", str(width)]
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the report of an evaluation
        os._exit((evaluation if evaluates else command).main([*given, *settings]))
    return child


def _ended(child: int, flags: int = 0) -> int | None:
    """Its exit code, or minus the signal that ended it; None while it runs."""
    pid, status = os.waitpid(child, flags)
    return os.waitstatus_to_exitcode(status) if pid else None


def _compared(output: Path, *, evaluates: bool) -> list[object]:
    if evaluates:
        [rows] = output.parent.glob("*.rows.jsonl")
        return [path.read_bytes() for path in (rows, output.parent / "report.json", output.parent / "report.html")]
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name != "measured"} for line in lines]


def main() -> int:
    """Run until there were as many kills as asked for."""
    parser = argparse.ArgumentParser(description="Kill a batch at random points and count what was lost.")
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--width", type=int, help="questions side by side (default: as the command chooses)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM", "HUP"), default=["KILL"])
    parser.add_argument("--evaluate", action="store_true", help="kill an evaluation, and compare its rows and report")
    options = parser.parse_args()
    for module in ("mlx_lm.models.qwen2", "mlx_lm.models.cache"):
        import_mlx_lm(module)  # imported here, run only in the children: MLX does not survive a fork once it computed
    draw = random.Random(options.seed)
    counts = dict.fromkeys(("kills", "kills_while_answering", "torn_lines", "files", "files_that_differ"), 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        source.write_text(
            "".join(f'{{"question": "number {i}", "id": "q{i}", "answer": "{i}"}}\n' for i in range(options.questions))
        )
        name_of = f"{{}}/{Path(options.model).name}.traces.jsonl" if options.evaluate else "{}.jsonl"
        most_s, expected = 0.0, []
        # an evaluation tells its width; the second run has the files in memory, as the runs to come
        for place, width in enumerate((options.width if options.evaluate else 1, options.width)):
            whole, began_s = folder / name_of.format(f"whole{place}"), time.monotonic()
            if _ended(_start(options.model, source, whole, evaluates=options.evaluate, width=width)):
                sys.exit("the unbroken run failed")
            most_s = time.monotonic() - began_s
            expected.append(_compared(whole, evaluates=options.evaluate))
        if expected[0] != expected[1]:
            sys.exit("the unbroken runs of two widths differ")
        while counts["kills"] < options.kills:
            counts["files"] += 1
            output = folder / name_of.format(f"out{counts['files']}")
            while True:
                started_s = time.monotonic()
                number = signal.Signals[f"SIG{options.signals[counts['kills'] % len(options.signals)]}"]
                child = _start(options.model, source, output, evaluates=options.evaluate, width=options.width)
                code = None
                n_before = output.stat().st_size if output.exists() else 0
                if counts["kills"] < options.kills:
                    deadline = started_s + draw.uniform(0.0, most_s)
                    while code is None and time.monotonic() < deadline:
                        time.sleep(0.0005)
                        code = _ended(child, os.WNOHANG)
                    if code is None:
                        os.kill(child, number)
                code = _ended(child) if code is None else code
                if code == 0:
                    break
                if code not in (-number, 128 + number):  # a signal that comes before the command listens ends it
                    sys.exit(f"{output}: the command ended with {code} by itself")
                counts["kills"] += 1
                sys.stderr.write(f"{counts}\n")
                data = output.read_bytes() if output.exists() else b""
                counts["kills_while_answering"] += len(data) != n_before
                counts["torn_lines"] += not data.endswith(b"\n") and bool(data)
            counts["files_that_differ"] += _compared(output, evaluates=options.evaluate) != expected[0]
    print(json.dumps({**counts, "questions": options.questions, "width": options.width}))
    return 1 if counts["files_that_differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
