"""What a splitter finds and keeps: the `Split` of a text, a `Candidate` for its answer, a `Place` in it.

Does not: look for anything (`split` does).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Candidate", "Kind", "Place", "Segment", "Split"]

Segment = Literal["thinking", "answer"]
Kind = Literal["heading", "tag", "box", "closed", "sentence", "code", "paragraph", "none"]

MAX_CAPTURED = 16_384  # characters of a conclusion that are kept to find a value without a box in it

# How often an answer of each kind is the one that the output goes on to give: measured where outputs are cut anywhere,
# 0.91 for sentences and 0.65 for choices named in the last paragraph; rounded down.
_SURE: dict[Kind, float] = {
    "heading": 0.98,
    "tag": 0.95,
    "box": 0.9,
    "closed": 0.9,
    "sentence": 0.85,
    "code": 0.7,
    "paragraph": 0.5,
    "none": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where the answer is.

    thinking, conclusion: (start, end) in token indices, end not included; conclusion is None where the text never
    concludes. thinking_chars, conclusion_chars: the same in characters, without the thinking's own tags.
    answer: the extracted value as written (a box's or tag's content, a stated value), None where there is none.
    confidence: 0 to 1, how sure it is that this is the model's last word. kind: what it was told by.
    is_revised: the text went on to doubt the answer without giving another.
    """

    thinking: tuple[int, int]
    thinking_chars: tuple[int, int]
    conclusion: tuple[int, int] | None = None
    conclusion_chars: tuple[int, int] | None = None
    answer: str | None = None
    confidence: float = 0.0
    kind: Kind = "none"
    is_revised: bool = False


@dataclass(slots=True)
class Place:
    """A character and the token that holds it; token is None until that character arrives."""

    char: int
    token: int | None


@dataclass(slots=True)
class Candidate:
    """What may be the answer: where its conclusion starts, its value, and the end of its last mark."""

    kind: Kind
    place: Place
    end: int
    value: str | None = None
    text: list[str] = field(default_factory=list)
    n_captured: int = 0
    is_revised: bool = False
    part: int = 0  # of a question in several parts, the one that the last box answered
    is_explained: bool = False  # what follows only explains it

    def capture(self, text: str) -> None:
        """Keep the beginning of what follows: the answer may stand there without a box."""
        if self.n_captured < MAX_CAPTURED:
            self.text.append(text)
            self.n_captured += len(text)

    @property
    def captured(self) -> str:
        """What follows, cut to the same length however it arrived."""
        return "".join(self.text)[:MAX_CAPTURED]

    def confidence(self, *, is_far: bool) -> float:
        """How sure it is that this is the model's last word, 0 to 1. is_far: much text follows it."""
        sure = _SURE[self.kind]
        if self.value is None:
            sure *= 0.2
        if self.is_revised:
            sure *= 0.5
        if self.kind != "heading" and is_far:
            sure *= 0.3 if self.kind == "sentence" else 0.7
        return round(sure, 3)
