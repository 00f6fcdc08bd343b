"""Targets of a matrix against least squares on all positions, solved without their moments."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.quant import device_moments
from qwq_mlx.quant.device_moments import exact_product, factor_on_device
from qwq_mlx.quant.error_feedback import DAMPING, factor_moments
from qwq_mlx.quant.float_targets import float_targets

RANDOM = np.random.default_rng(21)
POSITIONS, COLUMNS, ROWS = 500, 96, 20
X = RANDOM.standard_normal((POSITIONS, COLUMNS)) @ RANDOM.standard_normal((COLUMNS, COLUMNS))
D = 0.1 * X @ RANDOM.standard_normal((COLUMNS, COLUMNS)) + RANDOM.standard_normal(X.shape)
R = 0.2 * X @ RANDOM.standard_normal((COLUMNS, ROWS)) + RANDOM.standard_normal((POSITIONS, ROWS))
WEIGHTS = RANDOM.standard_normal((ROWS, COLUMNS)).astype(np.float32)


def least_squares(x: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rows whose outputs on x are nearest to what is wanted, beside a pull to the weights as strong as damping."""
    pull = np.sqrt(DAMPING * (x**2).mean(axis=0).mean() * len(x))
    stacked = np.concatenate([x, pull * np.eye(x.shape[1])])
    solution, *_ = np.linalg.lstsq(stacked, np.concatenate([wanted, pull * weights.T]), rcond=None)
    return np.asarray(solution.T)


def targets(blocks: list[slice], has_residual: bool, is_device: bool) -> np.ndarray:
    moments = [X[:, at].T @ X[:, at] / len(X) for at in blocks]
    drifts = [(D[:, at].T @ X[:, at] / len(X)).astype(np.float32) for at in blocks]
    residual = (R.T @ X / len(X)).astype(np.float32) if has_residual else None
    if not is_device:
        return np.asarray(float_targets(WEIGHTS, factor_moments(moments).uppers, drifts, residual))
    uppers = factor_on_device([mx.array(each.astype(np.float32)) for each in moments]).uppers
    given = None if residual is None else mx.array(residual)
    return np.array(float_targets(mx.array(WEIGHTS), uppers, [*map(mx.array, drifts)], given, product=exact_product))


@pytest.mark.parametrize(("is_device", "is_cuda"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("has_residual", [False, True])
def test_outputs_behind_packed_layers_are_those_of_the_float_model(
    has_residual: bool, is_device: bool, is_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_moments.mx.cuda, "is_available", lambda: is_cuda)  # products in three parts
    wanted = (X + D) @ WEIGHTS.T.astype(float) + (R if has_residual else 0)
    expected = least_squares(X, wanted, WEIGHTS)
    found = targets([slice(0, COLUMNS)], has_residual, is_device)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    assert np.abs(expected - WEIGHTS).max() > 0.05 * np.abs(expected).max()


def test_each_block_makes_up_for_its_own_drift_and_an_equal_part_of_the_residual() -> None:
    blocks = [slice(0, 64), slice(64, COLUMNS)]
    found = targets(blocks, True, False)
    for at in blocks:
        own = WEIGHTS[:, at]
        expected = least_squares(X[:, at], (X + D)[:, at] @ own.T.astype(float) + R / 2, own)
        np.testing.assert_allclose(found[:, at], expected, atol=2e-3 * np.abs(expected).max())


def test_rows_stay_where_nothing_drifted_and_where_nobody_knows() -> None:
    upper = factor_moments([X.T @ X / len(X)]).uppers
    same = float_targets(WEIGHTS, upper, [np.zeros((COLUMNS, COLUMNS), np.float32)])
    assert np.array_equal(same, WEIGHTS)
    assert float_targets(WEIGHTS, upper, []) is WEIGHTS
