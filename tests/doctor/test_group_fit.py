"""The check of the calibrated fit's kernels, with MLX's own steps in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwq_mlx.doctor import group_fit
from qwq_mlx.doctor.check import Subject
from qwq_mlx.doctor.group_fit import check_group_fit
from qwq_mlx.quant import device_feedback, group_kernels
from qwq_mlx.quant.packing import Packing


def test_a_machine_without_an_nvidia_gpu_is_told_that_the_kernels_do_not_run_there(tmp_path: Path) -> None:
    result = check_group_fit(Subject("cpu", tmp_path))
    assert result.outcome == "not checkable"
    assert "cpu" in result.found and "NVIDIA" in result.found


def _feed_back(
    columns: mx.array, upper: mx.array, importance: mx.array, first: int, packing: Packing, dtype: str
) -> list[mx.array]:
    at = slice(first, first + packing.group_size)
    own = columns[: packing.group_size]
    scale, bias = device_feedback._line(own, importance[at][:, None], packing.bits, dtype)
    codes, errors = device_feedback._codes_in_turn(own, upper[at, at], scale, bias, packing.bits)
    return [codes, scale, bias, errors]


def _descend(
    products: mx.array, slopes: mx.array, group: Any, first: int, packing: Packing, dtype: str
) -> list[mx.array]:
    at = slice(first, first + packing.group_size)
    return list(device_feedback._step(products[at, at], slopes[at], *group, packing.bits, dtype))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for module in (group_kernels, device_feedback):
        monkeypatch.setattr(module, "group_kernels_run", lambda: True)
    monkeypatch.setattr(device_feedback, "feed_back_group", _feed_back)
    monkeypatch.setattr(device_feedback, "descend_group", _descend)
    monkeypatch.setattr(group_fit, "_ROWS", 70)
    monkeypatch.setattr(group_fit, "_COLUMNS", 192)  # three groups
    return monkeypatch


def test_kernels_that_fit_as_numpy_does_pass(stand_ins: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = check_group_fit(Subject("cuda", tmp_path))
    assert result.outcome == "ok", result.found
    assert set(result.values["loss_ratio"]) == {"3", "4"}


def _unmoved(
    products: mx.array, slopes: mx.array, group: Any, first: int, packing: Packing, dtype: str
) -> list[mx.array]:
    return [*group, mx.zeros((packing.group_size, slopes.shape[1]))]


def _without_errors(*given: Any) -> list[mx.array]:
    codes, scale, bias, errors = _feed_back(*given)
    return [codes, scale, bias, mx.zeros_like(errors)]


def _of_another_group(products: mx.array, slopes: mx.array, group: Any, first: int, *given: Any) -> list[mx.array]:
    codes, scale, bias, change = _descend(products, slopes, group, first, *given)
    return [codes, scale, mx.roll(bias, 1), change]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("descend_group", _unmoved),
        ("feed_back_group", _without_errors),
        ("descend_group", _of_another_group),
    ],
)
def test_kernels_that_are_off_do_not(name: str, wrong: Any, stand_ins: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_ins.setattr(device_feedback, name, wrong)
    result = check_group_fit(Subject("cuda", tmp_path))
    assert result.outcome == "failed", result.found
    assert result.values["wrong"] == [3, 4] and "numpy's loss" in result.found
