from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.doctor import few_rows
from qwq_mlx.doctor.check import Subject
from qwq_mlx.doctor.few_rows import check_few_rows
from qwq_mlx.doctor.rows import check_rows
from qwq_mlx.model.batched_cache import BatchedLayer, Writing
from qwq_mlx.model.kernels import device, few_row_matmul


def test_a_machine_without_an_nvidia_gpu_is_told_that_the_kernels_do_not_run_there(tmp_path: Path) -> None:
    result = check_few_rows(Subject("cpu", tmp_path))
    assert result.outcome == "not checkable"
    assert "cpu" in result.found and "NVIDIA" in result.found


def _product(x: mx.array, matrix: Any, tiling: Any, residual: mx.array | None = None) -> mx.array:
    """As the kernels: codes in bfloat16, sums in float32, one rounding at the end."""
    unpacked = mx.dequantize(*matrix, group_size=tiling.group_size, bits=4).astype(mx.float32)
    y = x.astype(mx.float32) @ unpacked.T
    return (y if residual is None else y + residual.astype(mx.float32)).astype(mx.bfloat16)


def _gated(x: mx.array, gate: Any, up: Any, tiling: Any) -> mx.array:
    gated, other = (_product(x, each, tiling).astype(mx.float32) for each in (gate, up))
    return (gated * mx.sigmoid(gated) * other).astype(mx.bfloat16)


def _three(x: mx.array, matrices: Any, tiling: Any) -> list[mx.array]:
    return [_product(x, matrix, tiling, mx.broadcast_to(bias, (len(x), len(bias)))) for matrix, bias in matrices]


def test_kernels_that_only_round_pass_and_those_that_are_off_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cuda_kernels_run", lambda: True)
    monkeypatch.setattr(few_rows, "_MATRICES", ((128, 512, 64), (96, 256, 32)))
    for name, twin in (("linear", _product), ("linears", _three), ("swiglu_linears", _gated)):
        monkeypatch.setattr(few_row_matmul, name, twin)
    result = check_few_rows(Subject("cuda", tmp_path))
    assert result.outcome == "ok", result.found
    monkeypatch.setattr(few_row_matmul, "swiglu_linears", lambda *given: _gated(*given) * 1.02)
    result = check_few_rows(Subject("cuda", tmp_path))
    assert result.outcome == "failed" and "gated pair" in result.found


def test_rows_in_a_batch_are_compared_with_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("cpu", pocket_checkpoint())
    assert check_rows(subject).outcome == "ok"
    monkeypatch.setattr(BatchedLayer, "writing", _unmasked)
    assert check_rows(subject).outcome == "failed"


_writing = BatchedLayer.writing


def _unmasked(self: BatchedLayer, ends: Any, n_each: Any) -> Writing:
    """As where rows saw what other rows have room for."""
    return _writing(self, ends, n_each)._replace(mask=None)
