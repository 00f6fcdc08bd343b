"""The HTTP side in a thread of its own: listens, serves the application, and ends in order.

A client may take its time only so far. uvicorn closes a connection on which nothing comes, but waits for ever for a
head that comes byte by byte, and for a reader that takes nothing; so `_Connection` counts the seconds of both.

Does not: handle signals (`__main__` does), or own the model.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwq_mlx.errors import BackendError
from qwq_mlx.serve.settings import Settings

__all__ = ["HttpThread"]

_BACKLOG = 128
_KEEP_ALIVE_S = 30
_MAX_CONNECTIONS = 1_000  # more get status 503 at once
_HEAD_S = 60.0  # from the connection, or the end of an answer, to the end of the next request's head
_STALL_S = 60.0  # of a reader behind whom 64 kB wait


class _Deadline:
    """`start(seconds)` lets the time run, unless it runs already; `stop()` before its end, or `action` is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
        self._loop, self._action = loop, action
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._action)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Connection(H11Protocol):
    """uvicorn's own, closed as it stands where its client is too slow."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_deadline = _Deadline(self.loop, transport.abort)
        self._reader_deadline = _Deadline(self.loop, transport.abort)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_deadline.start(_STALL_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_deadline.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_deadline.stop()
        self._reader_deadline.stop()
        super().connection_lost(exc)

    def _time_head(self) -> None:
        """Let the time run while no request is answered; bytes that come do not set it back."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_deadline.stop()
        else:
            self._head_deadline.start(_HEAD_S)


class HttpThread:
    """`start()` listens at once; `stop()` takes no more requests and lets those under way finish; `join()` waits.

    drain: awaited in the loop behind the last request, for what no request holds; called with what says how many
      seconds are left, -inf behind an `abort`.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        *,
        drain: Callable[[Callable[[], float]], Awaitable[None]] | None = None,
    ) -> None:
        self._settings, self._drain = settings, drain
        self._ends_at = math.inf
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is told, `__main__` and the log line tell
        config = uvicorn.Config(
            app,
            http=_Connection,
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
        self._ends_at = min(self._ends_at, time.monotonic() + self._settings.drain_s)
        self._server.should_exit = True

    def abort(self) -> None:
        """Close every connection as it stands."""
        self._server.should_exit = self._server.force_exit = True

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; returns whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        assert self._socket is not None, "`start` made it"
        await self._server.serve(sockets=[self._socket])
        if self._drain is not None:
            await self._drain(self._left_s)

    def _left_s(self) -> float:
        return -math.inf if self._server.force_exit else self._ends_at - time.monotonic()
