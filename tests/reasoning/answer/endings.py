"""Endings of outputs with the right answers, from JSON lines, and how a splitter reads them.

A third is held out by a hash of the text: rules are not changed by looking at those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from splitting import split

from qwq_mlx.reasoning.answer import Split, compare

DATA = Path(__file__).resolve().parent.parent / "data"
START = "Let me think about it. First I look at the terms.\n\nHmm, 7 is a prime.\n\n"
Verdict = Literal["right", "missed", "wrong"]
Ending = Mapping[str, Any]


def read_endings(files: Sequence[Path] = ()) -> list[Ending]:
    """The endings of the given files, by default of all in `tests/reasoning/data`."""
    rows = []
    for file in files or sorted(DATA.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            rows.append({"id": f"{file.stem}-{number:03}", "answer": row.get("expected"), **row})
    return rows


def is_held_out(ending: Ending) -> bool:
    """Whether rules must not be changed by looking at this ending."""
    return hashlib.sha256(ending["text"].encode()).digest()[0] % 3 == 0


def read(ending: Ending, *, start: str = START) -> Split:
    """What a splitter finds in it. start: the thinking before it."""
    is_tagged = ending.get("profile") == "qwq-tagged"
    text = ending["text"] if is_tagged else start + ending["text"]
    return split(text, tagged=is_tagged, prompt=ending["prompt"], is_ended=ending.get("is_ended", True), size=5)


def judge(ending: Ending, answer: str | None) -> Verdict:
    """Whether an answer is what a careful reader finds: by value, or as written where the ending says so."""
    expected = ending["answer"]
    if answer is None:
        return "right" if expected is None else "missed"
    if expected is None:
        return "wrong"
    is_right = answer == expected or (not ending.get("as_written") and compare(answer, expected))
    return "right" if is_right else "wrong"
