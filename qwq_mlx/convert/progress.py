"""Where a conversion stands, as one stream of values though two threads report.

Does not: format or print (the command does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["ConvertProgress", "SharedProgress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertProgress:
    """Where a conversion stands.

    phase: "compile" where the fit's kernel has to be, "calibrate", "convert", "quality" or "check".
    what: the tensor or file at work.
    done_bytes: of source read in phases "calibrate" (by layers, about) and "convert", of both models' weights in
      "quality", of output read back in "check"; 0 in "compile".
    total_bytes: of the same.
    resumed_bytes: of done_bytes, what an earlier run had done.
    fetched_bytes: of the source, what is on the disk or done; None where nothing is fetched.
    """

    phase: str
    what: str
    done_bytes: int
    total_bytes: int
    resumed_bytes: int = 0
    fetched_bytes: int | None = None


class SharedProgress:
    """Joins what the working and the fetching thread say, and passes it on, one value at a time."""

    def __init__(
        self, progress: Callable[[ConvertProgress], None] | None, total_bytes: int, *, phase: str = "convert"
    ) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._fetched_bytes: int | None = None
        self._last = ConvertProgress(phase=phase, what="", done_bytes=0, total_bytes=total_bytes)

    def packed(self, value: ConvertProgress) -> None:
        """A block was written."""
        with self._lock:
            self._last = replace(value, fetched_bytes=self._fetched_bytes)
            self._pass_on()

    def fetched(self, n_bytes: int) -> None:
        """n_bytes more of the source are there (fewer, where it is negative)."""
        with self._lock:
            self._fetched_bytes = (self._fetched_bytes or 0) + n_bytes
            self._last = replace(self._last, fetched_bytes=self._fetched_bytes)
            self._pass_on()

    def _pass_on(self) -> None:
        if self._progress is not None:
            self._progress(self._last)
