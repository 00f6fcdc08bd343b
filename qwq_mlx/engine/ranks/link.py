"""The connections between rank 0 and each other rank: JSON messages over TCP, and an empty one every half second.

They run over the same network as MLX's own connections, which say nothing when a cable is pulled: a peer whose beats
stay away is lost, whatever its last message was. Messages go ahead of the arrays, so that the next pass is known to all
before the last one is done.

Does not: encrypt, as MLX's ring does not either; who connects has to know a number that rank 0 sent through MLX.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from qwq_mlx.engine.ranks import ADDRESSES_VARIABLE
from qwq_mlx.errors import RankError

__all__ = [
    "LOOPBACK",
    "Link",
    "accepted_links",
    "connect_all",
    "connected",
    "leader_addresses",
    "open_links",
    "shared_numbers",
]

_BEAT_S = 0.5
_CONNECT_S = 30.0
_HELLO_S = 5.0  # for whoever connects to say what it has to know; the next one waits meanwhile
_ANSWER_S = 15.0
_KNOWN = b"\x01"
_MAX_BYTES = 1 << 30
LOOPBACK = "127.0.0.1"
_LENGTH = struct.Struct(">I")
_TOKEN = struct.Struct(">4I")
_HELLO = struct.Struct(">16sI")  # the number that both know, and the rank


open_links: set[Link] = set()
"""Of this process; copied in one go, as another thread looks at it."""


class Link:
    """One connection. peer: the rank at its other end. is_asked_to_stop: there, by a Ctrl-C."""

    def __init__(self, connection: socket.socket, peer: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self._connection = connection
        self._sending = threading.Lock()
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._heard = time.monotonic()
        self.is_closed = False
        self.is_asked_to_stop = False
        self._asks_to_stop = False
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True, name=f"link-{peer}-{work.__name__}").start()
        open_links.add(self)

    @property
    def silent_s(self) -> float:
        """Seconds since the peer was last heard."""
        return time.monotonic() - self._heard

    def send(self, message: dict[str, Any]) -> None:
        """Raises RankError where the peer has gone."""
        self._write(json.dumps(message, separators=(",", ":")).encode())

    def ask_to_stop(self) -> None:
        """Let the peer know of a Ctrl-C here with the next beat.

        Safe in a signal handler, which may interrupt a `send` of its own thread and would wait for it for ever.
        """
        self._asks_to_stop = True

    def receive(self) -> dict[str, Any]:
        """The next message; waits for it. Raises RankError where the peer has gone."""
        message = self._messages.get()
        if message is None:
            self._messages.put(None)
            raise self._gone()
        return dict(message)

    def close(self) -> None:
        """End the connection; the peer's `receive` then raises."""
        self.is_closed = True
        open_links.discard(self)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _gone(self) -> RankError:
        return RankError(f"Process {self.peer} is gone: it has closed its connection.")

    def _write(self, data: bytes) -> None:
        try:
            with self._sending:
                self._connection.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise self._gone() from error

    def _beat(self) -> None:
        with contextlib.suppress(RankError):
            while not self.is_closed:
                asks, self._asks_to_stop = self._asks_to_stop, False
                self._write(b'{"stop":true}' if asks else b"")
                time.sleep(_BEAT_S)

    def _read(self) -> None:
        try:
            while True:
                [n_bytes] = _LENGTH.unpack(_exactly(self._connection, _LENGTH.size))
                if n_bytes > _MAX_BYTES:
                    raise ValueError(f"a message of {n_bytes:,} bytes")
                data = _exactly(self._connection, n_bytes)
                self._heard = time.monotonic()
                message = json.loads(data) if data else {}
                if not isinstance(message, dict):
                    raise ValueError(f"a message that is a {type(message).__name__}")
                if message.get("stop"):
                    self.is_asked_to_stop = True
                elif message:
                    self._messages.put(message)
        except (OSError, ValueError, RecursionError):  # it has gone, or is not what it should be
            self.is_closed = True
            self._messages.put(None)


def _exactly(connection: socket.socket, n_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < n_bytes:
        part = connection.recv(min(n_bytes - len(data), 1 << 20))
        if not part:
            raise OSError("the connection was closed")
        data += part
    return bytes(data)


def connect_all(group: Any) -> list[Link]:
    """The links of this rank: to all others for rank 0, else to rank 0 alone. Every rank of the group calls it.

    Raises RankError where somebody does not come within 30 s.
    """
    if group.rank() == 0:
        return _accepted(group)
    [port], token = shared_numbers(group, [0], bytes(16))
    addresses = leader_addresses(os.environ)
    link = connected(addresses, port, token, rank=group.rank(), peer=0, wait_s=_CONNECT_S)
    if isinstance(link, Link):
        return [link]
    raise RankError(
        f"Process {group.rank()} cannot reach process 0 at port {port} of {', '.join(addresses)} ({link}). Let its "
        "firewall accept connections to Python."
    )


def connected(
    addresses: Sequence[str], port: int, token: bytes, *, rank: int, peer: int, wait_s: float
) -> Link | OSError | None:
    """A link to a peer that accepts at one of its addresses; else the last error."""
    last: OSError | None = None
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), timeout=5)
            except OSError as error:
                last = error
                continue
            try:
                connection.settimeout(_ANSWER_S)
                connection.sendall(_HELLO.pack(token, rank))
                if connection.recv(1) == _KNOWN:
                    connection.sendall(_KNOWN)
                    return Link(connection, peer)
            except OSError as error:
                last = error
            connection.close()
        time.sleep(0.2)
    return last


def _accepted(group: Any) -> list[Link]:
    token = secrets.token_bytes(16)
    is_alone = leader_addresses(os.environ) == [LOOPBACK]  # then no other machine has a rank
    with socket.create_server((LOOPBACK if is_alone else "", 0), backlog=group.size()) as server:
        shared_numbers(group, [server.getsockname()[1]], token)
        links, missing = accepted_links(server, token, range(1, group.size()), wait_s=_CONNECT_S)
    if missing:
        for link in links:
            link.close()
        raise RankError(
            f"Process {min(missing)} of {group.size()} did not connect to process 0 within {_CONNECT_S:.0f} s. "
            "Let this machine's firewall accept connections to Python."
        )
    return links


def accepted_links(
    server: socket.socket, token: bytes, ranks: Iterable[int], *, wait_s: float
) -> tuple[list[Link], set[int]]:
    """Links from those of some ranks that connect in time, by rank, and those that did not."""
    missing, links = set(ranks), dict[int, Link]()
    until = time.monotonic() + wait_s
    while missing and (left_s := until - time.monotonic()) > 0:
        server.settimeout(left_s)
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            rank = _rank_of(connection, token, missing)
            if rank is not None:
                links[rank] = Link(connection, rank)
                missing.remove(rank)
    return [links[rank] for rank in sorted(links)], missing


def _rank_of(connection: socket.socket, token: bytes, missing: Collection[int]) -> int | None:
    """Which of the missing processes has connected; None for anybody else, who is not listened to, and for one that has
    given up waiting and comes again."""
    connection.settimeout(_HELLO_S)
    with contextlib.suppress(OSError):
        known, rank = _HELLO.unpack(_exactly(connection, _HELLO.size))
        if hmac.compare_digest(known, token) and rank in missing:
            connection.sendall(_KNOWN)
            if _exactly(connection, 1) == _KNOWN:
                return int(rank)
    connection.close()
    return None


def shared_numbers(group: Any, numbers: Sequence[int], token: bytes) -> tuple[list[int], bytes]:
    """The sums over ranks of some numbers and of 16 bytes, which all but one give as zeros."""
    mine = mx.array([*numbers, *_TOKEN.unpack(token)], mx.uint32)
    sums = cast("list[int]", mx.distributed.all_sum(mine, group=group).tolist())
    return sums[: len(numbers)], _TOKEN.pack(*sums[len(numbers) :])


def leader_addresses(environment: Mapping[str, str]) -> list[str]:
    """Where rank 0 may be reached, from what launchers put into the environment; this machine comes last.

    >>> leader_addresses({"NCCL_HOST_IP": "10.0.0.1"})
    ['10.0.0.1', '127.0.0.1']
    """
    addresses = [each for each in environment.get(ADDRESSES_VARIABLE, "").partition(";")[0].split(",") if each]
    hostfile = environment.get("MLX_HOSTFILE")
    if hostfile and Path(hostfile).is_file():  # of mlx.launch
        with contextlib.suppress(ValueError, IndexError, TypeError):
            addresses += [each.rpartition(":")[0] for each in json.loads(Path(hostfile).read_text())[0]]
    for name in ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        if value := environment.get(name):
            addresses.append(value.partition(":")[0])
    return list(dict.fromkeys([*addresses, LOOPBACK]))
