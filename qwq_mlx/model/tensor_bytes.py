"""Bytes of a tensor as an array in memory: floats in the compute type, a GGUF's blocks too, codes as they are.

Does not: read files (`files.rows` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quant.gguf_blocks import decode_gguf

__all__ = ["array_of"]

_FLOATS = ("BF16", "F16", "F32")
_NUMPY: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),  # travels as its 16 bits
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
}


def array_of(raw: NDArray[np.uint8], dtype: str, shape: Sequence[int], compute_type: str) -> Any:
    """An evaluated array. dtype: as safetensors or GGUF names it. compute_type: of floats, "float32" or "bfloat16"."""
    mx = import_mlx()
    is_block = dtype not in _NUMPY  # of a GGUF, which means floats
    array = mx.array(
        decode_gguf(raw.reshape(shape[0], -1), dtype) if is_block else raw.view(_NUMPY[dtype]).reshape(shape)
    )
    if dtype == "BF16":
        array = array.view(mx.bfloat16)
    if is_block or dtype in _FLOATS:
        array = array.astype(getattr(mx, compute_type))
    mx.eval(array)  # one after another, so that no two tensors are in memory in both types
    return array
