"""Where a text states an answer, by token: the candidates that a trace goes through on its way.

Does not: choose one (`split` does), or report that one returns too often (`loops` does).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwq_mlx.reasoning.answer import MAX_LINE, normalise, stated

__all__ = ["Candidate", "candidates"]

_BOX = re.compile(r"\\boxed\{([^{}]{1,80})\}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A stated answer, normalised, and the token whose text ended its line."""

    index: int
    value: str


def candidates(texts: Sequence[str]) -> list[Candidate]:
    """The answers that lines state, a box before words. texts: what each token let out."""
    answers: list[Candidate] = []
    line = ""
    for index, text in enumerate((*texts, "\n")):
        line += text
        if "\n" not in text:
            continue
        *whole, line = line.split("\n")
        for each in whole:
            boxes = _BOX.findall(each)
            value = boxes[-1] if boxes else stated(each.strip()[-MAX_LINE:])
            if value is not None:
                answers.append(Candidate(min(index, max(len(texts) - 1, 0)), normalise(value)))
    return answers
