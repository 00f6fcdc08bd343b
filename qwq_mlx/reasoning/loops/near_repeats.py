"""Loops that are not exact: the same steps again with other names, numbers, openings or order.

The idea: a run of four word templates (see `word_templates`) is stale when it occurred several times not long before. A
reasoning that makes progress is mostly fresh; one that goes round becomes stale and stays so. A cumulative sum adds 1 -
drift for a stale word and takes drift for a fresh one, never below zero, and a loop is reported when it reaches its
limit: the shortest delay for a given rate of false alarms (Page's test). Three such sums run side by side: `SOON` for
steps that return at once and nearly word by word (once within 150 words), `NEAR` for those that return changed (twice
within 300), `FAR` for long rounds (three times within 2,000). Numbers never count as stale, so tables of digits and
lists of trials, whose news is their numbers, stay below; nor do words of a count that goes on (see `count_progress`),
and new rows of a list take back what they added (see `list_progress`).

Does not: understand a step. Rounds that share no run of four words, or are longer than about 650, are missed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwq_mlx.reasoning.loops.count_progress import CountWatcher
from qwq_mlx.reasoning.loops.list_progress import RowWatcher
from qwq_mlx.reasoning.loops.word_templates import TemplateReader

__all__ = ["FAR", "NEAR", "SOON", "WORDS", "Scale", "Variants", "VariantsFinder"]

_RUN = 4
_LABEL_ENDS = frozenset(".):")
_PICTOGRAPHS = "\U0001f000"  # the first; the symbols below are signs of formulas and boards
_N_DISTANCES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """When a run of words, or for `WORDS` a word, is stale.

    n_earlier: how often it occurred before,
    horizon: within so many words.
    drift: what a fresh word takes from the sum; a stale one adds 1 - drift.
    """

    n_earlier: int
    horizon: int
    drift: float


SOON = Scale(n_earlier=1, horizon=150, drift=0.65)
NEAR = Scale(n_earlier=2, horizon=300, drift=0.5)
FAR = Scale(n_earlier=3, horizon=2000, drift=0.6)
WORDS = Scale(n_earlier=1, horizon=200, drift=0.9)  # of 100 draws from 25, with commas, 1 in 59 lacks the next one
_N_PLACES = max(SOON.n_earlier, NEAR.n_earlier, FAR.n_earlier)
_HORIZON = max(SOON.horizon, NEAR.horizon, FAR.horizon)


@dataclass(frozen=True, slots=True)
class Variants:
    """Steps that keep returning.

    start: token of the first of them, as far as known.
    period: tokens from one to the next, the median.
    score: the cumulative sum.
    """

    start: int
    period: int
    score: float


class _Sum:
    """The cumulative sum of one scale."""

    __slots__ = ("distances", "limit", "rise", "scale", "value")

    def __init__(self, scale: Scale, limit: float) -> None:
        self.scale = scale
        self.limit = limit
        self.value = 0.0
        self.rise = 0  # token where the sum left zero
        self.distances: deque[int] = deque(maxlen=_N_DISTANCES)  # tokens back to the same run

    def take(self, earlier: tuple[int, ...], n_words: int, index: int, distance: int) -> None:
        """One word: `earlier` are the places of its run, in words, the latest last."""
        needed = self.scale.n_earlier
        if len(earlier) >= needed and n_words - earlier[-needed] <= self.scale.horizon:
            if not self.value:
                self.rise = index
            self.value += 1 - self.scale.drift
            self.distances.append(distance)
        else:
            self.value = max(0.0, self.value - self.scale.drift)


@dataclass(frozen=True, slots=True)
class _Number:
    """A number that may be a label, which the next mark tells.

    text: as written.
    run: hash of its run.
    earlier: places of its run before, in words.
    distance: tokens back to the last of them.
    n_words, n_lines, index: where it stands, in words, lines and tokens.
    """

    text: str
    run: int
    earlier: tuple[int, ...]
    distance: int
    n_words: int
    n_lines: int
    index: int


class VariantsFinder:
    """Feed each token's text with its index; `feed` returns what it found while a sum is at its limit or above."""

    def __init__(self, *, soon_limit: float, near_limit: float, far_limit: float, words_limit: float) -> None:
        self._runs = (_Sum(SOON, soon_limit), _Sum(NEAR, near_limit), _Sum(FAR, far_limit))
        self._words = _Sum(WORDS, words_limit)
        self._sums = (*self._runs, self._words)
        self._reader = TemplateReader()
        self._counts = CountWatcher()
        self._rows = RowWatcher()
        self._at_line = [0.0] * len(self._sums)  # the sums where the line began
        self._n_lines = 0
        self._number: _Number | None = None
        self._run: tuple[str, ...] = ()
        self._n_words = 0
        self._recent: deque[int] = deque()
        self._places: dict[int, tuple[int, ...]] = {}  # run -> words of its last occurrences
        self._tokens: dict[int, int] = {}  # run -> token of its last occurrence
        self._n_single = 0  # words without marks
        # The last place of each word, in these and in tokens; the word not met for longest comes first.
        self._word_places: dict[str, tuple[int, int]] = {}

    @property
    def scores(self) -> tuple[float, float, float, float]:
        """The sums: soon, near, far and words."""
        soon, near, far = self._runs
        return soon.value, near.value, far.value, self._words.value

    @property
    def is_code(self) -> bool:
        """Whether the last word stands between code fences."""
        return self._reader.is_code

    @property
    def is_structured(self) -> bool:
        """Whether the last word stands in code, a table row or an open bracket."""
        return self._reader.is_structured

    @property
    def is_counting(self) -> bool:
        """Whether the last word belongs to a count, which is progress whatever it repeats."""
        return self._counts.covers(self._n_words)

    def forget(self) -> None:
        """Start again: what follows may repeat what came before."""
        for each in self._sums:
            each.value = 0.0
        self._at_line = [0.0] * len(self._sums)
        self._recent.clear()
        self._places.clear()
        self._tokens.clear()
        self._word_places.clear()

    def feed(self, text: str, index: int) -> Variants | None:
        """Take the text of token `index`."""
        for word in self._reader.feed(text):
            self._take(word, index)
        for each in self._sums:
            if each.value >= each.limit:
                distances = sorted(each.distances)
                period = distances[len(distances) // 2]
                return Variants(max(0, each.rise - each.scale.n_earlier * period), period, each.value)
        return None

    def _end_lines(self, n_lines: int) -> None:
        """One line end or more came before this word. A row of a list takes back what it added."""
        self._n_lines += n_lines
        self._counts.end_line(self._n_words)
        if self._rows.end_line():
            for each, value in zip(self._sums, self._at_line, strict=True):
                each.value = min(each.value, value)
        if n_lines > 1:
            self._rows.end_line()  # the blank line
        self._at_line = [each.value for each in self._sums]

    def _add_word(self, word: str, index: int, *, is_news: bool) -> None:
        """A word or pictograph, for the sum of single words; the ones that lie too far back are forgotten."""
        places = self._word_places
        self._n_single += 1
        n_words = self._n_single
        place, token = places.pop(word, (0, index))
        places[word] = n_words, index
        for _ in range(2 if word >= _PICTOGRAPHS else 1):  # one is two tokens or more
            self._words.take((place,) if place and not is_news else (), n_words, index, index - token)
        oldest = next(iter(places))
        if places[oldest][0] < n_words - WORDS.horizon:
            del places[oldest]

    def _take_number(self, number: _Number, *, is_label: bool) -> None:
        self._counts.number(number.text, number.run, number.n_words, is_label=is_label)
        if is_label:
            self._rows.label()
        for each in self._runs:
            is_stale = is_label and each.scale is SOON
            each.take(number.earlier if is_stale else (), number.n_words, number.index, number.distance)
        self._add_word("0", number.index, is_news=not is_label)

    def _take(self, word: str, index: int) -> None:
        self._run = (*self._run[1 - _RUN :], word)
        self._n_words += 1
        run, n_words = hash(self._run), self._n_words
        earlier = self._places.get(run, ())
        distance = index - self._tokens.get(run, index)
        if self._number is not None:
            self._take_number(
                self._number, is_label=word in _LABEL_ENDS and self._number.n_lines == self._reader.n_lines
            )
            self._number = None
        if self._n_lines != self._reader.n_lines:
            self._end_lines(self._reader.n_lines - self._n_lines)
        self._rows.word(self._reader.word, word)
        self._counts.word(self._reader.word, word, n_words)
        if word == "0":
            self._number = _Number(self._reader.word, run, earlier, distance, n_words, self._n_lines, index)
            if not self._reader.is_label:
                self._take_number(self._number, is_label=False)
                self._number = None
        elif word == "A" or word[0].isalpha() or word >= _PICTOGRAPHS:
            is_news = self._counts.is_counting(n_words)
            if word < _PICTOGRAPHS:
                for each in self._runs:
                    each.take(() if is_news else earlier, n_words, index, distance)
            self._add_word(self._reader.word.lower(), index, is_news=is_news)
        self._places[run] = (*earlier[1 - _N_PLACES :], n_words)
        self._tokens[run] = index
        self._recent.append(run)
        if len(self._recent) > _HORIZON:
            oldest = self._recent.popleft()
            if self._places[oldest][-1] <= n_words - _HORIZON:
                del self._places[oldest], self._tokens[oldest]
