"""Whether this process makes progress, for whoever watches it from outside: a beating thread alone does not tell, for
it goes on while the process waits for ever inside a collective.

Does not: judge how long is too long (`cli.watch` does).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Activity", "activity"]


class Activity:
    """n_done: passes, layers of prefilled chunks and loaded layers that are finished. n_passes: passes and chunks.

    is_loading: nothing is computed yet. is_asking: somebody is asked what to do, and may take long.
    """

    def __init__(self) -> None:
        self.n_done = self.n_passes = 0
        self.is_loading = self.is_asking = False
        self._since: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it this process waits for the device, and so perhaps for other processes; it counts when it ends."""
        with self.starting():
            yield
        self.n_done += 1
        self.n_passes += not self.is_loading

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Within it work is handed to the device, for which MLX waits where there is much under way; nothing counts."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The same for weights, whose waits say nothing about those for passes."""
        self.is_loading = True
        try:
            with self.waiting():
                yield
        finally:
            self.is_loading = False

    def step(self) -> None:
        """Count something that is finished within a long wait."""
        self.n_done += 1
        if self._since is not None:
            self._since = time.monotonic()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Within it somebody is asked in a signal handler, perhaps within a wait, which is no longer counted."""
        self._since, self.is_asking = None, True
        try:
            yield
        finally:
            self.is_asking = False

    @property
    def waiting_s(self) -> float:
        """Seconds of the wait under way; 0 without one."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


activity = Activity()
"""That of this process: it holds a part of one model at a time."""
