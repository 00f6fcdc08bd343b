"""Which ids are drafted for which row, by whom, and whether at all: what the decoder asks.

The automaton guesses for nothing and knows how sure it is; a draft model's ids cost a pass over its weights each. A row
takes whichever promises more tokens a second, so the automaton where it is sure of a long stretch and the model
elsewhere; the lengths are those of `draft_length`.

Plain decoding is never left for long where it is faster. Each pass is entered in an account: what it cost beyond what
its tokens cost without drafts, by the measured costs. Plain passes pay 1 % into it; a pass is only drafted for where
the account covers that none of its drafts is right. So a drafter that is always wrong costs 1 % of the time.

Does not: check drafts (`decoder` does), or measure (`pass_costs` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwq_mlx.engine.draft_length import Lengths, PassCosts, best_lengths
from qwq_mlx.engine.drafters.model import ModelDrafter
from qwq_mlx.engine.drafters.ngram import NgramDrafter
from qwq_mlx.engine.drafters.suffix_automaton import Guess
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.speculative import Draft
from qwq_mlx.errors import OptionError

__all__ = ["MAX_LENGTH", "DraftCounts", "Speculator"]

MAX_LENGTH = 15
"""Ids drafted for a row at a time, at most."""

_PAID_IN = 0.01  # of each plain pass
_LARGEST_ACCOUNT = 3.0  # plain passes: what one prompt won is not all lost again on the next


@dataclass(slots=True)
class DraftCounts:
    """Ids drafted and accepted so far, by drafter ("ngram", "model"), over all rows."""

    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, n_drafted: int, n_accepted: int) -> None:
        """Enter one checked draft."""
        self.drafted[source] = self.drafted.get(source, 0) + n_drafted
        self.accepted[source] = self.accepted.get(source, 0) + n_accepted


class Speculator:
    """Drafts for the rows of one model; the decoder asks it (`speculative.Drafts`).

    ngram, model: the drafters, at least one.
    costs: of passes here. length: ids drafted whatever they cost. One of the two is given.
    """

    def __init__(
        self,
        *,
        ngram: NgramDrafter | None = None,
        model: ModelDrafter | None = None,
        costs: PassCosts | None = None,
        length: int | None = None,
    ) -> None:
        if ngram is None and model is None:
            raise OptionError("There is no drafter. Give `ngram`, `model` or both.")
        if (costs is None) == (length is None):
            raise OptionError("Give either the costs of passes, or a length that is drafted whatever it costs.")
        if length is not None and not 1 <= length <= MAX_LENGTH:
            raise OptionError(f"length is {length}, expected from 1 to {MAX_LENGTH} drafted ids.")
        self.counts = DraftCounts()
        self._ngram, self._model, self._costs, self._length = ngram, model, costs, length
        self._account_s = 0.0
        self._token_s = 0.0  # what a token costs without drafts, in the pass under way
        self._under_way: dict[Row, list[Guess]] = {}

    def is_due(self, rows: Sequence[Row]) -> bool:
        """See `speculative.Drafts`."""
        costs = self._costs
        if costs is None:
            return True
        # the automaton has to be right with the id under way too, which nobody has read
        by_ngram = best_lengths(
            [_behind(self._ngram_guess(row, MAX_LENGTH + 1))[: row.most_drafts] for row in rows], costs
        )
        best = max(by_ngram, self._by_model(rows, costs), key=lambda lengths: lengths.rate)
        plain_s = costs.of(len(rows))
        if any(best.by_row) and best.seconds - plain_s <= self._account_s:
            self._account_s -= costs.sync_s  # also where nothing is drafted, once the id is read
            return True
        self._pay_in(_PAID_IN * plain_s, plain_s)
        if self._model is not None and self._account_s >= _LARGEST_ACCOUNT * plain_s:
            self._model.forget()  # it may be right again by now
        return False

    def draft(self, rows: Sequence[Row], *, most: int | None) -> list[Draft]:
        """See `speculative.Drafts`."""
        rooms = self._rooms(rows, most)
        guesses = [self._ngram_guess(row, room) for row, room in zip(rows, rooms, strict=True)]
        sources = ["ngram"] * len(rows)
        drafting_s = 0.0
        if self._model is not None:
            lengths = self._model_lengths(rows, guesses, rooms, most)
            drafting_s = max(lengths) * (0.0 if self._costs is None else self._costs.draft_s)
            for place, drafted in enumerate(self._model.guess(rows, lengths)):
                if drafted:
                    guesses[place], sources[place] = drafted, self._model.name
        if self._costs is not None:
            guesses = self._paid(guesses, self._costs, drafting_s, most)
        self._under_way = {row: own for row, own in zip(rows, guesses, strict=True) if own}
        return [
            Draft(tuple(guess.id for guess in own), source) if own else Draft()
            for own, source in zip(guesses, sources, strict=True)
        ]

    def learn(self, row: Row, draft: Draft, n_accepted: int) -> None:
        """See `speculative.Drafts`."""
        guesses = self._under_way.pop(row)
        drafter = self._model if self._model is not None and draft.source == self._model.name else self._ngram
        assert drafter is not None, "it made the draft"
        drafter.learn(guesses, n_accepted)
        self.counts.add(draft.source, len(draft.ids), n_accepted)
        self._pay_in(n_accepted * self._token_s, self._token_s)

    def _rooms(self, rows: Sequence[Row], most: int | None) -> list[int]:
        """Ids that may be drafted for each row."""
        longest = MAX_LENGTH if self._length is None else self._length
        if most is not None and self._length is not None:
            longest = min(longest, most // len(rows))  # there is no price by which they could share
        return [min(row.most_drafts, longest) for row in rows]

    def _ngram_guess(self, row: Row, n_most: int) -> list[Guess]:
        return [] if self._ngram is None or not row.most_drafts else self._ngram.guess(row, n_most)

    def _by_model(self, rows: Sequence[Row], costs: PassCosts) -> Lengths:
        """The best lengths of drafts that the model has still to make."""
        expected = [] if self._model is None else self._model.expected(MAX_LENGTH)
        return best_lengths([expected[: row.most_drafts] for row in rows], costs, are_to_draft=True)

    def _model_lengths(
        self, rows: Sequence[Row], guesses: Sequence[list[Guess]], rooms: Sequence[int], most: int | None
    ) -> list[int]:
        """How many ids the model drafts for each row: none where the automaton promises more."""
        assert self._model is not None, "whoever asks has seen to it"
        expected = self._model.expected(MAX_LENGTH)
        costs, lengths = self._costs, [0] * len(rows)
        by_model = [place for place, room in enumerate(rooms) if room]
        if costs is None:
            for place in by_model:
                n = rooms[place]
                lengths[place] = n if _n_right(expected[:n]) > _n_right(_probabilities(guesses[place])) else 0
            return lengths
        by_model = [
            place
            for place in by_model
            if best_lengths([expected[: rooms[place]]], costs, are_to_draft=True).rate
            > best_lengths([_probabilities(guesses[place])], costs).rate
        ]
        best = best_lengths([expected[: rooms[place]] for place in by_model], costs, most=most, are_to_draft=True)
        if best.seconds - costs.of(len(by_model) or 1) > self._account_s:
            return lengths
        for place, n in zip(by_model, best.by_row, strict=True):
            lengths[place] = n
        return lengths

    def _paid(
        self, guesses: Sequence[list[Guess]], costs: PassCosts, drafting_s: float, most: int | None
    ) -> list[list[Guess]]:
        """The guesses as long as they pay, with their cost taken from the account; none where it does not cover it."""
        best = best_lengths([_probabilities(own) for own in guesses], costs, most=most)
        plain_s = costs.of(len(guesses))
        loss_s = costs.of(len(guesses) + sum(best.by_row)) - plain_s
        lengths = best.by_row
        if loss_s + drafting_s > self._account_s + costs.sync_s:
            lengths, loss_s = [0] * len(guesses), 0.0
        self._account_s -= loss_s + drafting_s
        self._token_s = plain_s / len(guesses)
        return [own[:n] for own, n in zip(guesses, lengths, strict=True)]

    def _pay_in(self, seconds: float, plain_s: float) -> None:
        self._account_s = min(self._account_s + seconds, _LARGEST_ACCOUNT * max(plain_s, seconds))


def _probabilities(guesses: Sequence[Guess]) -> list[float]:
    return [guess.probability for guess in guesses]


def _behind(guesses: Sequence[Guess]) -> list[float]:
    """The probabilities of a guess behind its first id, which has to be right for the next one to be."""
    probabilities = _probabilities(guesses)
    return [probabilities[0] * probabilities[1], *probabilities[2:]] if len(probabilities) > 1 else []


def _n_right(probabilities: Sequence[float]) -> float:
    """Leading ids that are expected to be right."""
    reached, total = 1.0, 0.0
    for probability in probabilities:
        reached *= probability
        total += reached
    return total
