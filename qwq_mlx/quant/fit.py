"""Choose scale, bias and codes of every group of a block of rows, and say what the rounding cost.

"min-max" spreads the codes over each group's range, as mx.quantize does on MLX's CPU backend, bit for bit; but by a
kernel of our own: the same bytes on every machine and with every version of MLX, no time limit of a GPU to meet, and
the error falls out of the same pass. Groups have their edge of larger magnitude hit exactly: bias = edge, scale =
edge / round(edge / scale).

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
from qwq_mlx.quant.compiled_fit import fit_kernel
from qwq_mlx.quant.least_squares import LANES, ROWS
from qwq_mlx.quant.modes import FITS
from qwq_mlx.quant.packing import DTYPES, Packed, Packing, round_to
from qwq_mlx.quant.rounding_error import BlockError, block_error

__all__ = ["FittedGroups", "fit_block", "fit_groups"]

_LACKING = {"BF16": 16, "F16": 13, "F32": 0}  # low bits of a float32 that a type has not


def fit_block(
    raw: NDArray[Any],
    dtype: str,
    packing: Packing,
    *,
    fit: str,
    stored: str | None = None,
    stream: mx.Stream | None = None,
) -> tuple[Packed, BlockError]:
    """Pack a block of rows.

    raw: (rows, columns), DTYPES[dtype]; columns a multiple of the group. A NaN or infinity is not refused here, but the
    error's weight2 is then not finite. fit: a name of FITS; in the modes beside affine "min-max" is all there is.
    stored: the type of scales and biases in affine mode (DTYPES); None is dtype. stream: for the other modes, the
    calling thread's own.
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
    if not packing.is_affine:
        packed = _by_mlx(raw, dtype, packing, stream)
        return packed, block_error(raw, dtype, packed, packing, stream=stream)
    stored, rows = stored or dtype, len(raw)
    groups = raw.reshape(-1, packing.group_size)
    fitted = fit_groups(groups, dtype, bits=packing.bits, stored=stored, is_refined=fit != "min-max")
    scales, biases = (round_to(each, stored).reshape(rows, -1) for each in (fitted.scales, fitted.biases))
    sums = (float(each.sum(dtype=np.float64)) for each in (fitted.errors, fitted.weights2))
    return Packed(fitted.codes.reshape(rows, -1), scales, biases), BlockError(*sums)


@dataclass(frozen=True, slots=True)
class FittedGroups:
    """Groups as they are packed.

    codes: (groups, group * bits / 32). scales, biases: float32 (groups,), rounded to what is stored. errors, weights2:
    float32 (groups,), sums of squared errors and of squared weights, as they count.
    """

    codes: NDArray[np.uint32]
    scales: NDArray[np.float32]
    biases: NDArray[np.float32]
    errors: NDArray[np.float32]
    weights2: NDArray[np.float32]


def fit_groups(
    groups: NDArray[Any],
    dtype: str,
    *,
    bits: int,
    stored: str,
    is_refined: bool = True,
    importance: NDArray[np.float32] | None = None,
) -> FittedGroups:
    """Pack groups of affine mode, by least squares (is_refined) or min/max.

    groups: (groups, group size), DTYPES[dtype], in any order in memory. stored: the type of scales and biases.
    importance: (group size,), positive, of each input channel: how much its squared errors count; None is 1 of each.
    """
    n_groups, group = groups.shape
    raw = np.require(groups, DTYPES[dtype], "A")
    counts = np.ascontiguousarray(np.ones(group) if importance is None else importance, np.float32)
    codes = np.empty((n_groups, group * bits // 32), np.uint32)
    fitted = np.empty((4, n_groups), np.float32)
    memory = np.empty((2 * group + ROWS) * LANES, np.float32)
    fit_kernel()(
        raw.ctypes.data,
        n_groups,
        group,
        *(stride // 2 for stride in raw.strides),
        _LACKING[dtype],
        _LACKING[stored],
        bits,
        is_refined,
        counts.ctypes.data,
        counts.sum(),
        memory.ctypes.data,
        codes.ctypes.data,
        fitted.ctypes.data,
    )
    return FittedGroups(codes, *fitted)


def _by_mlx(raw: NDArray[Any], dtype: str, packing: Packing, stream: mx.Stream | None) -> Packed:
    weights = mx.array(np.ascontiguousarray(raw))
    if dtype == "BF16":
        weights = weights.view(mx.bfloat16, stream=stream)
    arrays = mx.quantize(weights, packing.group_size, packing.bits, packing.mode, stream=stream)
    mx.eval(*arrays)
    return Packed(np.array(arrays[0]), np.array(arrays[1]), None)
