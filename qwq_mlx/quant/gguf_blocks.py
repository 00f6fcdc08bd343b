"""The block formats of GGUF: which of them MLX can hold as they are, and what weights they mean.

A block of 32 weights with one scale and one offset is a group of MLX's affine mode: weight = scale * code + bias, the
codes in another order. Q4_0, Q5_0 and Q8_0 have the offset in the code (bias = -8, -16, -128 scales), Q4_1 and Q5_1
beside the scale, and Q4_K and Q5_K multiply a float16 of 256 weights by 6 bits of each 32. Scale and bias are exact in
float32; what a 16-bit type loses of them is the caller's to measure. Every other type has groups of 16 or no straight
line, and is decoded by the gguf package.

Source: ggml-quants.c of ggml-org/ggml; tests compare with gguf.quants.dequantize, bit for bit.

Does not: fit anything, or read files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import ConversionError
from qwq_mlx.files.gguf.types import FLOAT_TYPES, TYPES
from qwq_mlx.quant.packing import DTYPES, Packed, Packing, float_values, pack_groups, round_to

__all__ = ["check_decoder", "decode_block", "decode_gguf", "packing_that_holds", "repack"]

_GROUP = 32
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
_OFFSETS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # of the code that means 0
_NUMBERS = {block.name: number for number, block in TYPES.items()}

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Groups:
    """codes: (groups, 32). scale, bias: (groups,)."""

    codes: Bytes
    scale: Floats
    bias: Floats


def packing_that_holds(dtype: str) -> Packing | None:
    """The packing whose codes are those of a GGUF type, or None where MLX has none.

    >>> packing_that_holds("Q5_K")
    Packing(mode='affine', bits=5, group_size=32)
    """
    bits = _BITS.get(dtype)
    return None if bits is None else Packing(bits=bits, group_size=_GROUP)


def repack(raw: Bytes, dtype: str, stored: str) -> Packed:
    """Rows of blocks as a packed block, codes untouched.

    raw: (rows, bytes of a row). dtype: a type that `packing_that_holds` knows. stored: of scales and biases (DTYPES).
    """
    groups, rows = _groups(raw, dtype), len(raw)
    codes = pack_groups(np.ascontiguousarray(groups.codes.T), _BITS[dtype])
    return Packed(
        codes.reshape(rows, -1),
        round_to(groups.scale, stored).reshape(rows, -1),
        round_to(groups.bias, stored).reshape(rows, -1),
    )


def decode_gguf(raw: Bytes, dtype: str) -> Floats:
    """The weights that rows of blocks mean, as ggml computes them in float32.

    raw: (rows, bytes of a row), of any type but the integers. Returns (rows, columns).
    Raises ConversionError where the gguf package is needed and missing.
    """
    if dtype in FLOAT_TYPES:
        return float_values(raw.view(DTYPES[dtype]), dtype)
    if dtype not in _BITS:
        package = _package(dtype)
        whole: Floats = package.quants.dequantize(raw, package.GGMLQuantizationType(_NUMBERS[dtype]))
        return whole
    groups = _groups(raw, dtype)
    values = groups.codes.astype(np.float32)
    np.multiply(values, groups.scale[:, None], out=values)
    np.add(values, groups.bias[:, None], out=values)
    return values.reshape(len(raw), -1)


def decode_block(data: Bytes, n_rows: int, dtype: str) -> tuple[NDArray[Any], str]:
    """Bytes of rows as numbers that the fits take, with their dtype (DTYPES): GGUF's blocks become float32.

    data: of `n_rows` whole rows, flat.
    """
    if dtype in DTYPES:
        return data.view(DTYPES[dtype]).reshape(n_rows, -1), dtype
    return decode_gguf(data.reshape(n_rows, -1), dtype), "F32"


def check_decoder(dtypes: Iterable[str]) -> None:
    """Raise ConversionError now, not in the middle of a run, where types need the gguf package and it is missing."""
    for dtype in sorted(set(dtypes) - _BITS.keys() - DTYPES.keys()):
        _package(dtype)


def _package(dtype: str) -> Any:
    try:
        import gguf.quants
    except ImportError as error:
        raise ConversionError(
            f"tensors of type {dtype} are decoded by the package gguf, which is not installed. Install it: "
            "pip install 'qwq-mlx[gguf]'"
        ) from error
    return gguf


def _groups(raw: Bytes, dtype: str) -> _Groups:
    block = TYPES[_NUMBERS[dtype]]
    blocks = raw.reshape(-1, block.n_bytes)
    if dtype in ("Q4_K", "Q5_K"):
        return _k_groups(blocks, _BITS[dtype])
    scale = _float16(blocks, 0)
    at = 2
    if (offset := _OFFSETS.get(dtype)) is not None:
        bias = scale * np.float32(-offset)
    else:
        bias, at = _float16(blocks, 2), 4
    if dtype == "Q8_0":
        return _Groups(blocks[:, at:] ^ np.uint8(128), scale, bias)
    codes = np.empty((len(blocks), _GROUP), np.uint8)
    halves = blocks[:, -16:]  # weights 0 to 15 in the low halves of the bytes, 16 to 31 in the high ones
    np.bitwise_and(halves, 15, out=codes[:, :16])
    np.right_shift(halves, 4, out=codes[:, 16:])
    if _BITS[dtype] == 5:
        codes |= np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)
    return _Groups(codes, scale, bias)


def _k_groups(blocks: Bytes, bits: int) -> _Groups:
    """Eight groups of every block; two share 32 bytes of codes, one has the low halves, the other the high ones."""
    n = len(blocks)
    factors, minima = _six_bits(blocks[:, 4:16])
    scale = _float16(blocks, 0)[:, None] * factors
    bias = _float16(blocks, 2)[:, None] * minima
    codes = np.empty((n, 4, 2, _GROUP), np.uint8)
    halves = blocks[:, -128:].reshape(n, 4, _GROUP)
    np.bitwise_and(halves, 15, out=codes[:, :, 0])
    np.right_shift(halves, 4, out=codes[:, :, 1])
    if bits == 5:
        fifth = blocks[:, 16:48].reshape(n, 1, 1, _GROUP)  # bit i of byte j is of weight j of group i
        places = np.arange(8, dtype=np.uint8).reshape(1, 4, 2, 1)
        codes |= ((fifth >> places) & np.uint8(1)) << np.uint8(4)
    return _Groups(codes.reshape(-1, _GROUP), scale.reshape(-1), -bias.reshape(-1))


def _six_bits(packed: Bytes) -> tuple[Floats, Floats]:
    """Factors and minima (blocks, 8) of 12 bytes a block."""
    low, minimum, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    factors = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([minimum & 63, (high >> 4) | ((minimum >> 2) & 48)], axis=1)
    return factors.astype(np.float32), minima.astype(np.float32)


def _float16(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32).reshape(-1)
