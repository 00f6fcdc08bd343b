"""Which ids are drafted for which row, by whom, and whether at all: what the decoder asks.

The automaton guesses for nothing and knows how sure it is; a draft model's ids cost a pass over its weights each. A row
takes whichever promises more tokens a second, so the automaton where it is sure of a long stretch and the model
elsewhere; the lengths are those of `draft_length`.

Plain decoding is never left for long where it is faster. Each pass is entered in an account: what it cost beyond what
its tokens cost without drafts, by the measured costs. Plain passes pay 1 % into it; a pass is only drafted for where
the account covers that none of its drafts is right. So a drafter that is always wrong costs 1 % of the time.

A draft model first reads what it has not seen of a row, its prompt or what was decoded without it. That is timed, and
done again only when as much was earned by its drafts, or paid off by 0.5 % of plain passes.

Does not: check drafts (`decoder` does), or measure (`pass_costs` does).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwq_mlx.engine.draft_length import Costs, Lengths, PassCosts, best_lengths, expected_right
from qwq_mlx.engine.drafters.model import ModelDrafter
from qwq_mlx.engine.drafters.ngram import NgramDrafter
from qwq_mlx.engine.drafters.suffix_automaton import Guess
from qwq_mlx.engine.row import Row
from qwq_mlx.engine.speculative import Draft
from qwq_mlx.errors import OptionError
from qwq_mlx.model.memory.batch_and_draft import MAX_DRAFTED

__all__ = ["DraftCounts", "Speculator"]

_PAID_IN = 0.01  # of each plain pass
_PAID_OFF = 0.005  # of each plain pass, for what a draft model took to catch up
_LARGEST_ACCOUNT = 3.0  # plain passes: what one prompt won is not all lost again on the next


@dataclass(slots=True)
class DraftCounts:
    """Ids drafted and accepted so far, by drafter ("ngram", "model"), over all rows; passes are those of one row."""

    n_passes: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, n_drafted: int, n_accepted: int) -> None:
        """Enter one checked draft."""
        self.n_passes += 1
        self.drafted[source] = self.drafted.get(source, 0) + n_drafted
        self.accepted[source] = self.accepted.get(source, 0) + n_accepted


class Speculator:
    """Drafts for the rows of one model; the decoder asks it (`speculative.Drafts`).

    ngram, model: the drafters, at least one.
    costs: of passes here. length: ids drafted whatever they cost. One of the two must be there.
    notes: for people, about the costs. clock: seconds, by which catching up is timed.
    """

    def __init__(
        self,
        *,
        ngram: NgramDrafter | None = None,
        model: ModelDrafter | None = None,
        costs: Costs | None = None,
        length: int | None = None,
        notes: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if ngram is None and model is None:
            raise OptionError("There is no drafter. Give `ngram`, `model` or both.")
        if (costs is None) == (length is None):
            raise OptionError("Give either the costs of passes, or a length that is drafted whatever it costs.")
        if length is not None and not 1 <= length <= MAX_DRAFTED:
            raise OptionError(f"length is {length}, expected from 1 to {MAX_DRAFTED} drafted ids.")
        self.counts, self.notes = DraftCounts(), tuple(notes)
        self._ngram, self._model, self._all_costs, self._length = ngram, model, costs, length
        self._costs = None if costs is None else costs.at(0)  # as long as the rows of the pass are
        self._account_s = 0.0
        self._clock, self._debt_s = clock, 0.0  # of catching up
        self._is_due = False  # ids were read before the pass that is to come
        self._token_s = 0.0  # what a token costs without drafts, in the pass under way
        self._under_way: dict[Row, list[Guess]] = {}

    @property
    def summary(self) -> str:
        """What came of the drafts so far, for people."""
        counts = self.counts
        if counts.n_passes:
            rate = 1 + sum(counts.accepted.values()) / counts.n_passes
            shares = [f"{name} {counts.accepted[name]:,} of {n:,} right" for name, n in sorted(counts.drafted.items())]
            return f"drafts: {rate:.2f} tokens a pass in {counts.n_passes:,} passes with drafts, {', '.join(shares)}"
        if self._costs is None:
            return "drafts: none, for there was nothing to draft from"
        share = self._costs.of(2) / self._costs.of(1)
        return f"drafts: none, for here a pass over 2 rows costs {share:.2f} of one over 1, and drafts promised less"

    def is_due(self, rows: Sequence[Row]) -> bool:
        """See `speculative.Drafts`."""
        costs = self._look_up(rows)
        if costs is None:
            return True
        # the automaton has to be right with the id under way too, which nobody has read
        behind = [_behind(self._ngram_guess(row, MAX_DRAFTED + 1))[: row.most_drafts] for row in rows]
        by_ngram = best_lengths(behind, costs, most_loss_s=self._account_s)
        rooms = self._model_rooms(rows, [row.most_drafts for row in rows])
        if any(by_ngram.by_row) or any(self._by_model(rooms, costs, None).by_row):
            self._is_due = True
            return True
        plain_s = costs.of(len(rows))
        self._pay_in(_PAID_IN * plain_s, plain_s)
        self._pay_off(_PAID_OFF * plain_s)
        if self._model is not None and self._account_s >= _LARGEST_ACCOUNT * plain_s:
            self._model.forget()  # it may be right again by now
        return False

    def draft(self, rows: Sequence[Row], *, most: int | None) -> list[Draft]:
        """See `speculative.Drafts`."""
        self._look_up(rows)
        rooms = self._rooms(rows, most)
        guesses = [self._ngram_guess(row, room) for row, room in zip(rows, rooms, strict=True)]
        sources = ["ngram"] * len(rows)
        drafting_s = 0.0
        if self._model is not None:
            lengths = self._model_lengths(guesses, self._model_rooms(rows, rooms), most)
            drafting_s = max(lengths) * (0.0 if self._costs is None else self._costs.draft_s)
            catches_up = any(n and self._model.lags(row) for row, n in zip(rows, lengths, strict=True))
            started = self._clock()
            by_model = self._model.guess(rows, lengths)
            if catches_up and self._costs is not None:
                self._debt_s += max(0.0, self._clock() - started - drafting_s)
            for place, drafted in enumerate(by_model):
                if drafted:
                    guesses[place], sources[place] = drafted, self._model.name
        if self._costs is not None:
            guesses = self._paid(guesses, self._costs, drafting_s, most)
        self._under_way = {row: guess for row, guess in zip(rows, guesses, strict=True) if guess}
        return [
            Draft(tuple(each.id for each in guess), source) if guess else Draft()
            for guess, source in zip(guesses, sources, strict=True)
        ]

    def learn(self, row: Row, draft: Draft, n_accepted: int) -> None:
        """See `speculative.Drafts`."""
        guesses = self._under_way.pop(row)
        drafter = self._model if self._model is not None and draft.source == self._model.name else self._ngram
        assert drafter is not None, "it made the draft"
        drafter.learn(guesses, n_accepted)
        self.counts.add(draft.source, len(draft.ids), n_accepted)
        if drafter is self._model:
            self._pay_off(n_accepted * self._token_s)
        self._pay_in(n_accepted * self._token_s, self._token_s)

    def _look_up(self, rows: Sequence[Row]) -> PassCosts | None:
        """What passes of these rows cost."""
        if self._all_costs is not None:
            self._costs = self._all_costs.at(max(len(row.ids) for row in rows))
        return self._costs

    def _rooms(self, rows: Sequence[Row], most: int | None) -> list[int]:
        """Ids that may be drafted for each row."""
        longest = MAX_DRAFTED if self._length is None else self._length
        if most is not None and self._length is not None:
            longest = min(longest, most // len(rows))  # there is no price by which they could share
        return [min(row.most_drafts, longest) for row in rows]

    def _model_rooms(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[int]:
        """The same for the model: none where it would have to catch up while that was not earned back."""
        if self._model is None or self._debt_s == 0:
            return list(rooms)
        return [0 if self._model.lags(row) else room for row, room in zip(rows, rooms, strict=True)]

    def _ngram_guess(self, row: Row, n_most: int) -> list[Guess]:
        return [] if self._ngram is None or not row.most_drafts else self._ngram.guess(row, n_most)

    def _by_model(self, rooms: Sequence[int], costs: PassCosts, most: int | None) -> Lengths:
        """The best lengths of drafts that the model has still to make, in rows with room for so many ids each."""
        expected = [] if self._model is None else self._model.expected(MAX_DRAFTED)
        expecting = [expected[:room] for room in rooms]
        return best_lengths(expecting, costs, most=most, most_loss_s=self._account_s, are_to_draft=True)

    def _model_lengths(self, guesses: Sequence[list[Guess]], rooms: Sequence[int], most: int | None) -> list[int]:
        """How many ids the model drafts for each row: none where the automaton promises more."""
        assert self._model is not None, "whoever asks has seen to it"
        costs = self._costs
        if costs is None:
            expected = self._model.expected(MAX_DRAFTED)
            pairs = list(zip(rooms, guesses, strict=True))
            return [
                room if expected_right(expected[:room]) > expected_right(_probabilities(guess)) else 0
                for room, guess in pairs
            ]
        by_ngram = [best_lengths([_probabilities(guess)], costs, most_loss_s=self._account_s).rate for guess in guesses]
        by_model = [self._by_model([room], costs, None).rate for room in rooms]
        longest = [room if rate > other else 0 for room, rate, other in zip(rooms, by_model, by_ngram, strict=True)]
        return self._by_model(longest, costs, most).by_row

    def _paid(
        self, guesses: Sequence[list[Guess]], costs: PassCosts, drafting_s: float, most: int | None
    ) -> list[list[Guess]]:
        """The guesses as long as they pay and the account covers that they are wrong; it is charged with that."""
        plain_s = costs.of(len(guesses))
        covered_s = self._account_s - drafting_s
        best = best_lengths([_probabilities(guess) for guess in guesses], costs, most=most, most_loss_s=covered_s)
        sync_s = costs.sync_s if self._is_due and not any(best.by_row) else 0.0  # waited for nothing
        self._account_s -= best.seconds - plain_s + drafting_s + sync_s
        self._is_due = False
        self._token_s = plain_s / len(guesses)
        return [guess[:n] for guess, n in zip(guesses, best.by_row, strict=True)]

    def _pay_off(self, seconds: float) -> None:
        self._debt_s = max(0.0, self._debt_s - seconds)

    def _pay_in(self, seconds: float, plain_s: float) -> None:
        self._account_s = min(self._account_s + seconds, _LARGEST_ACCOUNT * max(plain_s, seconds))


def _probabilities(guesses: Sequence[Guess]) -> list[float]:
    return [guess.probability for guess in guesses]


def _behind(guesses: Sequence[Guess]) -> list[float]:
    """The probabilities of a guess behind its first id, which has to be right for the next one to be."""
    probabilities = _probabilities(guesses)
    return [probabilities[0] * probabilities[1], *probabilities[2:]] if len(probabilities) > 1 else []
