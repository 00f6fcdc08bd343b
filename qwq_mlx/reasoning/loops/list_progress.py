"""Rows as progress: lines one below the other, of one shape and never the same twice, are a list being written down.

The idea: permutations, truth tables in words and lists of candidates repeat every word and still get somewhere, because
each row is new. A row is a line that follows its predecessor, has as many words, most of them in the same place,
differs from every row so far by more than its number, and does not begin as a step of reasoning does ("So", "Maybe",
"Wait"). Rows are progress for `MAX_CREDIT` words, half of that where they are long, so that rows without end are not
progress for ever. A blank line ends a list, because a loop writes its steps like that; but not one with bullets, whose
items QwQ sets apart so: they cost twice the credit.

Does not: see order in a list, or items of different lengths.
"""

from __future__ import annotations

import re

from qwq_mlx.reasoning.answer import doubts

__all__ = ["MAX_CREDIT", "RowWatcher"]

MAX_CREDIT = 800
_MAX_WORDS = 60
_ALIKE = 0.5  # of the words of two rows that stand in the same place
_BULLETS = frozenset("-*•")
_MAX_SEEN = 20_000
_LONG = 12  # words of a row that is a sentence
_STEP = re.compile(
    r"(?:so|then|maybe|perhaps|let|i|we|now|okay|ok|thus|therefore|hence|next|suppose|assume|again|this|that|it)\b",
    re.I,
)


class RowWatcher:
    """`word` for each word, `end_line` at each line's end: whether the line was a row, and so its words progress."""

    def __init__(self) -> None:
        self._templates: list[str] = []
        self._words: list[str] = []
        self._previous: list[str] = []
        self._seen: set[int] = set()
        self._credit = MAX_CREDIT
        self._is_apart = False  # a blank line stands before this row

    def word(self, word: str, template: str) -> None:
        """Take the next word as written, and its template."""
        if len(self._words) <= _MAX_WORDS:
            self._words.append(word)
            self._templates.append(template)

    def end_line(self) -> bool:
        """The line ends; a blank one ends a list without bullets."""
        words, templates, previous = self._words, self._templates, self._previous
        if not words and previous and previous[0] in _BULLETS:
            self._is_apart = True
            return False
        is_apart, self._is_apart = self._is_apart, False
        self._words, self._templates, self._previous = [], [], templates
        if not words or len(words) > _MAX_WORDS:
            return False
        is_numbered = words[0].isdecimal()
        content = hash(tuple(words[is_numbered:]))
        is_new = content not in self._seen
        if is_new and len(self._seen) < _MAX_SEEN:
            self._seen.add(content)
        beginning = " ".join(words[is_numbered : is_numbered + 8]).lstrip(" .):")
        if len(words) != len(previous) or not is_new or doubts(beginning) or _STEP.match(beginning):
            return False
        cost = len(words) * (2 if len(words) >= _LONG else 1) * (2 if is_apart else 1)
        if self._credit < cost:
            return False
        alike = sum(a == b for a, b in zip(templates, previous, strict=True))
        if alike < _ALIKE * len(words):
            return False
        self._credit -= cost
        return True
