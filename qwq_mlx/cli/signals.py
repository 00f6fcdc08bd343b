"""Ctrl-C, SIGTERM and SIGHUP while a command generates: end in order at the first, at once at the second.

At a terminal the first Ctrl-C asks instead: answer now, save and stop, stop, or go on. The question is asked inside the
signal handler with plain reads and writes of the terminal's files, so it comes at once also in a long prefill, and
never meets a half-written buffer.

SIGHUP says that the terminal was closed. Nothing can be shown on it any more, so what is written there from then on
goes nowhere instead of ending the command before it has saved. Shell and kernel may both send it, so a second one is
none; where the command was started to outlive its terminal (nohup) it is left ignored.

Does not: save anything or exit; the command reads `exit_code` and `wants_save`, and does.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Protocol, runtime_checkable

from qwq_mlx.engine.ranks.activity import activity

__all__ = ["QUESTION", "Interruption", "silence"]

_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none

QUESTION = b"\n[a]nswer now, [s]ave and stop, s[t]op; Enter goes on, Ctrl-C ends at once: "


class Stoppable(Protocol):
    """A run, or whatever stands for several of them."""

    def stop(self) -> None:
        """End after the token under way."""


@runtime_checkable
class Answerable(Stoppable, Protocol):
    """One run that can be asked for its answer; several at once are only stopped."""

    def answer_now(self) -> None:
        """End the thinking and ask for the answer."""


@runtime_checkable
class Forwarding(Stoppable, Protocol):
    """Another process that does the work, and gets every signal itself."""

    def forward(self, number: int) -> None:
        """Hand a signal on."""


def silence(*descriptors: int) -> None:
    """From now on what is written to these open files goes nowhere, without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for each in descriptors:
        os.dup2(nowhere, each)
    os.close(nowhere)


class Interruption:
    """Ctrl-C, SIGTERM, SIGHUP: the first ends the run after the token under way, the second ends the command at once.

    asks: whether a first Ctrl-C asks what to do; None asks where stdin and stderr are a terminal. exit_code: 0, or what
    the command exits with where the run was interrupted. wants_save: the run is to be saved.
    """

    def __init__(self, *, asks: bool | None = None) -> None:
        self.run: Stoppable | None = None
        self.exit_code = 0
        self.wants_save: bool | None = None
        self._asks = sys.stdin.isatty() and sys.stderr.isatty() if asks is None else asks
        self._before: dict[int, Any] = {}
        self._shown: list[int] = []

    def __enter__(self) -> Interruption:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
            numbers.append(_HANGUP)
        for number in numbers:
            self._before[number] = signal.signal(number, self._on_signal)
        self._shown = [file.fileno() for file in (sys.stdout, sys.stderr) if file.isatty()]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        if number == _HANGUP:
            silence(*self._shown)
        if isinstance(self.run, Forwarding):
            self.run.forward(number)
            return
        if number == _HANGUP and self.exit_code:
            return
        is_second = self.exit_code != 0
        self.exit_code = 128 + number
        if is_second or self.run is None:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._asks and self._goes_on(self.run):
            self.exit_code = 0  # the run goes on, and the next Ctrl-C asks again
            return
        self.run.stop()

    def _goes_on(self, run: Stoppable) -> bool:
        """Ask until there is an answer; a signal meanwhile is the second."""
        if not isinstance(run, Answerable):
            return False
        with activity.asking():  # whoever thinks about the answer is no process that hangs
            return self._answered(run)

    def _answered(self, run: Answerable) -> bool:
        error, stdin = sys.stderr.fileno(), sys.stdin.fileno()
        while True:
            try:
                os.write(error, QUESTION)
                line = os.read(stdin, 1024)
            except OSError:
                line = b""
            if not line:
                return False  # the terminal is gone
            answer = line.strip().lower()[:1]
            if answer == b"a":
                run.answer_now()
            if answer in (b"a", b""):
                return True
            if answer in (b"s", b"t"):
                self.wants_save = answer == b"s"
                return False
