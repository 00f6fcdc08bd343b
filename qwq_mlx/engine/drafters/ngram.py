"""Drafts from what was written before: prompts, outputs, and the rows beside, in one suffix automaton.

It costs microseconds and no memory of the device, and every id that a row draws teaches it how far to trust its
guesses, whether they were used or not.

Does not: know what a guess costs, or remember texts for ever: after `MAX_STATES` it begins anew, with the last ids of
the texts that still grow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

from qwq_mlx.engine.drafters.suffix_automaton import ROOT, Guess, SuffixAutomaton

__all__ = ["MAX_STATES", "Growing", "NgramDrafter"]

MAX_STATES = 400_000
"""States of an automaton; with their counts they take about 0.3 GB."""
_KEPT_IDS = 2_048  # of each text, behind which it goes on after a new beginning
_LEAST_REACHED = 0.01  # probability below which guessing on is a waste of the host's time
_KEEP = 0.998  # of what was counted, at each further guess


class Growing(Protocol):
    """What a text is read from: a `Row`."""

    ids: list[int]
    n_restarts: int


@dataclass(slots=True)
class _Text:
    """What was added of a row: its ids from the place `first` on, and the automaton's state behind each."""

    n_restarts: int
    first: int = 0
    ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


class NgramDrafter:
    """Guesses from all texts it was shown."""

    name = "ngram"

    def __init__(self) -> None:
        self._automaton = SuffixAutomaton()
        self._texts: WeakKeyDictionary[Growing, _Text] = WeakKeyDictionary()
        self._later: dict[int, tuple[float, float]] = {}  # kind -> right ones and all, of guesses behind right guesses

    def guess(self, row: Growing, n_most: int) -> list[Guess]:
        """How a row goes on, at most n_most ids, each with the probability that it is right where those before are.

        It ends where hardly any text goes on so.
        """
        end = self._follow(row)
        guesses: list[Guess] = []
        reached = 1.0
        while len(guesses) < n_most:
            guess = self._automaton.guess(end)
            if guess is None:
                break
            if guesses:
                guess = guess._replace(probability=self._later_probability(guess))
            reached *= guess.probability
            if guesses and reached < _LEAST_REACHED:
                break
            guesses.append(guess)
            end = self._automaton.follow(end, guess.id)
        return guesses

    def learn(self, guesses: list[Guess], n_right: int) -> None:
        """Take how many of the leading ones, as `guess` gave them, were right."""
        for place, guess in enumerate(guesses[1 : n_right + 1], start=1):
            right, total = self._later.get(guess.kind, (guess.probability, 1.0))
            self._later[guess.kind] = right * _KEEP + (place < n_right), total * _KEEP + 1.0

    def forget_texts(self) -> None:
        """Begin anew with texts, and trust guesses as before.

        Of a text that grows on only the last ids are added again: were it all, many long texts would not fit, and each
        would be added again for every id.
        """
        self._automaton = self._automaton.emptied()
        for text in self._texts.values():
            text.first = max(text.first, text.first + len(text.ids) - _KEPT_IDS)
            text.ids, text.ends = [], []

    def _later_probability(self, guess: Guess) -> float:
        """That a guess is right behind guesses that were; they lead where the text need not go."""
        right, total = self._later.get(guess.kind, (guess.probability, 1.0))
        return right / total

    def _follow(self, row: Growing) -> int:
        """The state of a row's end, after what is new of it was added."""
        if len(self._automaton) > MAX_STATES:
            self.forget_texts()
        text = self._texts.get(row)
        if text is None:
            text = self._texts[row] = _Text(row.n_restarts)
        if text.n_restarts != row.n_restarts:  # what was taken back stays in the automaton, as any other text
            text.first = min(text.first, len(row.ids))
            pairs = zip(text.ids, row.ids[text.first :], strict=False)
            n_same = next((place for place, (old, new) in enumerate(pairs) if old != new), len(row.ids) - text.first)
            del text.ids[n_same:], text.ends[n_same:]
            text.n_restarts = row.n_restarts
        end = text.ends[-1] if text.ends else ROOT
        new = row.ids[text.first + len(text.ids) :]
        for token_id in new:
            end = self._automaton.add(end, token_id)
            text.ends.append(end)
        text.ids += new
        return end
