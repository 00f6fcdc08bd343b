"""What a peer may send over a link, and what it cannot do with it."""

from __future__ import annotations

import socket
import struct
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from qwq_mlx.engine.ranks import link as links
from qwq_mlx.engine.ranks import neighbours
from qwq_mlx.engine.ranks.link import Link, connect_all, open_links


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


def test_who_knows_nothing_or_gave_up_waiting_is_not_taken_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes again is."""
    taken: list[socket.socket] = []

    def connect(port: int, token: bytes) -> None:
        for rank, known, is_patient in ((1, bytes(16), False), (7, token, False), (1, token, False), (1, token, True)):
            peer = socket.create_connection(("127.0.0.1", port))
            peer.sendall(struct.pack(">16sI", known, rank))
            if not is_patient:
                peer.close()
                continue
            assert peer.recv(1) == b"\x01"
            peer.sendall(b"\x01" + struct.pack(">I", 12) + b'{"host":"b"}')
            taken.append(peer)

    def shared(group: Any, numbers: list[int], token: bytes) -> None:
        threading.Thread(target=connect, args=(numbers[0], token), daemon=True).start()

    monkeypatch.setattr(links, "shared_numbers", shared)
    [link] = connect_all(SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    assert link._messages.get(timeout=20) == {"host": "b"}
    link.close()
    taken[0].close()


@pytest.mark.parametrize(("leader", "host"), [("127.0.0.1", "127.0.0.1"), ("192.0.2.7", "")])
def test_only_with_ranks_on_other_machines_do_others_reach_the_port(
    monkeypatch: pytest.MonkeyPatch, leader: str, host: str
) -> None:
    addresses: list[tuple[str, int]] = []

    def create_server(address: tuple[str, int], **options: int) -> socket.socket:
        addresses.append(address)
        raise OSError("none in this test")

    monkeypatch.setenv(links.ADDRESSES_VARIABLE, leader)
    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(OSError, match="none in this test"):
        connect_all(SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    assert addresses == [(host, 0)]


@pytest.mark.parametrize("is_cut", [False, True])
def test_neighbours_hear_each_other_though_rank_0_is_none_of_them(
    monkeypatch: pytest.MonkeyPatch, is_cut: bool
) -> None:
    """Four ranks in four threads; where they cannot reach each other they work all the same."""
    monkeypatch.setenv(links.ADDRESSES_VARIABLE, ";".join(["127.0.0.1"] * 4))
    monkeypatch.setattr(neighbours, "_WAIT_S", 0.2 if is_cut else 20.0)
    barrier, given, found = threading.Barrier(4), dict[int, list[int]](), dict[int, list[Link]]()

    def shared(group: Any, numbers: list[int], token: bytes) -> tuple[list[int], bytes]:
        given[group.rank()] = numbers
        barrier.wait()
        ports = [sum(each) for each in zip(*given.values(), strict=True)]
        return [1] * 4 if is_cut else ports, b"0123456789abcdef"  # nobody listens at port 1

    def work(rank: int) -> None:
        found[rank] = neighbours.connect_neighbours(SimpleNamespace(rank=lambda: rank, size=lambda: 4))

    monkeypatch.setattr(neighbours, "shared_numbers", shared)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peers = {rank: [link.peer for link in links] for rank, links in found.items()}
    assert peers == ({rank: [] for rank in range(4)} if is_cut else {0: [], 1: [2], 2: [1, 3], 3: [2]})
    for link in (each for of_rank in found.values() for each in of_rank):
        link.close()
    assert neighbours.connect_neighbours(SimpleNamespace(rank=lambda: 0, size=lambda: 2)) == []
