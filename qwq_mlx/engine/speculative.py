"""Drafted ids, checked by the model in one pass: several tokens a pass, and not one id changed.

Somebody (`Drafts`) guesses how a row goes on. The row's last id and the guess are fed together, the logits at each of
their places are worked out, and at each place the model's own id is drawn, with the noise of that place and with all
that the row's draws depend on. The guess is kept as far as it equals those draws, so what comes out is what plain
decoding draws with that seed, at any temperature. A drafter that draws its guesses with the same noise agrees more
often than one that does not.

Source: Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding" (arXiv
2408.07978).

Does not: guess (`drafters` do), or know what a pass costs (`draft_length` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from qwq_mlx.engine.row import Pending, ProcessorStates, Ready, Row

__all__ = ["Draft", "Drafts", "Verification", "n_accepted"]


class Draft(NamedTuple):
    """ids: that a row may go on with, perhaps none. source: who guessed them."""

    ids: tuple[int, ...] = ()
    source: str = ""


class Drafts(Protocol):
    """What the decoder asks for drafts."""

    def is_due(self, rows: Sequence[Row]) -> bool:
        """Whether the next pass of these rows is to check drafts.

        Their ids are then read before the pass is built; else the pass is under way while they are read.
        """
        ...

    def draft(self, rows: Sequence[Row], *, most: int | None) -> list[Draft]:
        """A guess for each of these rows, of at most `row.most_drafts` ids; `most` for all together, None is any."""
        ...

    def learn(self, row: Row, draft: Draft, n_accepted: int) -> None:
        """Take what came of a draft of at least one id. Called before the row hands the drawn tokens out."""
        ...


class Verification(NamedTuple):
    """A pass under way over a row's last id and a draft.

    draws: at each of its places. states: of the row's processors behind each draw.
    """

    row: Row
    draft: Draft
    draws: list[Pending]
    states: list[ProcessorStates]


def n_accepted(draft: Sequence[int], read: Sequence[Ready]) -> int:
    """Leading ids of a draft that the model drew itself. read: what came of each place, one more than ids.

    >>> from qwq_mlx.engine.row import Token
    >>> n_accepted((5, 6, 7), [Ready(Token(drawn, 0.0, None)) for drawn in (5, 6, 9, 1)])
    2
    """
    for place, drafted in enumerate(draft):
        token = read[place].token
        if isinstance(token, Exception) or token.id != drafted:
            return place
    return len(draft)
