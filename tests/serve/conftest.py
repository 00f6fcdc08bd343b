"""Servers on a real socket of loopback, with the pocket model or with a tiny random one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Served, started

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.generate.reasoner import load
from qwq_mlx.serve.settings import Settings


@pytest.fixture(scope="session")
def pocket_server() -> Iterator[Served]:
    """Answers puzzles."""
    with started(lambda: load(pocket_checkpoint()), Settings(port=0, name="pocket", queue=4)) as served:
        yield served


@pytest.fixture(scope="session")
def tiny_server(known_checkpoint: Path) -> Iterator[Served]:
    """Writes random text until it is stopped; two rows, and two requests may wait."""
    settings = Settings(port=0, name="tiny", width=2, queue=2, heartbeat_s=0.2)
    with started(lambda: load(known_checkpoint), settings) as served:
        yield served


@pytest.fixture
def serve(known_checkpoint: Path) -> Iterator[Callable[[Settings], Served]]:
    """Start a server of one's own."""
    opened = []

    def start(settings: Settings) -> Served:
        context = started(lambda: load(known_checkpoint), settings)
        opened.append(context)
        return context.__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)
