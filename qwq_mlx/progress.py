"""Progress on stderr by tqdm: a bar on a terminal, and in a file a line every ten seconds.

Does not: decide whether progress is shown (who reports it does).
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any, TextIO

__all__ = ["ProgressBar"]

_TERMINAL_S, _FILE_S = 0.1, 10.0  # between two lines: on a terminal, where one replaces the other, and in a file


class ProgressBar:
    """One bar after another, each with its own label; use as a context manager.

    unit: what is counted; "B" is shown with kB, MB, GB. is_shown: False shows nothing. stays: at the end the last state
    of a bar is left on the terminal. Threads may report to one bar.
    """

    def __init__(self, *, unit: str, is_shown: bool = True, stays: bool = False) -> None:
        self._is_shown, self._stays = is_shown, stays
        self._is_terminal = sys.stderr.isatty()
        self._out: Any = sys.stderr if self._is_terminal else _Lines(sys.stderr)
        self._unit = unit
        self._lock = threading.RLock()
        self._bar: Any = None
        self._label = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def show(
        self,
        label: str,
        n_done: int,
        n_total: int | None,
        *,
        n_before: int = 0,
        note: str = "",
        is_begun: bool = False,
    ) -> None:
        """Move the bar to n_done of n_total.

        n_before: of n_done, what took no time now.
        note: behind the rate.
        is_begun: the time until the first step counts, else it was waited for something.
        """
        if not self._is_shown:
            return
        with self._lock:
            if self._bar is None or label != self._label:
                self.clear()
                self._begin(label, n_total, n_before)
            if n_done == n_before and not is_begun:
                self._bar.unpause()
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n_done - self._bar.n)

    def add(self, label: str, n: int) -> None:
        """Move the bar by n, where nobody knows how much there is."""
        with self._lock:
            self.show(label, n + (self._bar.n if self._bar is not None and label == self._label else 0), None)

    def clear(self) -> None:
        """Take the bar off the terminal, so that a line can follow."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _begin(self, label: str, n_total: int | None, n_before: int) -> None:
        from tqdm.std import tqdm

        tqdm.monitor_interval = 0  # no thread that looks for bars that stand still
        tqdm.set_lock(self._lock)  # its own lock is one of processes, which starts another one on macOS
        every_s = _TERMINAL_S if self._is_terminal else _FILE_S
        self._label = label
        self._bar = tqdm(
            desc=label,
            total=n_total,
            initial=n_before,
            unit=self._unit,
            unit_scale=self._unit == "B",
            leave=self._stays,
            file=self._out,
            mininterval=every_s,
            miniters=0,  # a note may change where nothing is counted,
            smoothing=0,  # where tqdm's rate of the last moments would leave the time out
            delay=0 if self._is_terminal else every_s,
            dynamic_ncols=self._is_terminal,
        )


class _Lines:
    """A file that gets every state of a bar as a line of its own."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> None:
        if line := text.strip():
            self._out.write(line + "\n")

    def flush(self) -> None:
        self._out.flush()
