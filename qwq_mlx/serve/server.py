"""A whole server as one object: the model's thread and the HTTP thread, started and ended together.

Does not: take signals (`stop` may be called from a handler).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qwq_mlx.errors import BackendError
from qwq_mlx.serve.app import make_app
from qwq_mlx.serve.history import History
from qwq_mlx.serve.http_thread import HttpThread
from qwq_mlx.serve.runs import Runs
from qwq_mlx.serve.settings import Settings
from qwq_mlx.serve.worker import Worker

if TYPE_CHECKING:
    from qwq_mlx.generate.reasoner import Reasoner

__all__ = ["Server"]

_PASS_S = 10.0


class Server:
    """`start()`, then `wait()` until it is over; `stop()` lets running requests finish.

    load: gives the model; called in the model's thread, while HTTP answers 503.
    history: where watched runs are kept, closed at the end; None keeps none.
    log: takes a line for each request; called in the HTTP thread.
    warn: takes a line of what is lost, or cannot be kept; called there, too.
    """

    def __init__(
        self,
        load: Callable[[], Reasoner],
        settings: Settings,
        *,
        history: History | None = None,
        log: Callable[[str], None] = lambda line: None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.worker = Worker(load, settings, on_end=self.stop)
        self._runs = Runs(
            self.worker,
            heartbeat_s=settings.heartbeat_s,
            history=history,
            folder=settings.runs_folder,
            warn=warn,
        )
        app = make_app(self.worker, settings, self._runs, log=log)
        self._http = HttpThread(app, settings, drain=self._runs.drain)

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
        try:
            address = self._http.start()
        except BackendError:
            self._runs.close()
            raise
        self.worker.start()
        return address

    def stop(self) -> None:
        """Take no more requests; those and the runs under way have `drain_s`, and a model is loaded no further.

        Safe to call from a signal handler.
        """
        self.worker.stop_loading()
        self._http.stop()

    def abort(self) -> None:
        """End without waiting for requests.

        The pass under way, or what is left of loading, is waited for, at most 10 s: a thread that returns from MLX
        into an interpreter that is gone aborts the process.
        """
        self.worker.stop_loading()
        self._http.abort()
        self.worker.close(_PASS_S)

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over within so many seconds."""
        if not self._http.join(timeout_s):
            return False
        self._runs.close()
        self.worker.close()
        return True
