"""What packing cost, and what should not be packed: errors, non-finite weights, pages of zeros.

The relative error of a tensor is |W - unpacked(W)| / |W| in the Frobenius norm, with scale and bias as they are stored
and the product in float32. Sums are kept per block and added up by the caller in the order of the rows, so the figure
does not depend on how many workers ran.

Does not: weigh errors by what the model does with them (a KL on text does that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwq_mlx.quant.packing import Packed, Packing, float_values, unpack_codes

__all__ = ["BlockError", "block_error", "count_zero_pages", "first_non_finite", "sum_of_squares", "unpack"]

PAGE_BYTES = 4096
_QUARTER_BYTES = PAGE_BYTES // 4
_TILE = 1 << 19  # weights looked at in one go: 2 MB of float32 stays in the processor's cache


@dataclass(frozen=True, slots=True)
class BlockError:
    """Sums over a block: of squared errors and of squared weights."""

    error2: float
    weight2: float


def block_error(
    raw: NDArray[Any],
    dtype: str,
    packed: Packed,
    packing: Packing,
    *,
    stream: mx.Stream | None,
    stored: str | None = None,
) -> BlockError:
    """Compare a block of rows with its packed form. raw, dtype, stored: as for the fit; stream: as for `unpack`."""
    rows = max(1, _TILE // raw.shape[1])
    error2 = weight2 = 0.0
    for start in range(0, raw.shape[0], rows):
        part = slice(start, start + rows)
        weights = float_values(raw[part], dtype)
        biases = None if packed.biases is None else packed.biases[part]
        part_packed = Packed(packed.codes[part], packed.scales[part], biases)
        error = unpack(part_packed, packing, stored or dtype, stream=stream)
        np.subtract(error, weights, out=error)
        error2 += sum_of_squares(error)
        weight2 += sum_of_squares(weights)
    return BlockError(error2, weight2)


def unpack(packed: Packed, packing: Packing, dtype: str, *, stream: mx.Stream | None) -> NDArray[np.float32]:
    """The weights behind a packed block, float32 (rows, columns).

    dtype: that of the scales and biases (DTYPES). Affine mode is computed here, the other modes by mx.dequantize
    on the stream, which has to be the calling thread's own.
    """
    if not packing.is_affine:
        arrays = (mx.array(packed.codes), mx.array(packed.scales))
        whole = mx.dequantize(
            *arrays, None, packing.group_size, packing.bits, packing.mode, dtype=mx.float32, stream=stream
        )
        mx.eval(whole)
        return np.array(whole)
    values = unpack_codes(packed.codes, packing.bits)
    groups = values.reshape(values.shape[0], -1, packing.group_size)
    np.multiply(groups, float_values(packed.scales, dtype)[:, :, None], out=groups)
    assert packed.biases is not None  # affine mode always has them
    np.add(groups, float_values(packed.biases, dtype)[:, :, None], out=groups)
    return values


def sum_of_squares(values: NDArray[np.float32]) -> float:
    """Rows in float32, their sum in float64. einsum and not dot: BLAS splits by the number of its threads."""
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))


_INFINITY_BITS = {"BF16": 0xFF00, "F16": 0xF800, "F32": 0xFF000000}  # of infinity, shifted left past the sign


def first_non_finite(raw: NDArray[Any], dtype: str) -> int | None:
    """Flat index of the first NaN or infinity, or None. raw: DTYPES[dtype]."""
    bits = np.ascontiguousarray(raw).reshape(-1).view(np.uint32 if dtype == "F32" else np.uint16)
    limit = _INFINITY_BITS[dtype]
    for start in range(0, bits.size, _TILE):
        shifted = np.left_shift(bits[start : start + _TILE], 1)
        if int(shifted.max()) >= limit:
            return start + int(np.argmax(shifted >= limit))
    return None


def count_zero_pages(data: NDArray[np.uint8]) -> int:
    """About how many 4,096-byte pages of `data` hold only zero bytes, which is what a lost write leaves on a disk.

    A page of the disk begins anywhere in a tensor and may end in the next block. Quarters of a page are looked at: of a
    page's zeros one block has at least two quarters, so one at least is whole, and none is missed.
    """
    whole = len(data) // _QUARTER_BYTES * _QUARTER_BYTES
    if whole < PAGE_BYTES:
        return 0
    quarters = data[:whole].reshape(-1, _QUARTER_BYTES)
    is_suspect = quarters[:, 0] == 0  # looking at every byte of every page would cost as much as the fit
    return -(-int((~quarters[is_suspect].any(axis=1)).sum()) * _QUARTER_BYTES // PAGE_BYTES)
