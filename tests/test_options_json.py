"""Options go to JSON and come back equal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwq_mlx.errors import SourceError
from qwq_mlx.options import Limits, Sampling, Thinking, from_json, to_json

OPTIONS = (
    Sampling(temperature=0.7, seed=2**64 - 1, logit_bias={3: float("-inf"), 4: 0.1}, dry_breakers=("x",)),
    Limits(max_tokens=5, stop=("a", "b"), banned=("c",), language_guard=True),
    Thinking(think_tokens=0, on_loop="nudge"),
)


def test_options_come_back_equal_through_json() -> None:
    assert from_json(json.loads(json.dumps(to_json(*OPTIONS), allow_nan=False)), where="x") == OPTIONS


@pytest.mark.parametrize(
    "change", [{"sampling": {}}, {"limits": {"unknown": 1}}, {"thinking": {"on_loop": "dance"}}, {"limits": 5}]
)
def test_settings_that_are_none_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=r"run\.safetensors: the settings cannot be read \("):
        from_json(to_json(*OPTIONS) | change, where="run.safetensors")
