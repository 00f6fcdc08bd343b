"""scripts/fill_context.py in small: the last positions of a context, and an oracle that would see a wrong one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_tiny_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import fill_context

from qwq_mlx.generate.reasoner import load

pytestmark = pytest.mark.tiny


def test_a_context_is_filled_to_its_last_position(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "checkpoint", hidden_size=64, max_position_embeddings=180)
    found = fill_context.filled(load(model), save_at=tmp_path / "run")
    assert found["is_as_promised"], found
    assert found["prompts"]["179"] == "1 ids, context_full" and "is 180 tokens" in found["prompts"]["180"]


def test_the_oracle_sees_one_wrong_id(tmp_path: Path) -> None:
    reasoner = load(write_tiny_checkpoint(tmp_path / "checkpoint", max_position_embeddings=100))
    trace = fill_context._run(reasoner, "7")
    assert fill_context._differences(reasoner, trace)[0] <= fill_context._TOLERANCE
    wrong = replace(trace, ids=(trace.ids[0], trace.ids[1] ^ 1, *trace.ids[2:]))
    assert fill_context._differences(reasoner, wrong)[0] > 0.01
