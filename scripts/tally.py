"""Counts of a long run as it goes: a line per so many events, and a clean stop at a budget or at Ctrl-C.

The scripts that break things for hours count with it, so that a run that is cut short still says what it saw. A count
whose name is in CAPITALS is of what must not happen.

Does not: end a process; a first Ctrl-C lets the event under way end, a second one is a KeyboardInterrupt.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

EVERY = 10
_EVERY_HEADERS = 100_000


class Tally(Counter[str]):
    """The counts of the part under way. `begin`, loop over `until`, `end`; `finish` gives the exit code.

    budget_s: seconds for all parts together; None never stops. every: events between two lines on stderr.
    """

    def __init__(self, budget_s: float | None = None, every: int = EVERY) -> None:
        super().__init__()
        self._every, self._part, self._n_bad, self._is_interrupted = every, "", 0, False
        self._cut: list[str] = []  # parts that did not come to their end
        self._began = time.monotonic()
        self._end = None if budget_s is None else self._began + budget_s

    def stop_at_interrupt(self) -> Tally:
        """Take the first Ctrl-C as the end of the budget."""

        def stop(signum: int, frame: FrameType | None) -> None:
            self._is_interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("stopping after what is under way; Ctrl-C again stops at once", file=sys.stderr, flush=True)

        signal.signal(signal.SIGINT, stop)
        return self

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent or Ctrl-C was pressed."""
        return self._is_interrupted or (self._end is not None and time.monotonic() >= self._end)

    def begin(self, part: str) -> None:
        """Start a part with all counts at zero."""
        self.clear()
        self._part, self._began = part, time.monotonic()

    def until(self, what: str, n: int) -> Iterator[int]:
        """Numbers from 0 while fewer than n of `what` are counted and there is time."""
        number = shown = 0
        while self[what] < n:
            if self.is_over:
                self._cut.append(self._part)
                return
            yield number
            number += 1
            if self[what] // self._every > shown // self._every or self[what] >= n:
                shown = self[what]
                print(self._progress(what, n), file=sys.stderr, flush=True)

    def end(self) -> None:
        """Print the part's counts on stdout."""
        left = " (cut short)" if self._part in self._cut else ""
        print(f"{self._part}{left}: {self._text() or 'nothing done'}", flush=True)
        self._n_bad += sum(n for what, n in self.items() if what.isupper())

    def finish(self) -> int:
        """Print the verdict; 1 if anything was not good."""
        if self._n_bad:
            print(f"{self._n_bad} NOT GOOD")
        else:
            print("all good so far; cut short by the budget or Ctrl-C" if self._cut else "all good")
        return 1 if self._n_bad else 0

    def _text(self) -> str:
        return ", ".join(f"{n:,} {what}" for what, n in sorted(self.items()) if n)

    def _progress(self, what: str, n: int) -> str:
        done, took_s = self[what], time.monotonic() - self._began
        left_s, rate = max(0, n - done) * took_s / max(done, 1), 60 * done / max(took_s, 1e-9)
        left = f"{rate:,.1f} a minute, {left_s / 60:.1f} minutes left"
        return f"{self._part}: {done:,} of {n:,}, {left} | {self._text()}"


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The option that a `Tally` is made with."""
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="stop after the event then under way (default: at the end)"
    )


def fuzz_headers(run: Callable[[int, int, Path, Tally], int], *, description: str, suffix: str) -> int:
    """The command line of a script that mutates headers; returns the exit code.

    run: called with the number of headers, the seed, the file for an input that breaks a promise, and a tally.
    suffix: of that file.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--headers", type=int, default=1_000_000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default 0)")
    default = Path(tempfile.gettempdir()) / f"fuzz.{suffix}"
    parser.add_argument("--save", type=Path, default=default, help="where an input that breaks a promise goes")
    add_budget(parser)
    options = parser.parse_args()
    tally = Tally(options.budget, _EVERY_HEADERS).stop_at_interrupt()
    return run(options.headers, options.seed, options.save, tally)
