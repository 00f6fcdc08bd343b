"""Choose scale, bias and codes of every group of a block of rows.

min_max spreads the codes over each group's range, as mx.quantize does; it is mx.quantize, on MLX's CPU backend on every
machine. So a conversion is the same bytes wherever it is made, can be checked bit for bit on another machine, and never
meets the GPU's time limit. Several blocks at a time, each on its own stream, use all cores.

Does not: see more than one block, read or write files, or measure the loss (`measure` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import OptionError
from qwq_mlx.quant.packing import FITS, Packing

__all__ = ["Packed", "fit_block", "min_max", "open_stream"]


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed block of rows, as the bytes that go to disk.

    codes: (rows, columns * bits / 32) uint32. scales: (rows, columns / group), in affine mode the bits of the weight's
    dtype (DTYPES), else uint8. biases: as scales; None in the modes without.
    """

    codes: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any] | None


def open_stream() -> mx.Stream:
    """A queue of MLX's CPU backend, for the calling thread alone. MLX never ends one: keep it, use it again."""
    return mx.new_stream(mx.cpu)


def fit_block(raw: NDArray[Any], dtype: str, packing: Packing, *, fit: str, stream: mx.Stream) -> Packed:
    """Pack rows with the fit that a recipe names. Arguments and errors as in `min_max`."""
    if fit not in FITS:
        raise OptionError(f"fit is {fit!r}, expected one of {', '.join(FITS)}.")
    return min_max(raw, dtype, packing, stream=stream)


def min_max(raw: NDArray[Any], dtype: str, packing: Packing, *, stream: mx.Stream) -> Packed:
    """Pack rows, codes spread over each group's range.

    raw: (rows, columns), DTYPES[dtype], finite; columns a multiple of the group. Returns the block packed.
    For float32 weights |w - unpacked| <= |scale| in affine mode; scale and bias rounded to bfloat16 add their rounding.
    Source: mlx.core.quantize; bit-equal to it (tests/quant/test_fit.py).
    """
    if raw.shape[1] % packing.group_size:
        raise OptionError(
            f"a row has {raw.shape[1]} weights, expected a multiple of the group size {packing.group_size}. "
            "Use a recipe with a smaller group."
        )
    weights = mx.array(np.ascontiguousarray(raw))
    if dtype == "BF16":
        weights = weights.view(mx.bfloat16, stream=stream)
    arrays = list(mx.quantize(weights, packing.group_size, packing.bits, packing.mode, stream=stream))
    if packing.is_affine and dtype == "BF16":
        arrays[1:] = [each.view(mx.uint16, stream=stream) for each in arrays[1:]]
    mx.eval(*arrays)
    held = [np.array(each) for each in arrays]
    return Packed(held[0], held[1], held[2] if packing.is_affine else None)
