"""When a run began, drew its first id and its latest: the times behind a Trace's rates.

Does not: tell the consumer's time between two Steps from the device's; a wall clock sees both.
"""

from __future__ import annotations

import time

from qwq_mlx.trace.trace import Timings

__all__ = ["Clock"]


class Clock:
    """n_prefilled: prompt ids that were fed so far."""

    def __init__(self) -> None:
        self.n_prefilled = 0
        self._n_drawn = 0
        self._started_s = self._first_s = self._latest_s = 0.0

    def start(self) -> None:
        """The run begins."""
        self._started_s = self._first_s = self._latest_s = time.perf_counter()

    def drawn(self) -> bool:
        """An id was read; whether it was the first."""
        self._latest_s = time.perf_counter()
        self._n_drawn += 1
        if self._n_drawn == 1:
            self._first_s = self._latest_s
        return self._n_drawn == 1

    def timings(self) -> Timings:
        """What was measured so far. Prefill lasts until the first id is there."""
        return Timings(
            n_prefilled=self.n_prefilled,
            prefill_s=self._first_s - self._started_s,
            n_intervals=max(0, self._n_drawn - 1),
            decode_s=self._latest_s - self._first_s,
        )
