"""What a rank other than 0 says of itself while it makes a pass."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.engine.ranks.activity import activity
from qwq_mlx.engine.ranks.follower import Follower


def test_a_pass_that_is_computed_while_it_is_built_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows are on the CPU: who hangs in one would else be named by nobody."""
    waited: list[float] = []

    def run_pass(*_: Any, **__: Any) -> mx.array:
        time.sleep(0.001)
        waited.append(activity.waiting_s)
        return mx.zeros(1)

    monkeypatch.setattr("qwq_mlx.engine.ranks.follower.run_pass", run_pass)
    follower = Follower(SimpleNamespace(model=None), None, reproducible=True)
    follower.do({"task": "pass", "rows": [], "shape": [0, 1], "ids": []})
    assert waited[0] > 0
    assert activity.waiting_s == 0
