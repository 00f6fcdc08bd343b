"""Some groups of a block side by side, where every step is one sweep of numpy over long contiguous rows.

A tile holds its weights with the group along the first axis, (group size, groups): what a group has of its own (scale,
bias, sums) is a vector along the second, so nothing is broadcast in short runs, and sums are added in the same order
on every machine. On one x86 core that is about twice as fast as rows of groups.

Does not: choose scales (`fit` and `least_squares` do).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwq_mlx.quant.packing import float_values

__all__ = ["SMALLEST_STEP", "Floats", "Line", "Scratch", "Tile", "min_max", "replace_where", "squares"]

Floats = NDArray[np.float32]

SMALLEST_STEP = np.float32(1e-7)  # the smallest scale, as in MLX


_ALIGNED = 64
"""Bytes of a line of the cache."""
_APART = 17 * _ALIGNED
"""Bytes between a tile's arrays: at like places of a page one's loads would wait for the other's stores."""


class Scratch:
    """Memory that one worker uses again and again; fresh arrays of this size would cost page faults every time."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._stream: mx.Stream | None = None

    @property
    def stream(self) -> mx.Stream:
        """A queue of MLX's CPU backend; it belongs to the thread that asks first."""
        if self._stream is None:
            self._stream = mx.new_stream(mx.cpu)
        return self._stream

    def tile(self, groups: NDArray[Any], dtype: str) -> Tile:
        """Groups as a tile, until the next call. groups: (groups, group size), DTYPES[dtype]."""
        n, shape = groups.size, groups.shape[::-1]
        if len(self._memory) < 17 * n + 5 * _APART + _ALIGNED:
            self._memory = np.empty(17 * n + 5 * _APART + _ALIGNED, np.uint8)
        start = -self._memory.ctypes.data % _ALIGNED
        arrays: list[NDArray[Any]] = []
        for kind in (np.float32, np.float32, np.float32, np.float32, np.uint8):
            n_bytes = n * np.dtype(kind).itemsize
            arrays.append(self._memory[start : start + n_bytes].view(kind).reshape(shape))
            start += -(-n_bytes // _ALIGNED) * _ALIGNED + _APART
        weights, values, steps, products, codes = arrays
        if dtype == "BF16":
            _across(groups, weights, steps, products)
        else:
            float_values(groups, dtype, weights.T)  # read along the groups, written across
        return Tile(weights, values, steps, products, codes)


_HIGH = np.uint32(0xFFFF0000)


def _across(groups: NDArray[np.uint16], weights: Floats, spare: Floats, other: Floats) -> None:
    """bfloat16 (groups, group size) to float32 `weights` (group size, groups), as `float_values` of the transpose.

    Four weights cross over in one piece and are parted afterwards: crossing costs by the piece. spare, other: as
    weights, are written.
    """
    fours = spare.reshape(-1)[: groups.size // 2].view(np.uint64).reshape(-1, len(groups))
    np.copyto(fours, groups.view(np.uint64).T)
    pair = other.reshape(-1)[: fours.size].view(np.uint32).reshape(fours.shape)
    parted = weights.view(np.uint32).reshape(len(fours), 4, -1)
    for place in (0, 2):
        if place:
            np.right_shift(fours, 32, out=fours)
        np.copyto(pair, fours, casting="unsafe")
        np.left_shift(pair, 16, out=parted[:, place])
        np.bitwise_and(pair, _HIGH, out=parted[:, place + 1])


@dataclass(frozen=True, slots=True)
class Line:
    """weight = scale * code + bias, one of each for every group; float32 (groups,)."""

    scale: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Tile:
    """Weights, and memory for one sweep's results: all (group size, groups), views of a scratch."""

    weights: Floats
    values: Floats
    steps: Floats
    products: Floats
    codes: NDArray[np.uint8]

    def divide(self, line: Line, out: Floats) -> None:
        """How many steps each weight lies above its group's bias, not yet rounded."""
        np.subtract(self.weights, line.bias, out=out)
        np.divide(out, line.scale, out=out)

    def round(self, steps: Floats, bits: int) -> None:
        """Codes of the nearest steps, into `values`."""
        np.rint(steps, out=self.values)
        np.clip(self.values, np.float32(0), np.float32((1 << bits) - 1), out=self.values)

    def keep_codes(self) -> None:
        """The codes in `values`, into `codes`."""
        np.copyto(self.codes, self.values, casting="unsafe")

    def errors(self, line: Line) -> Floats:
        """Weight minus unpacked code, into `products`; `values` are the codes, `line` as it is stored."""
        np.multiply(self.values, line.scale, out=self.products)
        np.add(self.products, line.bias, out=self.products)
        np.subtract(self.products, self.weights, out=self.products)
        return self.products


def squares(values: Floats) -> Floats:
    """Sum of squares of each group, (groups,)."""
    squares: Floats = np.einsum("ij,ij->j", values, values)
    return squares


def replace_where(mask: NDArray[np.bool_], new: Floats, old: Floats) -> None:
    """Write `new` over `old` in the columns of the mask; by bits, since numpy selects at a branch for every value.

    mask: (groups,). new, old: (any, groups).
    """
    old_bits = old.view(np.int32)
    bits = np.bitwise_xor(new.view(np.int32), old_bits)
    bits &= np.negative(mask.view(np.int8), dtype=np.int32)  # all bits, or none
    old_bits ^= bits


def min_max(weights: Floats, bits: int) -> Line:
    """The line that spreads the codes over each group's range: each step is that of mlx::core::quantize."""
    high, low = weights.max(axis=0), weights.min(axis=0)
    longer = np.abs(high) - np.abs(low)
    edge = np.where(longer < 0, low, high)
    scale = np.maximum((high - low) / np.float32((1 << bits) - 1), SMALLEST_STEP)
    np.copysign(scale, -longer, out=scale)  # downwards from high, where both are as long, too
    steps = np.rint(edge / scale)
    is_zero = steps == 0
    if not is_zero.any():  # nearly every tile; numpy selects slowly
        return Line(edge / steps, edge)
    scale = np.where(is_zero, scale, edge / np.where(is_zero, np.float32(1), steps))
    return Line(scale, np.where(is_zero, np.float32(0), edge))
