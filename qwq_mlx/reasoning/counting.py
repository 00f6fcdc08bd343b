"""Counting as progress: a text that tries 14, then 15, then 16 repeats its words and still gets somewhere.

The idea: a number counts when it continues an arithmetic sequence of numbers in the same place, four of them at least.
Words until about the next such number then are progress, whatever they repeat. The number at a line's beginning only
numbers the line, so there it counts only if the line also brings a number that never stood before. A count gives
credit for `MAX_CREDIT` words, so that counting without end is not progress for ever.

Does not: see other sequences (primes, powers, combinations); lists of those are progress by their share of numbers.
"""

from __future__ import annotations

__all__ = ["MAX_CREDIT", "CountWatcher"]

MAX_CREDIT = 4000
_MAX_GAP = 200  # words between two numbers of one count
_STREAK = 2  # equal differences in a row
_MAX_SEEN = 20_000
_MAX_PLACES = 4000


class CountWatcher:
    """`number` is called for each number with its place (a hash of the words before it); `is_counting` says whether
    the current word is covered by a count."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[float, float, int]] = {}  # last value, last difference, how often in a row
        self._seen: set[str] = set()
        self._last = -_MAX_GAP
        self._until = -1
        self._credit = MAX_CREDIT
        self._is_numbered = False  # the line began with the next number of a count

    def number(self, text: str, place: int, n_words: int, *, begins_line: bool) -> None:
        """Take a number, as written, at the word `n_words`."""
        is_new = text not in self._seen
        if is_new and len(self._seen) < _MAX_SEEN:
            self._seen.add(text)
        counts = self._continues(text, place)
        if begins_line:
            self._is_numbered = counts
            return
        if counts or (self._is_numbered and is_new):
            gap = n_words - self._last
            self._last = n_words
            if gap <= _MAX_GAP:
                self._until = n_words + gap

    def end_line(self) -> None:
        """A line ends."""
        self._is_numbered = False

    def is_counting(self, n_words: int) -> bool:
        """Whether the word `n_words` belongs to a count; takes one word of its credit."""
        if n_words > self._until or not self._credit:
            return False
        self._credit -= 1
        return True

    def _continues(self, text: str, place: int) -> bool:
        value = float(text) if len(text) <= 15 else 0.0
        last, difference, streak = self._places.pop(place, (value, 0.0, 0))
        step = value - last
        streak = streak + 1 if step and step == difference else 0
        self._places[place] = (value, step, streak)
        if len(self._places) > _MAX_PLACES:
            del self._places[next(iter(self._places))]
        return streak >= _STREAK
