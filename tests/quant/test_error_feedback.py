"""Error feedback against the textbook's one-column-at-a-time surgery, and descent against every single change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows import weighted_fit

from qwq_mlx.quant import error_feedback
from qwq_mlx.quant.error_feedback import InputMoments, block_size, factor_moments, fit_rows
from qwq_mlx.quant.fit import fit_block
from qwq_mlx.quant.packing import Packed, Packing, float_values, round_to, unpack_codes
from qwq_mlx.quant.rounding_error import unpack

RANDOM = np.random.default_rng(8)
ROWS, COLUMNS = 24, 192
PACKING = Packing(bits=3, group_size=64)


def correlated(columns: int = COLUMNS) -> np.ndarray:
    """mean(x x^T) of inputs that lean on each other, some channels much larger than others."""
    mixed = RANDOM.standard_normal((600, columns)) @ (
        np.eye(columns) + 0.2 * RANDOM.standard_normal((columns, columns))
    )
    x = mixed * np.exp(RANDOM.standard_normal(columns)) + 0.5
    return np.asarray(x.T @ x / len(x))


PRODUCTS = correlated()
WEIGHTS = (0.02 * RANDOM.standard_normal((ROWS, COLUMNS))).astype(np.float32)


def damped(products: np.ndarray) -> np.ndarray:
    return products + error_feedback.DAMPING * products.diagonal().mean() * np.eye(len(products))


def loss(packed: Packed, products: np.ndarray, packing: Packing = PACKING, weights: np.ndarray = WEIGHTS) -> np.ndarray:
    """What each row loses, sum of d H d, in float64."""
    errors = weights.astype(float) - unpack(packed, packing, "BF16", stream=None)
    return np.asarray(np.einsum("ri,ij,rj->r", errors, products, errors))


def with_sweeps(monkeypatch: pytest.MonkeyPatch, n: int, moments: InputMoments, packing: Packing = PACKING) -> Packed:
    monkeypatch.setattr(error_feedback, "SWEEPS", n)
    return fit_rows(WEIGHTS, moments, packing, "BF16")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_are_those_of_brain_surgery_column_by_column(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing(bits=bits, group_size=64)
    packed = with_sweeps(monkeypatch, 0, factor_moments([PRODUCTS.copy()]), packing)
    codes = unpack_codes(packed.codes, bits)
    assert packed.biases is not None
    scales, biases = (float_values(each, "BF16").astype(float) for each in (packed.scales, packed.biases))
    inverse, weights = np.linalg.inv(damped(PRODUCTS)), WEIGHTS.astype(float)
    for j in range(COLUMNS):  # Hassibi & Stork 1993: round one weight, move those that are left, take it out
        steps = (weights[:, j] - biases[:, j // 64]) / scales[:, j // 64]
        nearest = np.clip(np.rint(steps), 0, 2**bits - 1)
        is_clear = np.abs(steps - np.floor(steps) - 0.5) > 2e-3  # float32 may round a tie to the other side
        assert np.array_equal(nearest[is_clear], codes[is_clear, j])
        error = weights[:, j] - (codes[:, j] * scales[:, j // 64] + biases[:, j // 64])
        weights -= np.outer(error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def test_every_sweep_lowers_what_each_row_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = factor_moments([PRODUCTS.copy()])
    losses = [loss(with_sweeps(monkeypatch, n, moments), damped(PRODUCTS)) for n in (0, 1, 2, 5)]
    for more, fewer in zip(losses[1:], losses, strict=False):
        assert (more <= fewer * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.9 * losses[0].sum()


def test_after_many_sweeps_no_single_code_can_be_bettered(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = with_sweeps(monkeypatch, 40, factor_moments([PRODUCTS.copy()]))
    codes, products = unpack_codes(packed.codes, 3), damped(PRODUCTS)
    errors = WEIGHTS - unpack(packed, PACKING, "BF16", stream=None)
    slopes, scales = errors @ products, float_values(packed.scales, "BF16")
    for step in (-1.0, 1.0):
        change = step * np.repeat(scales, 64, axis=1)
        gain = 2 * change * slopes - change**2 * products.diagonal()  # what the row's sum falls by
        is_allowed = (codes + step >= 0) & (codes + step <= 7)
        assert gain[is_allowed].max() < 1e-3 * loss(packed, products).mean()


@pytest.mark.parametrize(("bits", "share"), [(4, 0.6), (3, 0.6), (2, 0.6)])
def test_outputs_lose_less_than_by_any_fit_of_the_weights(bits: int, share: float) -> None:
    packing = Packing(bits=bits, group_size=64)
    raw = round_to(WEIGHTS, "BF16")
    importance = (PRODUCTS.diagonal() / PRODUCTS.diagonal().mean() + 0.01).astype(np.float32)
    ours = loss(
        fit_rows(float_values(raw, "BF16"), factor_moments([PRODUCTS.copy()]), packing, "BF16"), PRODUCTS, packing
    )
    theirs = [fit_block(raw, "BF16", packing, fit=fit)[0] for fit in ("min-max", "least-squares")]
    for packed in (*theirs, weighted_fit(raw, "BF16", packing, importance)):
        assert ours.sum() < share * loss(packed, PRODUCTS, packing).sum()


def test_blocks_are_fitted_each_by_itself() -> None:
    first, second = correlated(64), correlated(128)
    whole = fit_rows(WEIGHTS, factor_moments([first.copy(), second.copy()]), PACKING, "BF16")
    parts = [
        fit_rows(np.ascontiguousarray(WEIGHTS[:, at]), factor_moments([products.copy()]), PACKING, "BF16")
        for at, products in ((slice(0, 64), first), (slice(64, 192), second))
    ]
    for name in ("codes", "scales", "biases"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        assert np.array_equal(getattr(whole, name), joined)


@pytest.mark.parametrize(
    ("columns", "size"),
    [(128, 128), (4864, 4864), (5120, 5120), (8960, 4480), (13824, 4608), (27648, 4608), (11008, 3712)],
)
def test_wide_matrices_have_equal_blocks_that_groups_divide(columns: int, size: int) -> None:
    assert block_size(columns) == size
    assert size <= error_feedback.MAX_CHANNELS and (size == columns or size % 128 == 0)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_channels_that_nothing_reached_round_to_the_nearest(dtype: str) -> None:
    zeros: list[Any] = [np.zeros((COLUMNS, COLUMNS))]
    packed = fit_rows(WEIGHTS, factor_moments(zeros), PACKING, dtype)
    errors = np.abs(WEIGHTS - unpack(packed, PACKING, dtype, stream=None))
    steps = np.abs(float_values(packed.scales, dtype))
    codes = unpack_codes(packed.codes, 3)
    inside = (codes > 0) & (codes < 7)
    assert (errors <= 0.5001 * np.repeat(steps, 64, axis=1))[inside].all()


def test_rows_do_not_depend_on_each_other() -> None:
    moments = factor_moments([PRODUCTS.copy()])
    whole, part = (fit_rows(np.ascontiguousarray(rows), moments, PACKING, "BF16") for rows in (WEIGHTS, WEIGHTS[5:9]))
    errors = [loss(whole, PRODUCTS)[5:9], loss(part, PRODUCTS, weights=WEIGHTS[5:9])]
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.02)  # BLAS adds in another order, so a code may differ


def test_groups_whose_weights_are_all_alike_are_packed_without_a_warning() -> None:
    weights = np.repeat(np.array([[0.0], [0.25], [-1.5]], np.float32), COLUMNS, axis=1)
    packed = fit_rows(weights, factor_moments([PRODUCTS.copy()]), PACKING, "BF16")
    np.testing.assert_allclose(unpack(packed, PACKING, "BF16", stream=None), weights, atol=1e-6)
