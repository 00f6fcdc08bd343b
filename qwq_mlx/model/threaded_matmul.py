"""Products of few rows by a large packed matrix on the CPU, shared out to the processors.

MLX 0.32.4 computes such a product by one thread. Each row of the matrix is an output of its own, so a matrix is cut
into blocks of rows, whose products go to streams of their own, a thread each: the bits are the same, and two processors
decode the real 0.5B 1.9 times as fast (docs/benchmarks.md).

Does not: cut small matrices, for which handing over costs more than it saves, or those of floats.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from qwq_mlx.model.blas_threads import n_processors

__all__ = ["threaded_quantized_matmul"]

_MIN_BLOCK = 1 << 18
"""Weights from which a block is worth a thread: about 0.2 ms, a hand-over to another thread and back some 0.02."""


def threaded_quantized_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array:
    """`mx.quantized_matmul(x, ..., transpose=True)` of affine codes, on the CPU.

    x: (..., in). weight: (out, in * bits / 32) uint32; scales, biases: (out, in / group_size). Returns (..., out).
    """
    n_out, n_in = len(scales), x.shape[-1]
    n_blocks = max(1, min(n_processors(), n_out * n_in // _MIN_BLOCK))
    multiply = functools.partial(mx.quantized_matmul, x, transpose=True, group_size=group_size, bits=bits)
    if n_blocks == 1:
        return multiply(weight, scales, biases)
    ends = [n_out * place // n_blocks for place in range(n_blocks + 1)]
    blocks = zip(ends, ends[1:], [None, *_streams()], strict=False)
    return mx.concatenate(
        [multiply(weight[n:end], scales[n:end], biases[n:end], stream=stream) for n, end, stream in blocks], axis=-1
    )


@functools.cache
def _streams() -> list[Any]:
    """One for each processor but the first; each thread that computes has its own of each."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(n_processors() - 1)]
