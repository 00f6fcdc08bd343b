"""What a splitter returns and keeps: the `Split` of a text, a `Candidate` for its answer, a `Place` in it.

Does not: look for anything (`splitter` does), or decide between candidates (`rules` does).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwq_mlx.reasoning.answer.rule import Reading

__all__ = ["Candidate", "Kind", "Place", "Segment", "Split"]

Segment = Literal["thinking", "answer"]
Kind = Literal["heading", "tag", "box", "closed", "sentence", "code", "paragraph", "none"]

MAX_CAPTURED = 16_384  # characters of a conclusion that are kept to find a value without a box in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where the answer is. Spans are (start, end), end not included.

    thinking: in token indices.
    thinking_chars: in characters, without the thinking's own tags.
    conclusion: in token indices, None where the text never concludes.
    conclusion_chars: in characters.
    answer: the extracted value as written (a box's or tag's content, a stated value), None where there is none.
    confidence: 0 to 1, how sure it is that this is the model's last word.
    kind: the mark that gave the answer.
    is_revised: the text went on to doubt the answer without giving another.
    rule: the rows of `rules` that decided, from the outside in: "sentence / sentence / the answer is"; "" for none.
    """

    thinking: tuple[int, int]
    thinking_chars: tuple[int, int]
    conclusion: tuple[int, int] | None = None
    conclusion_chars: tuple[int, int] | None = None
    answer: str | None = None
    confidence: float = 0.0
    kind: Kind = "none"
    is_revised: bool = False
    rule: str = ""


@dataclass(slots=True)
class Place:
    """A character and the token that holds it; token is None until that character arrives."""

    char: int
    token: int | None


@dataclass(slots=True)
class Candidate:
    """What may be the answer.

    kind: the mark that gave it.
    place: where its conclusion starts.
    end: the character behind its last mark.
    value: None where nothing was read yet, or nothing could be.
    confidence: product of the rows that read it.
    rule: those rows.
    part: of a question in several parts, the one that the last box answered; 0 for none.
    is_revised: the text doubted it later.
    is_explained: what follows only explains it.
    """

    kind: Kind
    place: Place
    end: int
    value: str | None = None
    confidence: float = 0.0
    rule: str = ""
    part: int = 0
    is_revised: bool = False
    is_explained: bool = False
    _pieces: list[str] = field(default_factory=list)
    _n_captured: int = 0

    def capture(self, text: str) -> None:
        """Keep the beginning of what follows: the answer may stand there without a box."""
        if self._n_captured < MAX_CAPTURED:
            self._pieces.append(text)
            self._n_captured += len(text)

    def take(self, reading: Reading[str] | None) -> None:
        """Set the value, None for "", with the confidence and names of the rows that read it; None changes nothing."""
        if reading is None:
            return
        self.value, self.confidence, self.rule = reading.value or None, reading.confidence, reading.rule

    @property
    def captured(self) -> str:
        """What follows, cut to the same length however it arrived."""
        return "".join(self._pieces)[:MAX_CAPTURED]

    @property
    def n_captured(self) -> int:
        """Characters kept."""
        return self._n_captured
