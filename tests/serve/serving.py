"""What the tests of the server share: a server under test, and requests with nothing between them and the socket."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.serve.history import History
from qwq_mlx.serve.server import Server
from qwq_mlx.serve.settings import Settings

QUESTION = "What is 3 + 4?"
CHAT = "/v1/chat/completions"


class Served:
    """A server that listens, and its log."""

    def __init__(self, server: Server, host: str, port: int, log: list[str]) -> None:
        self.server, self.host, self.port, self.log = server, host, port, log
        self.url = f"http://{host}:{port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=30)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request and its whole answer. body: bytes as they are, anything else as JSON."""
        connection = self.connect()
        try:
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, _, body = self.send("GET", path)
        assert status == 200, body
        return json.loads(body)

    def post(self, path: str, body: Any, *, status: int = 200) -> Any:
        """The JSON that comes back with this status."""
        got, _, raw = self.send("POST", path, body)
        assert got == status, raw
        return json.loads(raw)

    def chunks(self, path: str, body: Any) -> list[Any]:
        """The events of a stream of server-sent events but for its last, which is [DONE]."""
        status, headers, raw = self.send("POST", path, {**body, "stream": True})
        assert status == 200, raw
        assert headers["content-type"].startswith("text/event-stream")
        lines = [line for line in raw.decode().split("\n\n") if line and not line.startswith(":")]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def open_stream(self, body: Any, path: str = CHAT) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A stream whose headers have come; the caller closes the connection."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return connection, response

    @property
    def is_idle(self) -> bool:
        worker = self.server.worker
        # in the order in which a job goes through them; who left the line is in it until it is counted
        return not worker._line and worker.n_running == 0


def until(is_so: Callable[[], bool], *, within_s: float = 30.0) -> None:
    """Wait for what must come; half a minute is for a busy machine."""
    end = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@contextmanager
def held_steps() -> Iterator[Callable[[int], None]]:
    """Within the block servers make no more steps than they are allowed to, so that nothing is over too early.

    Yields what allows so many more.
    """
    step, allowed = Scheduler.step, threading.Semaphore(0)

    def held(self: Scheduler) -> Any:
        assert allowed.acquire(timeout=30), "no step was allowed"
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "step", held)
        try:
            yield allowed.release
        finally:
            allowed.release(100_000)


def free_port() -> int:
    """A port of loopback that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(load: Callable[[], Reasoner], settings: Settings, *, history: History | None = None) -> Iterator[Served]:
    """A server that has loaded its model, ended behind the block."""
    log: list[str] = []
    server = Server(load, settings, history=history, log=log.append, warn=log.append)
    served = Served(server, *server.start(), log)
    try:
        until(lambda: server.worker.state != "loading")
        yield served
    finally:
        server.stop()
        if not server.wait(settings.drain_s + 30):  # a request whose client forgot its socket takes all of the drain
            faulthandler.dump_traceback(all_threads=True)
            for loop in (each for each in gc.get_objects() if isinstance(each, asyncio.AbstractEventLoop)):
                for task in asyncio.all_tasks(loop):
                    task.print_stack()
            raise AssertionError("the server did not end; what its threads and tasks do is on stderr")


def user(text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """A body of chat completions."""
    return {"messages": [{"role": "user", "content": text}], **fields}
