"""Rows as progress: lines one below the other, of one shape and never in the same order, are a list being written down.

The idea: permutations, truth tables in words and lists of candidates repeat every word and still get somewhere, because
each row is new. A row is a line that has as many words as one of the two before it, most of them in the same place,
stands with these two in an order that is new by more than its label ("3.", "Step 3:"), and does not begin as a step of
reasoning does ("So", "Maybe", "Wait"). Rows are progress for `MAX_CREDIT` words, half of that where they are long, so
that rows without end are not progress for ever. A blank line ends a list, because a loop writes its steps like that;
but not one with bullets, whose items QwQ sets apart so: they cost twice the credit.

Does not: see order in a list, or items of different lengths.
"""

from __future__ import annotations

import re
from operator import eq

from qwq_mlx.reasoning.answer import doubts

__all__ = ["MAX_CREDIT", "RowWatcher"]

MAX_CREDIT = 800
_MAX_WORDS = 60
_ALIKE = 0.5  # of the words of two rows that stand in the same place
_BULLETS = frozenset("-*•")
_MAX_SEEN = 20_000
_IN_ORDER = 3  # rows: the moves of Hanoi and the options of an answer key return, in another order
_LONG = 12  # words of a row that is a sentence
_MAX_KEY = 2  # the full stop of a label and a letter
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
        self._before: list[str] = []  # the row before the previous one: questions and answers take turns
        self._seen: set[int] = set()
        self._credit = MAX_CREDIT
        self._n_label = 0  # words of the row up to its label
        self._rows: tuple[int, ...] = ()  # the last ones without their labels
        self._is_apart = False  # a blank line stands before this row

    def word(self, word: str, template: str) -> None:
        """Take the next word as written, and its template."""
        if len(self._words) <= _MAX_WORDS:
            self._words.append(word)
            self._templates.append(template)

    def _is_new(self, rows: tuple[int, ...]) -> bool:
        """Whether these rows never stood in this order; two that are the same never count."""
        key = hash(rows)
        if key in self._seen or rows[-1] in rows[-2:-1]:
            return False
        if len(self._seen) < _MAX_SEEN:
            self._seen.add(key)
        return True

    def label(self) -> None:
        """The words of the line so far are its label."""
        self._n_label = len(self._words)

    def end_line(self) -> bool:
        """The line ends; a blank one ends a list without bullets."""
        words, templates, previous = self._words, self._templates, self._previous
        if not words and previous and previous[0] in _BULLETS:
            self._is_apart = True
            return False
        is_apart, self._is_apart = self._is_apart, False
        n_label, self._n_label = self._n_label, 0
        before, self._before = self._before, previous
        self._words, self._templates, self._previous = [], [], templates
        if not words:
            self._before = []
        if not words or len(words) > _MAX_WORDS:
            return False
        n_label = max(n_label, words[0].isdecimal())
        self._rows = (*self._rows[1 - _IN_ORDER :], hash(tuple(words[n_label:])))
        is_new = self._is_new(self._rows)
        beginning = " ".join(words[n_label : n_label + 8]).lstrip(" .):")
        if not is_new or doubts(beginning) or _STEP.match(beginning):
            return False
        if not _are_alike(templates, previous, n_label) and not _are_alike(templates, before, n_label):
            return False
        cost = len(words) * (2 if len(words) >= _LONG else 1) * (2 if is_apart else 1)
        if self._credit < cost:
            return False
        self._credit -= cost
        return True


def _are_alike(row: list[str], other: list[str], n_label: int) -> bool:
    """Labels are alike whatever follows them, so they count only before a single word, as in an answer key."""
    start = n_label if len(row) - n_label > _MAX_KEY else 0
    n_same = sum(map(eq, row[start:], other[start:]))
    return len(row) == len(other) and n_same >= _ALIKE * (len(row) - start)
