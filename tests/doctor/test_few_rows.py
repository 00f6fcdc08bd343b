from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.doctor.check import Subject
from qwq_mlx.doctor.few_rows import check_few_rows
from qwq_mlx.doctor.rows import check_rows
from qwq_mlx.model.batched_cache import BatchedLayer


def test_a_machine_without_an_nvidia_gpu_is_told_that_the_kernels_do_not_run_there(tmp_path: Path) -> None:
    result = check_few_rows(Subject("cpu", tmp_path))
    assert result.outcome == "not checkable"
    assert "cpu" in result.found and "NVIDIA" in result.found


def test_rows_in_a_batch_are_compared_with_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("cpu", pocket_checkpoint())
    assert check_rows(subject).outcome == "ok"
    monkeypatch.setattr("qwq_mlx.model.attention.BatchedLayer.update_and_fetch", _unmasked)
    assert check_rows(subject).outcome == "failed"


_update = BatchedLayer.update_and_fetch


def _unmasked(self: BatchedLayer, keys: Any, values: Any, ends: Any, n_each: Any) -> tuple[Any, Any, Any]:
    """As where rows saw what other rows have room for."""
    keys, values, _ = _update(self, keys, values, ends, n_each)
    return keys, values, None
