"""Score the rules that read answers on endings written by hand: the part that rules are tuned on, and a held-out third.

    python scripts/score_endings.py [FILE.jsonl ...] [--show-held-out]

Without files it scores those of tests/reasoning/data (see the README there for their fields). Prints indented JSON:
counts for both parts, the endings of the tuned part that are not read right, and with --show-held-out those of the
other. Rules are not to be changed by looking at held-out endings: once seen, they no longer tell how a rule does on
texts that it was not made for.

Does not: run a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "reasoning" / "answer"))  # how to judge

from endings import START, is_held_out, judge, read, read_endings

from qwq_mlx.reasoning.answer import SURE


def main() -> None:
    """Parse, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines (default: tests/reasoning/data/*.jsonl)")
    parser.add_argument("--bare", action="store_true", help="put no thinking before the endings")
    parser.add_argument("--show-held-out", action="store_true", help="show held-out endings too: they are spent then")
    options = parser.parse_args()
    rows = [(is_held_out(row), row) for row in read_endings(options.files)]
    start = "" if options.bare else START
    parts = {
        "tuned": score([row for held_out, row in rows if not held_out], start, is_shown=True),
        "held_out": score([row for held_out, row in rows if held_out], start, is_shown=options.show_held_out),
    }
    print(json.dumps(parts, ensure_ascii=False, indent=2))


def score(rows: list[Any], start: str, *, is_shown: bool) -> dict[str, Any]:
    """Counts of what was read right, missed or wrong; of wrong answers also how many at 0.85 and more."""
    counts: Counter[str] = Counter()
    failures = []
    for row in rows:
        split = read(row, start=start)
        verdict = judge(row, split.answer)
        is_sure = split.confidence >= SURE
        counts[verdict] += 1
        counts["wrong_at_0.85_and_more"] += verdict == "wrong" and is_sure
        counts["at_0.85_and_more"] += is_sure
        if verdict != "right":
            found = {"found": split.answer, "confidence": split.confidence, "rule": split.rule, "verdict": verdict}
            failures.append({"id": row["id"], "text": row["text"], "answer": row["answer"], **found})
    names = ("right", "missed", "wrong", "wrong_at_0.85_and_more", "at_0.85_and_more")
    result: dict[str, Any] = {"endings": len(rows), **{name: counts[name] for name in names}}
    if is_shown:
        result["not_right"] = failures
    return result


if __name__ == "__main__":
    main()
