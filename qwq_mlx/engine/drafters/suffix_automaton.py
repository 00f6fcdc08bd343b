"""A suffix automaton over growing texts of ids that says how a text goes on: no model, some 15 microseconds an id.

Every state stands for the stretches of text that end at the same places. The states on the way along the suffix links
from a text's end are just those endings of it that were seen before with different continuations, the longest first;
each holds how often each id followed, where every further visit counts the earlier ones 0.7 of what they counted. Each
of these states names its favourite id, and how often states of such length and such counts were right says how far to
trust it; the id with the most trust is the guess.

Several texts may grow side by side, each by its own end; what one holds is guessed in the others.

Sources: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text"; Hu et al. 2024, "SAM Decoding:
Speculative Decoding via Suffix Automaton" (arXiv 2411.10666), which takes the longest match alone. On 267 outputs of
QwQ-32B-Preview, one after another in one automaton, 5 guesses a pass: 1.82 tokens a pass by the longest match, 2.0 so.

Does not: forget, or know what a guess costs.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ROOT", "Guess", "SuffixAutomaton"]

ROOT = 0
"""The state of an empty text."""

_KEEP = 0.7  # of a count, at each further visit; 0.85 guessed 0.4 % worse, counting all alike 2.4 %
_LARGEST_UNIT = 1e60  # counts are kept in growing units, so that nothing is multiplied at a visit
_COUNTED = 32  # endings of a text whose counts an id enters, the longest first; a loop has as many as it is long
_ASKED = 6  # endings that name a guess
_KEEP_TRUST = 0.998
_PRIOR = 0.5  # right of 1, before anything was learnt


class Guess(NamedTuple):
    """An id that may come next.

    probability: that it does, by how guesses of this kind have fared. kind: guesses that are trusted alike.
    """

    id: int
    probability: float
    kind: int


def _kind_of_guess(score: float) -> int:
    return int(32 * score)


class _Trust:
    """How often something was right, lately."""

    __slots__ = ("_right", "_total")

    def __init__(self) -> None:
        self._right = self._total = 0.0

    @property
    def share(self) -> float:
        return (self._right + _PRIOR) / (self._total + 1.0)

    def learn(self, is_right: bool) -> None:
        self._right = self._right * _KEEP_TRUST + is_right
        self._total = self._total * _KEEP_TRUST + 1.0


class SuffixAutomaton:
    """Texts of ids; each is known by the state of its end, which `add` gives.

    >>> automaton, end = SuffixAutomaton(), ROOT
    >>> for token_id in (5, 6, 7, 5, 6):
    ...     end = automaton.add(end, token_id)
    >>> automaton.guess(end).id
    7
    """

    def __init__(self) -> None:
        # by state
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._counts: list[dict[int, float]] = [{}]
        self._totals: list[float] = [0.0]
        self._units: list[float] = [1.0]
        self._favourites: list[int] = [-1]
        self._trust_in_states: dict[tuple[int, int, int], _Trust] = {}
        self._trust_in_guesses: dict[int, _Trust] = {}

    def __len__(self) -> int:
        """How many states there are: one to two for each id."""
        return len(self._next)

    def emptied(self) -> SuffixAutomaton:
        """One without texts that trusts its guesses as this one does."""
        other = SuffixAutomaton()
        other._trust_in_states, other._trust_in_guesses = self._trust_in_states, self._trust_in_guesses
        return other

    def add(self, end: int, token_id: int) -> int:
        """Append an id to the text that ends in this state; the state of its new end.

        What would have been guessed there is compared with the id, which is how trust is learnt.
        """
        self._learn(end, token_id)
        new = self._extend(end, token_id)
        state, n_left = end, _COUNTED
        while state != -1 and n_left:
            self._count(state, token_id)
            state, n_left = self._link[state], n_left - 1
        return new

    def follow(self, end: int, token_id: int) -> int:
        """The state of the longest ending of text and id that was seen; nothing is added."""
        while end != -1 and token_id not in self._next[end]:
            end = self._link[end]
        return ROOT if end == -1 else self._next[end][token_id]

    def guess(self, end: int) -> Guess | None:
        """What comes next in the text that ends in this state; None where no ending of it was seen before."""
        best, score = self._best(self._candidates(end))
        if best == -1:
            return None
        kind = _kind_of_guess(score)
        trust = self._trust_in_guesses.get(kind)
        return Guess(best, score if trust is None else trust.share, kind)

    def _candidates(self, end: int) -> list[tuple[int, _Trust]]:
        """The favourites of the text's endings, the longest first, with the trust in each."""
        candidates: list[tuple[int, _Trust]] = []
        state = end
        while state > 0 and len(candidates) < _ASKED:
            favourite = self._favourites[state]
            if favourite != -1:
                key = self._kind(state, favourite)
                candidates.append((favourite, self._trust_in_states.setdefault(key, _Trust())))
            state = self._link[state]
        return candidates

    def _kind(self, state: int, favourite: int) -> tuple[int, int, int]:
        """States of one kind are trusted alike: by length, visits, and the favourite's share of them."""
        length, total = self._length[state], self._totals[state]
        # two steps for each doubling of the length
        n_bits = length.bit_length()
        size = 2 * n_bits + (length >> (n_bits - 2) & 1 if n_bits > 1 else 0)
        return min(size, 14), int(2 * total / self._units[state]), int(10 * self._counts[state][favourite] / total)

    @staticmethod
    def _best(candidates: list[tuple[int, _Trust]]) -> tuple[int, float]:
        """The id that is most probably right, were each who names it right or wrong on its own; -1 for none."""
        wrong: dict[int, float] = {}
        for token_id, trust in candidates:
            wrong[token_id] = wrong.get(token_id, 1.0) * (1.0 - trust.share)
        if not wrong:
            return -1, 0.0
        best = min(wrong, key=wrong.__getitem__)
        return best, 1.0 - wrong[best]

    def _learn(self, end: int, token_id: int) -> None:
        candidates = self._candidates(end)
        best, score = self._best(candidates)
        if best != -1:
            self._trust_in_guesses.setdefault(_kind_of_guess(score), _Trust()).learn(best == token_id)
        for favourite, trust in candidates:
            trust.learn(favourite == token_id)

    def _count(self, state: int, token_id: int) -> None:
        counts = self._counts[state]
        unit = self._units[state] / _KEEP
        if unit > _LARGEST_UNIT:
            self._counts[state] = counts = {each: count / unit for each, count in counts.items()}
            self._totals[state] /= unit
            unit = 1.0
        self._units[state] = unit
        self._totals[state] += unit
        counts[token_id] = counts.get(token_id, 0.0) + unit
        if counts[token_id] >= counts.get(self._favourites[state], 0.0):
            self._favourites[state] = token_id

    def _extend(self, end: int, token_id: int) -> int:
        known = self._next[end].get(token_id)
        if known is not None:  # another text has gone the same way
            return known if self._length[known] == self._length[end] + 1 else self._split(end, token_id, known)
        new = self._new({}, self._length[end] + 1, ROOT)
        state = end
        while state != -1 and token_id not in self._next[state]:
            self._next[state][token_id] = new
            state = self._link[state]
        if state != -1:
            known = self._next[state][token_id]
            is_whole = self._length[known] == self._length[state] + 1
            self._link[new] = known if is_whole else self._split(state, token_id, known)
        return new

    def _split(self, state: int, token_id: int, known: int) -> int:
        """A state of its own for the shorter stretches of `known`, which are now seen at one place more."""
        new = self._new(dict(self._next[known]), self._length[state] + 1, self._link[known])
        self._counts[new], self._totals[new] = dict(self._counts[known]), self._totals[known]
        self._units[new], self._favourites[new] = self._units[known], self._favourites[known]
        self._link[known] = new
        while state != -1 and self._next[state].get(token_id) == known:
            self._next[state][token_id] = new
            state = self._link[state]
        return new

    def _new(self, following: dict[int, int], length: int, link: int) -> int:
        self._next.append(following)
        self._length.append(length)
        self._link.append(link)
        self._counts.append({})
        self._totals.append(0.0)
        self._units.append(1.0)
        self._favourites.append(-1)
        return len(self._next) - 1
