"""Bodies and headers that no client sends: never a status of 500 or a dead server (more: scripts/fuzz_server.py)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from serving import Served, until

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import fuzz_server

pytestmark = pytest.mark.tiny


def test_mutated_bodies_get_a_status_below_500(tiny_server: Served) -> None:
    choose, statuses = random.Random(3), set()
    for _ in range(250):
        raw = fuzz_server.request(*fuzz_server.body(choose))
        status = fuzz_server.status_of(tiny_server.host, tiny_server.port, raw)
        assert status and fuzz_server.is_kept(status), raw
        statuses.add(status)
    assert {200, 400} <= statuses
    until(lambda: tiny_server.is_idle)
    assert tiny_server.get("/health")["status"] == "ok"


def test_mutated_headers_get_a_status_below_500_or_a_closed_connection(tiny_server: Served) -> None:
    choose = random.Random(3)
    for _ in range(60):
        raw = fuzz_server.head(choose)
        assert fuzz_server.is_kept(fuzz_server.status_of(tiny_server.host, tiny_server.port, raw, timeout_s=0.5)), raw
    assert tiny_server.get("/health")["status"] == "ok"
