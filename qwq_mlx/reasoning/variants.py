"""Loops that are not exact: the same steps again with other names, numbers, openings or order.

The idea: a run of four word templates (see `words`) is stale when it stood at least three times in the last 2,000
words. A reasoning that gets on is mostly fresh; one that goes round becomes stale and stays so. A cumulative sum adds
1 - drift for a stale word and takes drift for a fresh one, never below zero, and a loop is reported when it reaches
`limit`: the shortest detection delay for a given rate of false alarms (Page's test). Numbers never count as stale, so
tables of digits and lists of trials, whose news is their numbers, stay below.

Does not: understand a step. It needs a fourth repetition, and repetitions that share no run of four words are missed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwq_mlx.reasoning.words import TemplateReader

__all__ = ["Variants", "VariantsFinder"]

_RUN = 4
_N_EARLIER = 3
_HORIZON = 2000  # words
_N_DISTANCES = 64


@dataclass(frozen=True, slots=True)
class Variants:
    """Steps that keep returning. start: token where the first of them stands, as far as known; period: tokens from one
    to the next, the median; score: the cumulative sum."""

    start: int
    period: int
    score: float


class VariantsFinder:
    """Feed each token's text with its index; `feed` returns what it found while the sum is at `limit` or above."""

    def __init__(self, *, limit: float, drift: float) -> None:
        self._limit = limit
        self._drift = drift
        self._reader = TemplateReader()
        self._run: tuple[str, ...] = ()
        self._recent: deque[int] = deque()
        self._counts: dict[int, int] = {}
        self._places: dict[int, int] = {}  # token index of a run's last occurrence
        self._distances: deque[int] = deque(maxlen=_N_DISTANCES)
        self._rise = 0  # token where the sum left zero
        self.score = 0.0

    def feed(self, text: str, index: int) -> Variants | None:
        """Take the text of token `index`."""
        for word in self._reader.feed(text):
            self._take(word, index)
        if self.score < self._limit:
            return None
        distances = sorted(self._distances)
        period = distances[len(distances) // 2]
        return Variants(max(0, self._rise - _N_EARLIER * period), period, self.score)

    def _take(self, word: str, index: int) -> None:
        self._run = (*self._run[1 - _RUN :], word)
        run = hash(self._run)
        count = self._counts.get(run, 0)
        is_word = word == "@" or word[0].isalpha()
        if count >= _N_EARLIER and is_word:
            if not self.score:
                self._rise = index
            self.score += 1 - self._drift
            self._distances.append(index - self._places[run])
        elif is_word or word == "#":
            self.score = max(0.0, self.score - self._drift)
        self._counts[run] = count + 1
        self._places[run] = index
        self._recent.append(run)
        if len(self._recent) > _HORIZON:
            self._forget(self._recent.popleft())

    def _forget(self, run: int) -> None:
        if self._counts[run] > 1:
            self._counts[run] -= 1
        else:
            del self._counts[run], self._places[run]
