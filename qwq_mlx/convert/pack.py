"""One block of rows to the bytes that go to disk: the work that runs on every core at once.

Each worker is a thread of one pool; numpy and MLX let go of the interpreter while they compute,
so threads are enough, and blocks are handed over without a copy.

Does not: read or write files, or know about blocks before and after.
"""

from __future__ import annotations

import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwq_mlx.convert.calibration.fitted import FittedMatrices
from qwq_mlx.convert.plan import PlannedTensor
from qwq_mlx.convert.read import Block
from qwq_mlx.errors import ConversionError
from qwq_mlx.quant.fit import fit_block
from qwq_mlx.quant.gguf_blocks import decode_block, repack
from qwq_mlx.quant.packing import Packed, Packing, float_values, round_to
from qwq_mlx.quant.rounding_error import BlockError, block_error, count_zero_pages, first_non_finite, sum_of_squares

__all__ = ["PackedBlock", "pack_block", "workers"]


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """A block ready to write.

    outputs: bytes per output tensor, in the plan's order. error2, weight2: see `FinishedTensor`.
    """

    block: Block
    outputs: tuple[NDArray[np.uint8], ...]
    error2: float
    weight2: float
    zero_pages: int


_local = threading.local()


@functools.cache
def workers(n: int) -> ThreadPoolExecutor:
    """The pool of n workers, one per process: workers keep their stream, and MLX never ends a stream's thread."""
    return ThreadPoolExecutor(n, thread_name_prefix="qwq-mlx-pack")


def _stream() -> mx.Stream:
    """A queue of MLX's CPU backend; it belongs to the thread that asks first."""
    if not hasattr(_local, "stream"):
        _local.stream = mx.new_stream(mx.cpu)
    stream: mx.Stream = _local.stream
    return stream


def pack_block(block: Block, *, fit: str, shard: Path, fitted: FittedMatrices | None = None) -> PackedBlock:
    """Check a block, fit and measure it. shard: for messages. fitted: matrices that a calibration pass has packed.

    Raises ConversionError naming shard, tensor, row and column of a weight that is NaN, infinite, or so large that
    squares overflow float32 (1.8e19), so that nothing could be said of its error.
    """
    tensor, source = block.tensor, block.tensor.source
    raw, dtype = decode_block(block.data, block.n_rows, source.dtype)
    zero_pages = count_zero_pages(block.data)
    if tensor.packing is None:
        weights = float_values(raw, dtype)
        weight2 = sum_of_squares(weights)
        _check_finite(block, raw, dtype, weight2, shard)
        data, error2 = (block.data, 0.0) if tensor.stored_dtype == source.dtype else _rounded(tensor, weights)
        return PackedBlock(block, (data,), error2, weight2, zero_pages)
    with np.errstate(over="ignore"):  # of what the scales' type does not hold
        packed, error = _fit(block, raw, dtype, tensor.packing, fit, shard, fitted or FittedMatrices())
    if not math.isfinite(error.error2):
        raise ConversionError(
            f"{shard}: tensor {source.name}: has weights too large for scales and biases in {tensor.stored_dtype}. "
            "Give another `scale_dtype` (bfloat16 and float32 hold them) and `restart=True`."
        )
    arrays = [packed.codes, packed.scales, *([] if packed.biases is None else [packed.biases])]
    outputs = tuple(np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays)
    return PackedBlock(block, _in_place(outputs, block.buffer), error.error2, error.weight2, zero_pages)


def _in_place(outputs: tuple[NDArray[np.uint8], ...], buffer: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], ...]:
    """The outputs, in the place of the block's rows: blocks that wait to be written then take no memory of their own.

    As they are where the buffer is too short (rows of a GGUF of few bits).
    """
    if sum(map(len, outputs)) > len(buffer):
        return outputs
    placed, start = [], 0
    for output in outputs:
        place = buffer[start : start + len(output)]
        np.copyto(place, output)
        placed.append(place)
        start += len(output)
    return tuple(placed)


def _rounded(tensor: PlannedTensor, weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """Weights that stay whole, in another type, and the sum of the squared errors."""
    rounded = round_to(weights, tensor.stored_dtype)
    errors = float_values(rounded, tensor.stored_dtype) - weights
    return rounded.reshape(-1).view(np.uint8), sum_of_squares(errors)


def _fit(
    block: Block, raw: NDArray[Any], dtype: str, packing: Packing, fit: str, shard: Path, fitted: FittedMatrices
) -> tuple[Packed, BlockError]:
    """A GGUF's own codes where the packing holds them, the pass's rows where it packed this matrix, else the recipe's
    fit."""
    tensor, stream = block.tensor, _stream()
    path, stored = tensor.source.name.removesuffix(".weight"), tensor.stored_dtype
    if tensor.is_repacked or path in fitted:
        _check_finite(block, raw, dtype, sum_of_squares(float_values(raw, dtype)), shard)
        if tensor.is_repacked:
            packed = repack(block.data.reshape(block.n_rows, -1), tensor.source.dtype, stored)
        else:
            packed = fitted.rows(path, block.first_row, raw, dtype, packing, stored=stored)
        return packed, block_error(raw, dtype, packed, packing, stream=stream, stored=stored)
    packed, error = fit_block(raw, dtype, packing, fit=fit, stored=stored, stream=stream)
    _check_finite(block, raw, dtype, error.weight2, shard)
    return packed, error


def _check_finite(block: Block, raw: NDArray[Any], dtype: str, weight2: float, shard: Path) -> None:
    """NaN, infinity and what is near it make the sum of squares no number, so only then is it worth looking for one."""
    if math.isfinite(weight2):
        return
    source = block.tensor.source
    if (index := first_non_finite(raw, dtype)) is not None:
        fault = "is NaN or infinite, expected finite numbers. The checkpoint is damaged or training failed; fetch"
    else:
        sizes = np.abs(float_values(raw, dtype)).reshape(-1)
        index = int(np.argmax(sizes))
        fault = f"has the size {sizes[index]:.3g}, expected none near 1e19. A flipped bit looks like that; fetch"
    row, column = divmod(index, raw.shape[1])
    where = f"row {block.first_row + row:,}, column {column:,}" if len(source.shape) == 2 else f"position {column:,}"
    raise ConversionError(f"{shard}: tensor {source.name}: the weight at {where} {fault} the shard again.")
