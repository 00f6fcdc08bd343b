"""Ctrl-C and SIGTERM while a command generates: end in order at the first, at once at the second.

Does not: save anything or exit; the command reads `exit_code` and does.
"""

from __future__ import annotations

import signal
from typing import Any, Protocol

__all__ = ["Interruption"]


class Stoppable(Protocol):
    """A run, or whatever stands for several of them."""

    def stop(self) -> None:
        """End after the token under way."""


class Interruption:
    """Ctrl-C and SIGTERM: the first ends the run after the token under way, the second ends the command at once."""

    def __init__(self) -> None:
        self.run: Stoppable | None = None
        self.exit_code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        is_second = self.exit_code != 0
        self.exit_code = 128 + number
        if is_second or self.run is None:
            raise KeyboardInterrupt
        self.run.stop()
