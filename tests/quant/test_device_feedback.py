"""Error feedback on MLX's device against the same in numpy, on the device that is here."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwq_mlx.quant import device_moments
from qwq_mlx.quant.device_feedback import fit_rows_on_device
from qwq_mlx.quant.device_moments import factor_on_device
from qwq_mlx.quant.error_feedback import factor_moments, fit_rows
from qwq_mlx.quant.packing import Packed, Packing, unpack_codes
from qwq_mlx.quant.rounding_error import unpack

RANDOM = np.random.default_rng(11)
ROWS, COLUMNS = 40, 256
X = (RANDOM.standard_normal((700, COLUMNS)) @ RANDOM.standard_normal((COLUMNS, COLUMNS))) * np.exp(
    RANDOM.standard_normal(COLUMNS)
)
PRODUCTS = X.T @ X / len(X)
WEIGHTS = (0.02 * RANDOM.standard_t(5, (ROWS, COLUMNS))).astype(np.float32)
WEIGHTS[3, 64:128] = 0.25  # a group whose weights are all alike
WEIGHTS[4, :64] = 0.0


def loss(packed: Packed, packing: Packing, dtype: str) -> float:
    errors = WEIGHTS.astype(float) - unpack(packed, packing, dtype, stream=None)
    return float(np.einsum("ri,ij,rj->", errors, PRODUCTS, errors))


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(2, 64, "BF16"), (3, 32, "F16"), (4, 128, "F32"), (8, 64, "BF16")]
)
def test_the_device_finds_what_numpy_finds(bits: int, group: int, dtype: str) -> None:
    packing = Packing(bits=bits, group_size=group)
    blocks = [PRODUCTS[:128, :128], PRODUCTS[128:, 128:]]
    expected = fit_rows(WEIGHTS, factor_moments([each.copy() for each in blocks]), packing, dtype)
    moments = factor_on_device([mx.array(each.astype(np.float32)) for each in blocks])
    packed, unpacked = fit_rows_on_device(mx.array(WEIGHTS), moments, packing, dtype)
    same = unpack_codes(packed.codes, bits) == unpack_codes(expected.codes, bits)
    # A sum in another order moves a tie, and what follows from it; errors of 8 bits are near the rounding of float32.
    assert same.mean() > (0.98 if bits < 8 else 0.95)
    assert packed.scales.dtype == expected.scales.dtype and packed.scales.shape == expected.scales.shape
    assert loss(packed, packing, dtype) == pytest.approx(loss(expected, packing, dtype), rel=1e-2)
    assert np.array_equal(np.array(unpacked), unpack(packed, packing, dtype, stream=None))


@pytest.mark.parametrize(("channels", "is_cuda"), [(64, False), (256, False), (128, True)])
def test_factors_are_those_of_float64(channels: int, is_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_moments.mx.cuda, "is_available", lambda: is_cuda)  # products in three parts
    monkeypatch.setattr(device_moments, "_FACTORED", 48)  # several panels, and one that is not full
    h = PRODUCTS[:channels, :channels]
    (expected,) = factor_moments([h.copy()]).blocks
    ((products, upper),) = factor_on_device([mx.array(h.astype(np.float32))]).blocks
    assert np.allclose(np.array(products), expected.products, rtol=1e-5)
    assert np.allclose(np.array(upper), expected.upper, atol=1e-4 * np.abs(expected.upper).max())


def test_inputs_that_never_came_count_alike() -> None:
    ((products, upper),) = factor_on_device([mx.zeros((64, 64))]).blocks
    assert np.array_equal(np.array(products), np.eye(64)) and np.array_equal(np.array(upper), np.eye(64))


def test_what_float32_cannot_factor_is_factored_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(matrix: mx.array) -> None:
        raise np.linalg.LinAlgError

    monkeypatch.setattr(device_moments, "_cholesky", refuse)
    h = PRODUCTS[:64, :64]
    ((products, upper),) = factor_on_device([mx.array(h.astype(np.float32))]).blocks
    (expected,) = factor_moments([h.copy()]).blocks
    assert np.allclose(np.array(upper), expected.upper, atol=1e-5 * np.abs(expected.upper).max())
    assert np.allclose(np.array(products), expected.products, rtol=1e-5)
