"""How many ids to draft: as many as give the most tokens a second by what passes cost here.

A pass over M rows costs what was measured for M (`PassCosts`); the tokens that come of it are one a row and those
drafts that are right. Drafts are taken in the order of their probability of being reached and right, over all rows of
a batch, as long as the rate is best: where rows are cheap there are more of them.

Does not: measure (`pass_costs` does), or guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from qwq_mlx.errors import OptionError

__all__ = ["Costs", "CostsAt", "Lengths", "PassCosts", "best_lengths", "costs_at", "expected_right"]


class Costs(Protocol):
    """What passes cost at each context length."""

    def at(self, context: int) -> PassCosts:
        """Where the longest row holds this many ids."""
        ...


_CONTEXT_STEP = 256  # a cache grows by so many positions


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """Seconds on one machine with one model.

    by_rows: of a pass over 1, 2, 3 ... rows, in the pipelined loop.
    sync_s: what a pass costs more where its ids are read before the next one is built.
    draft_s: of one id of the draft model; 0 where there is none.

    >>> costs = PassCosts(by_rows=(1.0, 1.1, 1.4), sync_s=0.1)
    >>> costs.of(2), round(costs.of(4), 6)
    (1.1, 1.7)
    """

    by_rows: tuple[float, ...]
    sync_s: float
    draft_s: float = 0.0

    def __post_init__(self) -> None:
        values = (*self.by_rows, self.sync_s, self.draft_s)
        if not self.by_rows or not all(math.isfinite(each) and each >= 0 for each in values) or self.by_rows[0] == 0:
            raise OptionError(f"PassCosts are {values}, expected seconds of at least one pass, none below 0.")

    def of(self, n_rows: int) -> float:
        """Of a pass over n_rows, at least 1; beyond what was measured each row costs what the last one did."""
        if n_rows <= len(self.by_rows):
            return self.by_rows[n_rows - 1]
        last = self.by_rows[-1] - self.by_rows[-2] if len(self.by_rows) > 1 else self.by_rows[0]
        return self.by_rows[-1] + (n_rows - len(self.by_rows)) * max(last, 0.0)

    def at(self, context: int) -> PassCosts:
        """These costs, whatever the context: where one length was measured."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class CostsAt:
    """Costs of passes that were measured with so many ids in the cache."""

    context: int
    costs: PassCosts


class _ByContext:
    """Costs of several context lengths; between and beyond two of them each pass costs what a straight line says."""

    def __init__(self, points: Sequence[CostsAt]) -> None:
        self._points = sorted(points, key=lambda point: point.context)
        self._known: dict[int, PassCosts] = {}

    def at(self, context: int) -> PassCosts:
        """See `Costs`; contexts are told apart by steps of 256."""
        step = max(context, self._points[0].context) // _CONTEXT_STEP
        if step not in self._known:
            self._known[step] = self._between(max(step * _CONTEXT_STEP, self._points[0].context))
        return self._known[step]

    def _between(self, context: int) -> PassCosts:
        high = next((n for n, point in enumerate(self._points) if point.context >= context), len(self._points) - 1)
        low, end = self._points[max(high - 1, 0)], self._points[max(high, 1)]
        share = (context - low.context) / (end.context - low.context)
        n_rows = max(len(low.costs.by_rows), len(end.costs.by_rows))

        def line(before: float, after: float) -> float:
            return max(before, before + share * (after - before))  # a longer context is never cheaper

        by_rows = [line(low.costs.of(n), end.costs.of(n)) for n in range(1, n_rows + 1)]
        return PassCosts(by_rows=tuple(by_rows), sync_s=low.costs.sync_s, draft_s=low.costs.draft_s)


def costs_at(points: Sequence[CostsAt]) -> Costs:
    """Costs at any context from those at some, at least one.

    >>> points = [CostsAt(context=n, costs=PassCosts(by_rows=(1.0, 1.0 + n / 1024), sync_s=0.1)) for n in (256, 1280)]
    >>> costs_at(points).at(768).by_rows, costs_at(points).at(2304).by_rows
    ((1.0, 1.75), (1.0, 3.25))
    """
    return points[0].costs if len(points) == 1 else _ByContext(points)


class Lengths(NamedTuple):
    """ids to draft for each row, what a pass then costs in seconds, and how many tokens it is expected to give."""

    by_row: list[int]
    seconds: float
    n_tokens: float

    @property
    def rate(self) -> float:
        """Expected tokens a second."""
        return self.n_tokens / self.seconds


def expected_right(probabilities: Sequence[float]) -> float:
    """Leading ids of a draft that are expected to be right. probabilities: of each, where those before it are right.

    >>> expected_right([0.5, 0.5])
    0.75
    """
    reached, total = 1.0, 0.0
    for probability in probabilities:
        reached *= probability
        total += reached
    return total


def best_lengths(
    probabilities: Sequence[Sequence[float]],
    costs: PassCosts,
    *,
    most: int | None = None,
    most_loss_s: float = math.inf,
    are_to_draft: bool = False,
) -> Lengths:
    """The lengths with the most expected tokens a second; all 0 where plain decoding gives as many.

    probabilities: of each row's drafted ids, that it is right where those before it are.
    most: ids of all rows together; None is any number.
    most_loss_s: seconds that the pass may cost beyond a plain one.
    are_to_draft: each place costs costs.draft_s more.

    >>> cheap, costly = PassCosts(by_rows=(1.0, 1.1, 1.2), sync_s=0.1), PassCosts(by_rows=(1.0, 2.0, 3.0), sync_s=0.1)
    >>> best_lengths([[0.8, 0.1]], cheap).by_row, best_lengths([[0.8, 0.1]], costly).by_row
    ([1], [0])
    """
    reached = []
    for row, of_ids in enumerate(probabilities):
        probability = 1.0
        for place, each in enumerate(of_ids):
            probability *= each
            reached.append((-probability, place, row))
    reached.sort()  # a row's later ids are never more probable, and of equal ones the earlier place comes first
    n_rows = max(1, len(probabilities))
    n_tokens, n_longest = float(n_rows), 0
    lengths = [0] * len(probabilities)
    best = Lengths(list(lengths), costs.of(n_rows), n_tokens)
    for n_drafted, (probability, place, row) in enumerate(reached[:most], start=1):
        n_tokens -= probability
        lengths[row] = place + 1
        n_longest = max(n_longest, place + 1)
        seconds = costs.of(n_rows + n_drafted) + costs.sync_s + are_to_draft * n_longest * costs.draft_s
        if seconds - costs.of(n_rows) > most_loss_s:
            break
        if n_tokens / seconds > best.rate:
            best = Lengths(list(lengths), seconds, n_tokens)
    return best
