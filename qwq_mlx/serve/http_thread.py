"""The HTTP side in a thread of its own: listens, serves the application, and ends in order.

Does not: handle signals (`__main__` does), or own the model.
"""

from __future__ import annotations

import logging
import socket
import threading

import uvicorn
from starlette.types import ASGIApp

from qwq_mlx.errors import BackendError
from qwq_mlx.serve.settings import Settings

__all__ = ["HttpThread"]

_BACKLOG = 128
_KEEP_ALIVE_S = 30
_MAX_CONNECTIONS = 1_000  # more get status 503 at once


class HttpThread:
    """`start()` listens at once; `stop()` takes no more requests and lets those under way finish; `join()` waits."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._settings = settings
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is told, `__main__` and the log line tell
        config = uvicorn.Config(
            app,
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="qwq-mlx-http")
        self._socket: socket.socket | None = None

    def start(self) -> tuple[str, int]:
        """Listen; returns address and port. Raises BackendError where the address cannot be had."""
        settings = self._settings
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self._socket = socket.socket(family)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((settings.host, settings.port))
            self._socket.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise BackendError(
                f"{settings.host}:{settings.port} cannot be listened on ({error}). Another program has it, or the "
                "address is not of this machine; give another `port` or `host`."
            ) from error
        self._thread.start()
        host, port = self._socket.getsockname()[:2]
        return host, port

    def stop(self) -> None:
        """Take no more requests; those under way have `drain_s` seconds. Safe to call from a signal handler."""
        self._server.should_exit = True

    def abort(self) -> None:
        """Close every connection as it stands."""
        self._server.should_exit = self._server.force_exit = True

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; returns whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        assert self._socket is not None, "`start` made it"
        self._server.run(sockets=[self._socket])
