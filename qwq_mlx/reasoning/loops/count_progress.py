"""Numbers as progress: a text that tries 14, then 15, then 17 repeats its words and still gets somewhere.

The idea: four signs tell a search from a loop with other numbers in it. A number goes on in one direction from those
in the same place, `_STREAK` times in a row and never there before (1, 2, 3; primes; powers; a countdown). A line's
numbers, taken together, come after those of the last line of the same beginning (tuples in order). An equation between
numbers is new in the text and holds (see `equations`). A line goes on from the number that the last one ended with to a
new one (27 gives 82, 82 gives 41). Words until about the next such number then are progress, whatever they repeat. A
label ("3.", "Step 3:") only numbers its line, so it counts only if the line also brings a number that is new in the
text. A count gives credit for `MAX_CREDIT` words, so that counting without end is not progress for ever.

Does not: see a search in no order whose lines compute nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from qwq_mlx.reasoning.loops.equations import SumReader

__all__ = ["MAX_CREDIT", "CountWatcher"]

MAX_CREDIT = 4000
_MAX_GAP = 200  # words between two numbers of one count
_STEADY = 2  # equal steps in a row after a first one, and
_STREAK = 4  # steps in one direction in a row, from which on numbers count
_MAX_SEEN = 20_000
_MAX_PLACES = 4000
_MAX_NUMBERS = 16  # of a line, compared with those of the line before
_BEGINNING = 3  # words that two lines of one kind begin with


class _Place(NamedTuple):
    """What one place held.

    values: its last numbers.
    n_words: the word at which they came.
    step: the difference from the number before.
    streak: steps in one direction in a row, below 0 for steps down.
    steady: equal steps in a row.
    """

    values: tuple[float, ...]
    n_words: int
    step: float = 0.0
    streak: int = 0
    steady: int = 0


class CountWatcher:
    """`word` for each word, `number` for each number besides, with its place (a hash of the words before it);
    `is_counting` says whether the current word is covered by a count."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}
        self._seen: set[int] = set()
        self._sums = SumReader()
        self._last_equation = self._last_numbered = -_MAX_GAP
        self._until = -1
        self._credit = MAX_CREDIT
        self._is_numbered = False  # the line's label is the next number of a count
        self._numbers: list[float] = []
        self._last_new = False  # the line's last number is new in the text
        self._chain: float | None = None  # the last number of the last line with numbers
        self._last_chain = -_MAX_GAP
        self._beginning: list[str] = []

    def word(self, text: str, template: str, n_words: int) -> None:
        """Take a word or mark of the line, as written, with its template."""
        if len(self._beginning) < _BEGINNING and (template != "0" or self._beginning):
            self._beginning.append(template)
        for equation in self._sums.word(text):
            if self._is_new(hash(equation)) and self._sums.holds(equation):
                self._cover(n_words, self._last_equation)
                self._last_equation = n_words

    def number(self, text: str, place: int, n_words: int, *, is_label: bool) -> None:
        """Take a number, as written, at the word `n_words`. is_label: it only numbers its line."""
        is_new = self._is_new(hash(text))
        value = float(text) if len(text) <= 15 else 0.0
        since = self._continues((value,), place, n_words)
        if is_label:
            self._is_numbered = since is not None
            return
        if len(self._numbers) < _MAX_NUMBERS:
            self._numbers.append(value)
        self._last_new = is_new
        if since is not None:
            self._cover(n_words, since)
        if self._is_numbered and is_new:
            self._cover(n_words, self._last_numbered)
            self._last_numbered = n_words

    def end_line(self, n_words: int) -> None:
        """A line ends, at the word `n_words`."""
        if len(self._numbers) > 1:
            since = self._continues(tuple(self._numbers), hash(("line", *self._beginning)), n_words)
            if since is not None:
                self._cover(n_words, since)
            if self._numbers[0] == self._chain and self._last_new:
                self._cover(n_words, self._last_chain)
                self._last_chain = n_words
        if self._numbers:
            self._chain = self._numbers[-1]
        self._is_numbered = False
        self._numbers, self._beginning = [], []

    def covers(self, n_words: int) -> bool:
        """Whether the word `n_words` belongs to a count; takes nothing."""
        return n_words <= self._until and self._credit > 0

    def is_counting(self, n_words: int) -> bool:
        """Whether the word `n_words` belongs to a count; takes one word of its credit."""
        if not self.covers(n_words):
            return False
        self._credit -= 1
        return True

    def _cover(self, n_words: int, since: int) -> None:
        """A sign of progress: the next words count, as many as passed since the one before."""
        if n_words - since <= _MAX_GAP:
            self._until = max(self._until, 2 * n_words - since)

    def _is_new(self, what: int) -> bool:
        if what in self._seen:
            return False
        if len(self._seen) < _MAX_SEEN:
            self._seen.add(what)
        return True

    def _continues(self, values: tuple[float, ...], place: int, n_words: int) -> int | None:
        """The word at which this place held its last values, if these go on from them and are new there; else None."""
        last = self._places.pop(place, None)
        if last is None:
            self._places[place] = _Place(values, n_words)
            if len(self._places) > _MAX_PLACES:
                del self._places[next(iter(self._places))]
            return None
        step = values[0] - last.values[0] if len(values) == 1 else 0.0
        steady = last.steady + 1 if step and step == last.step else 0
        streak = max(last.streak, 0) + 1 if values > last.values else min(last.streak, 0) - 1
        if values == last.values:
            streak = 0
        self._places[place] = _Place(values, n_words, step, streak, steady)
        is_new = self._is_new(hash((place, values)))
        return last.n_words if is_new and (abs(streak) >= _STREAK or steady >= _STEADY) else None
