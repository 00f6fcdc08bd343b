"""A whole server as one object: the model's thread and the HTTP thread, started and ended together.

Does not: take signals (`stop` may be called from a handler).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qwq_mlx.serve.app import make_app
from qwq_mlx.serve.http_thread import HttpThread
from qwq_mlx.serve.settings import Settings
from qwq_mlx.serve.worker import Worker

if TYPE_CHECKING:
    from qwq_mlx.generate.reasoner import Reasoner

__all__ = ["Server"]

_PASS_S = 10.0


class Server:
    """`start()`, then `wait()` until it is over; `stop()` lets running requests finish.

    load: gives the model; called in the model's thread, while HTTP answers 503.
    log: takes a line for each request; called in the HTTP thread.
    """

    def __init__(
        self, load: Callable[[], Reasoner], settings: Settings, *, log: Callable[[str], None] = lambda line: None
    ) -> None:
        self.worker = Worker(load, settings, on_end=self.stop)
        self._http = HttpThread(make_app(self.worker, settings, log=log), settings)

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self.worker.state == "ready"

    @property
    def failure(self) -> BaseException | None:
        """What ended it, None where it was asked to end."""
        return self.worker.failure

    @property
    def description(self) -> str:
        """The model and what it can do, in a line."""
        card = self.worker.card
        return f"{card.name}, {card.weights}, {card.context:,} positions, {card.width} requests side by side"

    def start(self) -> tuple[str, int]:
        """Listen, and begin to load. Returns address and port. Raises BackendError where there is no such address."""
        address = self._http.start()
        self.worker.start()
        return address

    def stop(self) -> None:
        """Take no more requests; those under way have `drain_s`. Safe to call from a signal handler."""
        self._http.stop()

    def abort(self) -> None:
        """End without waiting for requests.

        The pass under way, or what is left of loading, is waited for, at most 10 s: a thread that returns from MLX
        into an interpreter that is gone aborts the process.
        """
        self._http.abort()
        self.worker.close(_PASS_S)

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over within so many seconds."""
        if not self._http.join(timeout_s):
            return False
        self.worker.close()
        return True
