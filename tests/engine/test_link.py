"""What a peer may send over a link, and what it cannot do with it."""

from __future__ import annotations

import socket
import struct

import pytest

from qwq_mlx.engine.ranks.link import Link, open_links


@pytest.mark.parametrize(
    "sent",
    [b"[1]", b"7", b"{", b"[" * 100_000, b"\xff", None],
    ids=["a list", "a number", "no JSON", "deep", "no UTF-8", "2 GiB"],
)
def test_a_peer_that_sends_something_else_than_a_message_is_gone(sent: bytes | None) -> None:
    """Whoever waits for it is told, instead of waiting for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        link = Link(server.accept()[0], 1)
        assert link in open_links
        peer.sendall(struct.pack(">I", 1 << 31) if sent is None else struct.pack(">I", len(sent)) + sent)
        assert link._messages.get(timeout=20) is None
        link.close()
        assert link.is_closed and link not in open_links
