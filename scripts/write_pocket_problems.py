"""Held-out problems of the bundled model as a file for `python -m qwq_mlx.evaluate --task FILE --instruction ''`.

    python scripts/write_pocket_problems.py arithmetic=80 letters=40 > pocket.jsonl
    python scripts/write_pocket_problems.py game24=500 > game24.jsonl

Kinds are arithmetic, letters and game24; the same numbers and --seed give the same file.

Does not: write equations to put parentheses in, which no reference answer judges.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pocket.data import held_out_problems

from qwq_mlx.pocket.problems import Problem, evaluate

KINDS = ("arithmetic", "letters", "game24")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and print."""
    parser = argparse.ArgumentParser(description="Print held-out problems of the bundled model as JSON lines.")
    parser.add_argument("counts", nargs="+", metavar="KIND=N", help=f"kinds: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=19, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    for each in options.counts:
        kind, _, count = each.partition("=")
        if kind not in KINDS or not count.isdecimal():
            parser.error(f"{each!r} is no KIND=N of {', '.join(KINDS)}")
        for line in lines(kind, int(count), seed=options.seed):
            print(json.dumps(line))
    return 0


def lines(kind: str, count: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Problems of one kind as lines of a task file."""
    for problem in held_out_problems(kind, count, seed=seed):
        yield {"id": f"{kind} {problem.given}", "question": problem.question, "subject": kind, **_answer(problem)}


def _answer(problem: Problem) -> dict[str, Any]:
    if problem.kind == "game24":
        return {"numbers": [int(number) for number in problem.given.split()]}
    if problem.kind == "letters":
        letter, word = problem.given.split(" ", 1)
        return {"answer": str(word.lower().count(letter.lower()))}
    return {"answer": str(evaluate(problem.given))}


if __name__ == "__main__":
    sys.exit(main())
