"""Connections between neighbours of MLX's ring, neither of which is rank 0: they carry beats alone, so that whoever
watches all processes knows which two do not hear each other any more.

Does not: matter to the work. Where a neighbour cannot be reached (a firewall), their loss is noticed later, as a hang.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from typing import Any

from qwq_mlx.engine.ranks import ADDRESSES_VARIABLE
from qwq_mlx.engine.ranks.link import LOOPBACK, Link, accepted_links, connected, shared_numbers

__all__ = ["connect_neighbours"]

_WAIT_S = 5.0


def connect_neighbours(group: Any) -> list[Link]:
    """The links of this rank to those before and behind it but rank 0, where `--hosts` started more than two. Every
    rank of the group calls it."""
    addresses = [each.split(",") for each in os.environ.get(ADDRESSES_VARIABLE, "").split(";")]
    rank, n_ranks = group.rank(), group.size()
    if n_ranks < 3 or len(addresses) != n_ranks:
        return []
    is_alone = all(each == [LOOPBACK] for each in addresses)  # no other machine has a rank
    with contextlib.ExitStack() as stack:
        server: socket.socket | None = None
        if 0 < rank < n_ranks - 1:
            server = stack.enter_context(socket.create_server((LOOPBACK if is_alone else "", 0), backlog=1))
        ports = [0] * n_ranks
        ports[rank] = 0 if server is None else server.getsockname()[1]
        ports, token = shared_numbers(group, ports, bytes(16) if rank else secrets.token_bytes(16))
        links: list[Link] = []
        if rank > 1:
            before = connected(addresses[rank - 1], ports[rank - 1], token, rank=rank, peer=rank - 1, wait_s=_WAIT_S)
            links += [before] if isinstance(before, Link) else []
        if server is not None:
            links += accepted_links(server, token, [rank + 1], wait_s=_WAIT_S)[0]
        return links
