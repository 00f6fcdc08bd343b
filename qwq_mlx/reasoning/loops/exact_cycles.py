"""Exact cycles in a stream of ids: does the end of the stream repeat with some period, and since when?

The idea: a period p shows when the last k ids occurred p places earlier. Hashes of the last k ids, for k = 8, 16, ...
16,384, find such places at once; a place found is then followed id by id for as long as it holds. For the level with
p <= k < 2p the ids inside one period cannot mislead the search, so every period is followed before its third
repetition ends. Positions are noted at every k/8-th place (at most 64 apart), which keeps memory at about two entries
per id, of the last 65,536 ids at most.

Numbers, tables, lists and code repeat for good reasons: 2^64 in binary, a matrix of zeros. A cycle that holds nothing
else (`data_margin`) needs far longer evidence than one of sentences.

Does not: see near repeats (`near_repeats` does), or periods above `MAX_PERIOD`, of which three need over 32,768 ids.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_PERIOD", "Cycle", "CycleFinder", "data_margin"]

MAX_PERIOD = 10_922
_DATA_LEAST = 400  # ids in all; [0] * 100 is 300 tokens, 1 + 1 + ... to 100 is 397, and a question names what is longer
_DATA_MOST = 2048  # a grid of 30 by 30 is 1,800 tokens; a longer one is rarer than a loop
_HISTORY = 32_768
_LEVELS = tuple((8 << level, min(64, 1 << level)) for level in range(12))  # (k, places between notes)
_PRIME = (1 << 61) - 1
_BASE = 1_000_003
_MAX_FOLLOWED = 24


def data_margin(period: int, *, n_asked: int = 0) -> int:
    """Ids beyond three periods that a cycle of numbers, cells or code needs.

    A square grid has as many rows as cells in a row, so a period of p ids may return p times; and as often as the
    largest number in the question (`n_asked`): "100 digits", "a 20 by 20 grid".

    >>> data_margin(1), data_margin(25), data_margin(60), data_margin(2, n_asked=1000)
    (397, 625, 2048, 2000)
    """
    return min(_DATA_MOST, max(_DATA_LEAST - 3 * period, period * max(period, n_asked)))


@dataclass(frozen=True, slots=True)
class Cycle:
    """The last `length` ids have period `period`; length counts the first repetition too."""

    period: int
    length: int

    @property
    def n_repeats(self) -> float:
        """How often the period stands there."""
        return self.length / self.period


class CycleFinder:
    """Feed ids one at a time; `feed` returns the shortest cycle that lasts at least three periods and `margin` ids.

    margin: ids beyond three periods; a cycle of data needs `data_margin`, if that is more.
    n_asked: the largest number in the question, 0 for none.
    """

    def __init__(self, *, margin: int, n_asked: int = 0) -> None:
        self._margin = margin
        self._n_asked = n_asked
        self._n_data = 0
        self._ids: list[int] = []
        self._sums = [0]  # hashes of all ids up to a place
        self._levels: list[tuple[int, int, int, dict[int, int]]] = [
            (length, spacing, pow(_BASE, length, _PRIME), {}) for length, spacing in _LEVELS
        ]
        self._base = 0  # ids dropped from the front
        self._followed: dict[int, int] = {}  # period -> ids that equal the one a period earlier

    def feed(self, token_id: int, *, n_data: int = 0) -> Cycle | None:
        """Take the next id. n_data: so many of the last ids are numbers, cells or code, not sentences."""
        self._n_data = n_data
        self._ids.append(token_id)
        self._sums.append((self._sums[-1] * _BASE + token_id + 1) % _PRIME)
        if self._followed:
            self._follow(token_id)
        self._search()
        if len(self._ids) > 2 * _HISTORY:
            self._drop()
        if not self._followed:
            return None
        best = min((period for period, count in self._followed.items() if count >= self._needed(period)), default=None)
        return None if best is None else Cycle(best, best + self._followed[best])

    @property
    def score(self) -> float:
        """The longest repetition under way as a share of one that counts."""
        return max((count / self._needed(period) for period, count in self._followed.items()), default=0.0)

    def _needed(self, period: int) -> int:
        """The ids that must equal the one a period earlier."""
        margin = self._margin
        if period <= self._n_data:
            margin = max(margin, data_margin(period, n_asked=self._n_asked))
        return 2 * period + margin

    def _follow(self, token_id: int) -> None:
        ids, last = self._ids, len(self._ids) - 1
        ended = []
        for period in self._followed:
            if ids[last - period] == token_id:
                self._followed[period] += 1
            else:
                ended.append(period)
        for period in ended:
            del self._followed[period]

    def _search(self) -> None:
        n_ids, sums = len(self._ids), self._sums
        place, last = n_ids + self._base, sums[n_ids]
        is_old = True  # where the last 8 ids are new, no longer run of them can be old
        for length, spacing, power, notes in self._levels:
            if n_ids < length:
                break
            is_due = not place % spacing
            if is_old or is_due:
                key = (last - sums[n_ids - length] * power) % _PRIME
                if is_old:
                    earlier = notes.get(key)
                    if earlier is not None:
                        self._consider(place - earlier, length)
                    elif spacing == 1:
                        is_old = False
                if is_due:
                    notes[key] = place
            if not is_old and not is_due:
                break  # longer runs are noted at some of these places only

    def _consider(self, period: int, length: int) -> None:
        """Follow a period at which the last `length` ids repeat, if it is new."""
        if period in self._followed or period > MAX_PERIOD or period + length > len(self._ids):
            return
        if len(self._followed) >= _MAX_FOLLOWED:
            longest = max(self._followed)
            if period > longest:
                return
            del self._followed[longest]
        ids = self._ids
        if length > 8 and ids[-length:] != ids[-length - period : -period]:
            return  # hashes met by accident
        count, end = length, len(ids) - 1
        # Notes lie up to 64 places apart, so as many ids before the match may belong to it.
        while count < length + 64 and end - count - period >= 0 and ids[end - count] == ids[end - count - period]:
            count += 1
        self._followed[period] = count

    def _drop(self) -> None:
        """Forget the older half of the history."""
        excess = len(self._ids) - _HISTORY
        del self._ids[:excess], self._sums[:excess]
        self._base += excess
        self._levels = [
            (length, spacing, power, {key: place for key, place in notes.items() if place - length > self._base})
            for length, spacing, power, notes in self._levels
        ]
