"""Clients that send or read byte by byte: each loses its connection after a while, and nothing of it stays."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from serving import until
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from qwq_mlx.serve import body, http_thread
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.http_thread import HttpThread
from qwq_mlx.serve.settings import Settings

SECONDS = 0.3


@contextmanager
def listening(app: ASGIApp) -> Iterator[tuple[HttpThread, socket.socket]]:
    """The HTTP thread of an application, and a connection to it that takes little at once."""
    http = HttpThread(app, Settings(port=0, drain_s=1))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.settimeout(30)
        client.connect(http.start())
        try:
            yield http, client
        finally:
            http.abort()
            assert http.join(30)


async def answer_ok(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("ok")(scope, receive, send)


def trickle(client: socket.socket, raw: bytes) -> None:
    """Send it byte by byte, again and again, until the connection is closed."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        for value in raw:
            try:
                client.sendall(bytes([value]))
            except OSError:
                return
            time.sleep(0.01)
    raise AssertionError("the connection is still open")


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_thread, "_HEAD_S", SECONDS)
    monkeypatch.setattr(http_thread, "_STALL_S", SECONDS)
    monkeypatch.setattr(body, "_READ_S", SECONDS)


@pytest.mark.usefixtures("short_times")
@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_does_not_end_loses_its_connection(before: bytes) -> None:
    with listening(answer_ok) as (http, client):
        client.sendall(before + b"GET / HTTP/1.1\r\n")
        trickle(client, b"X-A: b\r\n")
        assert not http._server.server_state.connections


@pytest.mark.usefixtures("short_times")
def test_a_body_that_does_not_end_is_told_so_and_loses_its_connection() -> None:
    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await body.read_json(Request(scope, receive), max_bytes=1_000_000)
        except ApiError as error:
            await Response(str(error), status_code=error.status)(scope, receive, send)

    with listening(read) as (_, client):
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        sender = threading.Thread(target=trickle, args=(client, b" "))
        sender.start()
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        sender.join(30)
        assert not sender.is_alive()


@pytest.mark.usefixtures("short_times")
def test_a_reader_who_takes_nothing_ends_the_answer() -> None:
    ended = threading.Event()

    async def write(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1_000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        if (await receive())["type"] == "http.request":
            await receive()
        ended.set()

    with listening(write) as (http, client):
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ended.wait(30)
        until(lambda: not http._server.server_state.connections)


def test_an_answer_may_take_longer_than_a_head() -> None:
    """No time runs while it is made."""
    timers = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        timers.extend(each._head_deadline._timer for each in http._server.server_state.connections)
        await Response("ok")(scope, receive, send)

    with listening(slow) as (http, client):
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(1_000).startswith(b"HTTP/1.1 200 ")
        assert timers == [None]
