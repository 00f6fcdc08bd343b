from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.doctor.check import Subject
from qwq_mlx.doctor.few_rows import check_few_rows
from qwq_mlx.doctor.rows import check_rows
from qwq_mlx.model.batched_cache import BatchedLayer, Writing


def test_a_machine_without_an_nvidia_gpu_is_told_that_the_kernels_do_not_run_there(tmp_path: Path) -> None:
    result = check_few_rows(Subject("cpu", tmp_path))
    assert result.outcome == "not checkable"
    assert "cpu" in result.found and "NVIDIA" in result.found


def test_rows_in_a_batch_are_compared_with_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("cpu", pocket_checkpoint())
    assert check_rows(subject).outcome == "ok"
    monkeypatch.setattr(BatchedLayer, "writing", _unmasked)
    assert check_rows(subject).outcome == "failed"


_writing = BatchedLayer.writing


def _unmasked(self: BatchedLayer, ends: Any, n_each: Any) -> Writing:
    """As where rows saw what other rows have room for."""
    return _writing(self, ends, n_each)._replace(mask=None)
