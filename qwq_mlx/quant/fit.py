"""Choose scale, bias and codes of every group of a block of rows, and say what the rounding cost.

min_max spreads the codes over each group's range, as mx.quantize does on MLX's CPU backend, bit for bit; but in numpy,
one cache-sized tile at a time: the same bytes on every machine and with every version of MLX, no time limit of a GPU to
meet, and the error falls out of the same pass. Groups have their edge of larger magnitude hit exactly: bias = edge,
scale = edge / round(edge / scale). The other modes (mxfp4, nvfp4, mxfp8) are mx.quantize itself.

Does not: see more than one block, or read or write files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import OptionError
from qwq_mlx.quant.measure import BlockError, block_error, sum_of_squares
from qwq_mlx.quant.packing import FITS, Packed, Packing, float_values, pack_codes, round_to

__all__ = ["Scratch", "fit_block"]

_TILE = 1 << 19  # weights at a time: long enough that threads seldom wait for each other, short enough for a cache
_EPS = np.float32(1e-7)  # the smallest scale, as in MLX


class Scratch:
    """Memory that one worker uses again and again; fresh arrays of this size would cost page faults every time."""

    def __init__(self) -> None:
        self.weights = np.empty(0, np.float32)
        self.values = np.empty(0, np.float32)
        self.codes = np.empty(0, np.uint8)
        self._stream: mx.Stream | None = None

    def reserve(self, n: int) -> None:
        """Make room for n weights."""
        if self.weights.size < n:
            self.weights, self.values = np.empty(n, np.float32), np.empty(n, np.float32)
            self.codes = np.empty(n, np.uint8)

    @property
    def stream(self) -> mx.Stream:
        """A queue of MLX's CPU backend; it belongs to the thread that asks first."""
        if self._stream is None:
            self._stream = mx.new_stream(mx.cpu)
        return self._stream


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some rows as groups: weights and values are (groups, group size), views of a scratch."""

    weights: NDArray[np.float32]
    values: NDArray[np.float32]
    codes: NDArray[np.uint8]


def fit_block(
    raw: NDArray[Any], dtype: str, packing: Packing, *, fit: str, scratch: Scratch
) -> tuple[Packed, BlockError]:
    """Pack a block of rows.

    raw: (rows, columns), DTYPES[dtype], finite; columns a multiple of the group. fit: a name of FITS. scratch: the
    caller's thread's own.
    For float32 weights |w - unpacked| <= |scale| in affine mode; scale and bias rounded to bfloat16 add their rounding.
    Raises OptionError for an unknown fit and for columns that the group does not divide.
    Source: mlx.core.quantize; bit-equal to it for "min-max" (tests/quant/test_fit.py).
    """
    if fit not in FITS:
        raise OptionError(f"fit is {fit!r}, expected one of {', '.join(FITS)}.")
    if raw.shape[1] % packing.group_size:
        raise OptionError(
            f"a row has {raw.shape[1]} weights, expected a multiple of the group size {packing.group_size}. "
            "Use a recipe with a smaller group."
        )
    if not packing.is_affine:
        packed = _by_mlx(raw, dtype, packing, scratch.stream)
        return packed, block_error(raw, dtype, packed, packing, stream=scratch.stream)
    return _affine(raw, dtype, packing, scratch)


def _affine(raw: NDArray[Any], dtype: str, packing: Packing, scratch: Scratch) -> tuple[Packed, BlockError]:
    rows, columns = raw.shape
    groups = columns // packing.group_size
    packed = Packed(
        np.empty((rows, columns * packing.bits // 32), np.uint32),
        np.empty((rows, groups), raw.dtype),
        np.empty((rows, groups), raw.dtype),
    )
    assert packed.biases is not None
    error2 = weight2 = 0.0
    step = max(1, _TILE // columns)
    scratch.reserve(min(step, rows) * columns)
    for first in range(0, rows, step):
        part = raw[first : first + step]
        tile = _tile(part, dtype, packing, scratch)
        with np.errstate(over="ignore", invalid="ignore"):  # weights near the end of float32 overflow, as in MLX
            scales, biases = _min_max(tile.weights, packing.bits)
            _round(tile, scales, biases, packing.bits)
            at = slice(first, first + len(part))
            packed.codes[at] = pack_codes(tile.codes.reshape(part.shape), packing.bits)
            packed.scales[at] = round_to(scales, dtype).reshape(len(part), groups)
            packed.biases[at] = round_to(biases, dtype).reshape(len(part), groups)
            error2 += _error(tile, packed.scales[at], packed.biases[at], dtype)
            weight2 += sum_of_squares(tile.weights)
    return packed, BlockError(error2, weight2)


def _tile(part: NDArray[Any], dtype: str, packing: Packing, scratch: Scratch) -> _Tile:
    shape, n = (part.size // packing.group_size, packing.group_size), part.size
    float_values(part, dtype, scratch.weights[:n].reshape(part.shape))
    return _Tile(scratch.weights[:n].reshape(shape), scratch.values[:n].reshape(shape), scratch.codes[:n])


def _min_max(weights: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and bias of each group, float32 (groups,): each step is that of mlx::core::quantize."""
    high, low = weights.max(axis=1), weights.min(axis=1)
    is_low = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32((1 << bits) - 1), _EPS)
    scale = np.where(is_low, scale, -scale)
    edge = np.where(is_low, low, high)
    steps = np.rint(edge / scale)
    is_zero = steps == 0
    scale = np.where(is_zero, scale, edge / np.where(is_zero, np.float32(1), steps))
    return scale, np.where(is_zero, np.float32(0), edge)


def _round(tile: _Tile, scales: NDArray[np.float32], biases: NDArray[np.float32], bits: int) -> None:
    """Codes of the nearest steps, into tile.codes, and the same as float32 into tile.values."""
    values = tile.values
    np.subtract(tile.weights, biases[:, None], out=values)
    np.divide(values, scales[:, None], out=values)
    np.rint(values, out=values)
    np.clip(values, np.float32(0), np.float32((1 << bits) - 1), out=values)
    np.copyto(tile.codes, values.reshape(-1), casting="unsafe")


def _error(tile: _Tile, scales: NDArray[Any], biases: NDArray[Any], dtype: str) -> float:
    """Sum of squared errors with scale and bias as stored; tile.values are the codes and are used up."""
    values = tile.values
    np.multiply(values, float_values(scales, dtype).reshape(-1, 1), out=values)
    np.add(values, float_values(biases, dtype).reshape(-1, 1), out=values)
    np.subtract(values, tile.weights, out=values)
    return sum_of_squares(values)


def _by_mlx(raw: NDArray[Any], dtype: str, packing: Packing, stream: mx.Stream) -> Packed:
    weights = mx.array(np.ascontiguousarray(raw))
    if dtype == "BF16":
        weights = weights.view(mx.bfloat16, stream=stream)
    arrays = mx.quantize(weights, packing.group_size, packing.bits, packing.mode, stream=stream)
    mx.eval(*arrays)
    return Packed(np.array(arrays[0]), np.array(arrays[1]), None)
