"""Where the time of a run went: the clock that runs with it, and the rates of a finished one.

Does not: tell the consumer's time between two Steps from the device's; a wall clock sees both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Clock", "Timings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went. Rates are None where nothing was measured.

    n_prefilled: prompt ids that were fed.
    prefill_s: seconds until the first id was there.
    n_intervals: intervals between output ids, one fewer than there are ids.
    decode_s: seconds from the first output id to the last.
    drafted: ids that were guessed, by source: "ngram" or "model"; empty where nothing was drafted.
    accepted: of them, ids that the model drew itself.

    >>> Timings(n_prefilled=100, prefill_s=0.5, n_intervals=40, decode_s=2.0).decode_tok_s
    20.0
    """

    n_prefilled: int
    prefill_s: float
    n_intervals: int
    decode_s: float
    drafted: Mapping[str, int] = field(default_factory=dict)
    accepted: Mapping[str, int] = field(default_factory=dict)

    @property
    def prefill_tok_s(self) -> float | None:
        """Prompt ids per second."""
        return self.n_prefilled / self.prefill_s if self.prefill_s > 0 and self.n_prefilled else None

    @property
    def decode_tok_s(self) -> float | None:
        """Output ids per second, over the n - 1 intervals between n ids."""
        return self.n_intervals / self.decode_s if self.decode_s > 0 and self.n_intervals else None


class Clock:
    """n_prefilled: prompt ids that were fed so far."""

    def __init__(self) -> None:
        self.n_prefilled = 0
        self._n_drawn = 0
        self._started_s = self._first_s = self._latest_s = 0.0

    def start(self) -> None:
        """The run begins."""
        self._started_s = self._first_s = self._latest_s = time.perf_counter()

    @property
    def has_drawn(self) -> bool:
        """Whether an id was read."""
        return self._n_drawn > 0

    def drawn(self) -> None:
        """An id was read."""
        self._latest_s = time.perf_counter()
        self._n_drawn += 1
        if self._n_drawn == 1:
            self._first_s = self._latest_s

    def timings(self) -> Timings:
        """What was measured so far. Prefill lasts until the first id is there."""
        return Timings(
            n_prefilled=self.n_prefilled,
            prefill_s=self._first_s - self._started_s,
            n_intervals=max(0, self._n_drawn - 1),
            decode_s=self._latest_s - self._first_s,
        )
