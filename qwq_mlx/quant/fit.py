"""Choose scale, bias and codes of every group of a block of rows, and say what the rounding cost.

"min-max" spreads the codes over each group's range, as mx.quantize does on MLX's CPU backend, bit for bit; but in
numpy, one tile at a time: the same bytes on every machine and with every version of MLX, no time limit of a GPU to
meet, and the error falls out of the same pass. Groups have their edge of larger magnitude hit exactly: bias = edge,
scale = edge / round(edge / scale).

"least-squares" goes on from there (`least_squares`), rounds scale and bias to what the file stores, and only then
rounds the weights, to the stored line; a group that this does not improve keeps what min-max gave it. "calibrated" is
the same: a matrix that a calibration text is fed to is packed by `error_feedback`, and only the others come here. Both
are for affine mode; the other modes (mxfp4, nvfp4, mxfp8) are mx.quantize itself.

Does not: see more than one block, or read or write files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import OptionError
from qwq_mlx.quant.least_squares import closest_line, weighted_squares
from qwq_mlx.quant.modes import FITS
from qwq_mlx.quant.packing import DTYPES, Packed, Packing, float_values, pack_groups, round_to
from qwq_mlx.quant.rounding_error import BlockError, block_error
from qwq_mlx.quant.tile import Floats, Line, Scratch, Tile, min_max, squares

__all__ = ["TILE", "Scratch", "closest_stored_line", "fit_block"]

TILE = 1 << 19
"""Weights at a time. Sweeps of a fourth fit into a core's cache and take two thirds of the CPU time, but workers then
wait for each other: the interpreter's lock changes hands around every sweep (docs/benchmarks.md)."""
_ROUNDING = np.float32(2e-5)
"""Of a group's sums, above what rounding in float32 takes from them: where the errors of two lines are this near, they
are measured."""


def fit_block(
    raw: NDArray[Any], dtype: str, packing: Packing, *, fit: str, scratch: Scratch, stored: str | None = None
) -> tuple[Packed, BlockError]:
    """Pack a block of rows.

    raw: (rows, columns), DTYPES[dtype]; columns a multiple of the group. A NaN or infinity is not refused here, but the
    error's weight2 is then not finite. fit: a name of FITS; in the modes beside affine "min-max" is all there is.
    scratch: the caller's thread's own. stored: the type of scales and biases in affine mode (DTYPES); None is dtype.
    For float32 weights |w - unpacked| <= |scale| in affine mode by "min-max"; scale and bias rounded to bfloat16 add
    their rounding. By the other fits no group's sum of squared errors is larger than by "min-max".
    Raises OptionError for a fit that there is not, or not in this mode, and for columns that the group does not divide.
    Source: mlx.core.quantize; bit-equal to it for "min-max" (tests/quant/test_fit.py).
    """
    if fit not in FITS:
        raise OptionError(f"fit is {fit!r}, expected one of {', '.join(FITS)}.")
    if raw.shape[1] % packing.group_size:
        raise OptionError(
            f"a row has {raw.shape[1]} weights, expected a multiple of the group size {packing.group_size}. "
            "Use a recipe with a smaller group."
        )
    if not packing.is_affine and fit != "min-max":
        raise OptionError(f"fit is {fit!r}, but mode {packing.mode!r} has only 'min-max'. Use a recipe of that fit.")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # weights near the end of float32, as in MLX
        if not packing.is_affine:
            packed = _by_mlx(raw, dtype, packing, scratch.stream)
            return packed, block_error(raw, dtype, packed, packing, stream=scratch.stream)
        return _affine(raw, dtype, packing, scratch, fit != "min-max", stored or dtype)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Scale and bias of each group as the file holds them, DTYPES (groups,), and what they mean."""

    scale: NDArray[Any]
    bias: NDArray[Any]
    line: Line


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Scale and bias of each group as stored, DTYPES (groups,); its squared errors, as they count, float32."""

    scale: NDArray[Any]
    bias: NDArray[Any]
    errors: Floats


def _affine(
    raw: NDArray[Any], dtype: str, packing: Packing, scratch: Scratch, is_refined: bool, stored: str
) -> tuple[Packed, BlockError]:
    group, bits = packing.group_size, packing.bits
    groups = raw.reshape(-1, group)
    codes = np.empty((len(groups), group * bits // 32), np.uint32)
    scales, biases = np.empty(len(groups), DTYPES[stored]), np.empty(len(groups), DTYPES[stored])
    error2 = weight2 = 0.0
    step = TILE // group | 16  # whole lines of the cache, and no power of two: a group's weights would share few lines
    # A last group alone goes with the tile before: numpy adds up a single column in another order.
    firsts = range(0, len(groups) - (len(groups) > 1), step)
    for first in firsts:
        at = slice(first, len(groups) if first == firsts[-1] else first + step)
        tile = scratch.tile(groups[at], dtype)
        weights2 = squares(tile.weights)
        line = min_max(tile.weights, bits)
        fitted = _refined(tile, line, stored, bits, weights2) if is_refined else _by_min_max(tile, line, stored, bits)
        pack_groups(tile.codes, bits, out=codes[at])
        scales[at], biases[at] = fitted.scale, fitted.bias
        error2 += float(fitted.errors.sum(dtype=np.float64))
        weight2 += float(weights2.sum(dtype=np.float64))
    rows = len(raw)
    packed = Packed(codes.reshape(rows, -1), scales.reshape(rows, -1), biases.reshape(rows, -1))
    return packed, BlockError(error2, weight2)


def closest_stored_line(tile: Tile, bits: int, dtype: str, importance: Floats) -> Line:
    """The lines of a tile's groups as the file will hold them, by least squares; fills tile.codes.

    importance: (group size,), positive, of each input channel: how much its squared errors count.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # as in `fit_block`; 0 / 0 where all are alike
        weights2 = weighted_squares(tile.weights, importance, tile.products)
        fitted = _refined(tile, min_max(tile.weights, bits), dtype, bits, weights2, importance)
    return Line(float_values(fitted.scale, dtype), float_values(fitted.bias, dtype))


def _refined(
    tile: Tile, line: Line, dtype: str, bits: int, weights2: Floats, importance: Floats | None = None
) -> _Fitted:
    """Fills tile.codes. line: by min/max; a group that least squares do not improve keeps it. weights2: sums of the
    weights' squares, as errors count."""
    min_max_stored = _stored(line, dtype)
    closest, min_max_error = closest_line(tile, line, min_max_stored.line, bits, importance, weights2)
    stored = _stored(closest, dtype)
    np.subtract(tile.weights, stored.line.bias, out=tile.steps)
    np.multiply(tile.steps, 1 / stored.line.scale, out=tile.steps)
    tile.round(tile.steps, bits)
    tile.keep_codes()
    np.subtract(tile.steps, tile.values, out=tile.steps)
    errors = squares(tile.steps) if importance is None else weighted_squares(tile.steps, importance, tile.products)
    errors *= np.square(stored.line.scale)
    doubtful = np.flatnonzero(~(errors + _ROUNDING * weights2 < min_max_error))
    if len(doubtful):
        _keep_min_max(tile, line, min_max_stored, bits, importance, doubtful, stored, errors)
    return _Fitted(stored.scale, stored.bias, errors)


def _keep_min_max(
    tile: Tile,
    line: Line,
    min_max_stored: _Stored,
    bits: int,
    importance: Floats | None,
    groups: NDArray[np.intp],
    stored: _Stored,
    errors: Floats,
) -> None:
    """Give those of the groups back to min/max's line where it is as good; stored, errors, tile.codes are changed."""
    weights = np.take(tile.weights, groups, axis=1)
    values, steps, products = (np.empty_like(weights) for _ in range(3))
    part = Tile(weights, values, steps, products, np.empty(weights.shape, np.uint8))
    part.divide(Line(line.scale[groups], line.bias[groups]), part.steps)
    part.round(part.steps, bits)
    differences = part.errors(Line(min_max_stored.line.scale[groups], min_max_stored.line.bias[groups]))
    counted = squares(differences) if importance is None else weighted_squares(differences, importance, part.steps)
    kept = np.flatnonzero(~(errors[groups] < counted))
    at = groups[kept]
    tile.codes[:, at] = np.take(part.values, kept, axis=1)
    stored.scale[at], stored.bias[at], errors[at] = min_max_stored.scale[at], min_max_stored.bias[at], counted[kept]


def _by_min_max(tile: Tile, line: Line, dtype: str, bits: int) -> _Fitted:
    """Fills tile.codes. The bias is a weight or zero, which the weights' own type stores as it is; errors are
    counted from the stored one, which saves a sweep."""
    bias = round_to(line.bias, dtype)
    np.subtract(tile.weights, float_values(bias, dtype), out=tile.steps)
    np.divide(tile.steps, line.scale, out=tile.values)
    tile.round(tile.values, bits)
    tile.keep_codes()
    scale = round_to(line.scale, dtype)
    np.multiply(tile.values, float_values(scale, dtype), out=tile.values)
    np.subtract(tile.values, tile.steps, out=tile.values)
    errors = squares(tile.values)
    return _Fitted(scale, bias, errors)


def _stored(line: Line, dtype: str) -> _Stored:
    scale, bias = round_to(line.scale, dtype), round_to(line.bias, dtype)
    return _Stored(scale, bias, Line(float_values(scale, dtype), float_values(bias, dtype)))


def _by_mlx(raw: NDArray[Any], dtype: str, packing: Packing, stream: mx.Stream) -> Packed:
    weights = mx.array(np.ascontiguousarray(raw))
    if dtype == "BF16":
        weights = weights.view(mx.bfloat16, stream=stream)
    arrays = mx.quantize(weights, packing.group_size, packing.bits, packing.mode, stream=stream)
    mx.eval(*arrays)
    return Packed(np.array(arrays[0]), np.array(arrays[1]), None)
