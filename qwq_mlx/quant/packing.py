"""How a matrix is packed: mode, bits, group, and the order of the bits in memory.

A row's codes are one little-endian bit stream: weight j of the row stands in bits [j * bits, (j + 1) * bits). Eight
codes always fill `bits` whole bytes, so any width can be packed and unpacked eight codes at a time. This is the order
of mx.quantize, for every width that MLX has.

Does not: choose codes (`fit` does) or hold files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.quant.modes import MODES, Packing

__all__ = ["DTYPES", "MODES", "Packed", "Packing", "float_values", "pack_groups", "round_to", "unpack_codes"]

DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
"""Weight dtypes, in safetensors spelling -> the numpy dtype that holds them; bfloat16 travels as its 16 bits."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed block of rows, as the bytes that go to disk.

    codes: (rows, columns * bits / 32) uint32. scales: (rows, columns / group), in affine mode the bits of the weight's
    dtype (DTYPES), else uint8. biases: as scales; None in the modes without.
    """

    codes: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any] | None


def float_values(raw: NDArray[Any], dtype: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Weights as float32, exactly. raw: any shape, DTYPES[dtype]; out: a float32 array of that shape to fill."""
    if out is None:
        out = np.empty(raw.shape, np.float32)
    if dtype == "BF16":
        np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.copyto(out, raw)
    return out


def round_to(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 to the nearest value of another dtype, ties to even, as bits in DTYPES[dtype]. Finite values only."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded: NDArray[Any] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
        return rounded
    return values.astype(DTYPES[dtype])


def pack_groups(codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
    """Codes (group size, groups) below 2**bits, one group after another, to (groups, group size * bits / 32) uint32.

    The groups of a row follow each other, so what comes out reshapes to (rows, columns * bits / 32).
    out: a contiguous array of that size to fill.
    """
    group, n_groups = codes.shape
    n_bytes = bits // math.gcd(bits, 8)  # which `period` codes fill
    period = 8 * n_bytes // bits
    periods = codes.reshape(group // period, period, n_groups)
    packed = np.zeros((group // period, n_bytes, n_groups), np.uint8)
    for place in range(period):
        for byte in range(place * bits // 8, (place * bits + bits - 1) // 8 + 1):
            shift = place * bits - byte * 8  # what a shift moves out of the byte belongs to a neighbour
            part = periods[:, place]
            # numpy multiplies bytes nine times as fast as it shifts them left
            packed[:, byte] |= part * np.uint8(1 << shift) if shift >= 0 else np.right_shift(part, -shift)
    if out is None:
        out = np.empty((n_groups, group * bits // 32), np.uint32)
    np.copyto(out.view(np.uint8).reshape(n_groups, -1), packed.reshape(-1, n_groups).T)
    return out


_PER_BYTE = {2: 4, 4: 2}


def unpack_codes(packed: NDArray[np.uint32], bits: int) -> NDArray[np.float32]:
    """The codes behind `packed` (rows, columns * bits / 32) as float32 (rows, columns)."""
    rows = packed.shape[0]
    stream: NDArray[np.uint8] = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return stream.astype(np.float32)
    if bits in _PER_BYTE:
        values: NDArray[np.float32] = np.take(_table(bits), stream, axis=0).reshape(rows, -1)
        return values
    eights = np.zeros((rows, stream.shape[1] // bits, 8), np.uint8)
    eights[:, :, :bits] = stream.reshape(rows, -1, bits)
    words = eights.view("<u8")  # (rows, columns / 8, 1)
    places = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    codes: NDArray[np.uint64] = (words >> places) & np.uint64((1 << bits) - 1)
    return codes.reshape(rows, -1).astype(np.float32)


def _table(bits: int) -> NDArray[np.float32]:
    """(256, codes per byte): what one byte holds. A look-up is about twice as fast as shifts and masks."""
    places = np.arange(_PER_BYTE[bits], dtype=np.uint8) * np.uint8(bits)
    values: NDArray[np.uint8] = (np.arange(256, dtype=np.uint8)[:, None] >> places) & np.uint8((1 << bits) - 1)
    return values.astype(np.float32)
