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
from qwq_mlx.model.kernels.few_row_bodies import BODIES
from qwq_mlx.model.kernels.few_row_matmul import ForNorm


def test_a_machine_without_an_nvidia_gpu_is_told_that_the_kernels_do_not_run_there(tmp_path: Path) -> None:
    result = check_few_rows(Subject("cpu", tmp_path))
    assert result.outcome == "not checkable"
    assert "cpu" in result.found and "NVIDIA" in result.found


def _product(x: mx.array, matrix: Any, tiling: Any, residual: mx.array | None = None) -> mx.array:
    """As the kernels: codes in bfloat16, sums in float32, one rounding at the end."""
    y = _sums(x, matrix, tiling)
    return (y if residual is None else y + residual.astype(mx.float32)).astype(mx.bfloat16)


def _sums(x: mx.array, matrix: Any, tiling: Any) -> mx.array:
    return x.astype(mx.float32) @ mx.dequantize(*matrix, group_size=tiling.group_size, bits=4).astype(mx.float32).T


def _for_norm(x: mx.array, norm: mx.array) -> ForNorm:
    return ForNorm(x * norm, mx.square(x.astype(mx.float32)).reshape(len(x), -1, 16).sum(axis=-1))


def _product_for_norm(
    x: mx.array, matrix: Any, tiling: Any, residual: mx.array, norm: mx.array
) -> tuple[mx.array, ForNorm]:
    y = _product(x, matrix, tiling, residual)
    return y, _for_norm(y, norm)


def _behind_norm(x: ForNorm, matrix: Any, tiling: Any, eps: float) -> mx.array:
    factor = mx.rsqrt(x.squares.sum(axis=-1, keepdims=True) / x.weighted.shape[-1] + eps)
    return _sums(x.weighted, matrix, tiling) * factor


def _gated(x: ForNorm, gate: Any, up: Any, tiling: Any, eps: float) -> mx.array:
    gated, other = (_behind_norm(x, each, tiling, eps) for each in (gate, up))
    return (gated * mx.sigmoid(gated) * other).astype(mx.bfloat16)


def _three(x: ForNorm, matrices: Any, tiling: Any, eps: float, n_zeros: int) -> tuple[list[mx.array], mx.array]:
    products = [(_behind_norm(x, matrix, tiling, eps) + bias).astype(mx.bfloat16) for matrix, bias in matrices]
    return products, mx.zeros(n_zeros, mx.uint32)


def test_kernels_that_only_round_pass_and_those_that_are_off_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cuda_kernels_run", lambda: True)
    monkeypatch.setattr(few_rows, "_MATRICES", ((128, 512, 64), (96, 256, 32)))
    twins = {
        "for_norm": _for_norm,
        "linear": _product,
        "linear_for_norm": _product_for_norm,
        "linears": _three,
        "swiglu_linears": _gated,
    }
    for name, twin in twins.items():
        monkeypatch.setattr(few_row_matmul, name, twin)
    result = check_few_rows(Subject("cuda", tmp_path))
    assert result.outcome == "ok", result.found

    def without_weight(x: mx.array, *given: Any, norm: mx.array, **named: Any) -> Any:
        return _product_for_norm(x, *given, norm=mx.ones_like(norm), **named)

    wrong = {
        "swiglu_linears": (lambda *given, **named: _gated(*given, **named) * 1.02, "gated pair"),
        "linear_for_norm": (without_weight, "left for a norm"),
    }
    for name, (twin, message) in wrong.items():
        monkeypatch.setattr(few_row_matmul, name, twin)
        result = check_few_rows(Subject("cuda", tmp_path))
        assert result.outcome == "failed" and message in result.found
        monkeypatch.setattr(few_row_matmul, name, twins[name])


def test_every_kernel_is_launched_for_groups_of_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, groups = set(), set()

    def zeros(kind: str, n_shared: int) -> Any:
        def kernel(template: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            launched.add(kind)
            groups.add(dict(template).get("GROUP"))
            return [mx.zeros(*each) for each in zip(output_shapes, output_dtypes, strict=True)]

        return kernel

    monkeypatch.setattr(device, "cuda_kernels_run", lambda: True)
    monkeypatch.setattr(few_row_matmul, "_kernel", zeros)
    assert check_few_rows(Subject("cuda", tmp_path)).outcome == "failed"
    assert launched == set(BODIES) and groups == {32, 64, 128, None}


def test_rows_in_a_batch_are_compared_with_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("cpu", pocket_checkpoint())
    assert check_rows(subject).outcome == "ok"
    monkeypatch.setattr(BatchedLayer, "writing", _unmasked)
    assert check_rows(subject).outcome == "failed"


_writing = BatchedLayer.writing


def _unmasked(self: BatchedLayer, ends: Any, n_each: Any) -> Writing:
    """As where rows saw what other rows have room for."""
    return _writing(self, ends, n_each)._replace(mask=None)
