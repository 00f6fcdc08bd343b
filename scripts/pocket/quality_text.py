"""Write the text that conversions of the pocket are measured on: held-out problems with the traces that solve them.

    PYTHONPATH=.:scripts python -m pocket.quality_text > qwq_mlx/quality/texts/pocket.jsonl

The same seed gives the same bytes; a test compares them with the file.

Does not: run the model; what it would write itself is not in the text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from pocket import data

__all__ = ["lines"]

SEED = 11
_KINDS = {"parentheses": 3, "game24": 3, "letters": 2, "arithmetic": 2}


def lines() -> Iterator[str]:
    """One conversation a line, the kinds in turn."""
    drawn = {kind: data.held_out_problems(kind, count, seed=SEED) for kind, count in _KINDS.items()}
    for place in range(max(_KINDS.values())):
        for kind in _KINDS:
            if place < len(drawn[kind]):
                problem = drawn[kind][place]
                reply = data.solve(problem, random.Random(f"quality {SEED} {problem.given}"))
                yield json.dumps({"question": problem.question, "reply": reply}, ensure_ascii=False)


if __name__ == "__main__":
    for line in lines():
        print(line)
