"""Launches the kernels of few_row_matmul.cu: a product, three products of one input, and a gated pair behind RMSNorm.

With MLX 0.32.4's own kernels decoding read a quarter of what an H200's memory gives, and a pass of 4 rows took 3.6
times one (docs/benchmarks.md). These read the same arrays, and unpack codes to bfloat16 as MLX's kernel of many rows.

A row's bits do not depend on how many rows, from 1 to `MAX_FEW_ROWS`, are multiplied with it.

Does not: choose which layers use them (`layers` does), or compute anything on another backend.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.model.kernels.device import cuda_kernel
from qwq_mlx.model.kernels.few_row_bodies import BODIES, FILES, INPUTS, OUTPUTS
from qwq_mlx.model.kernels.tiling import TILE, WIDE_ROWS, WIDE_WARPS, Tiling, n_columns, shared_bytes, step_codes

__all__ = ["ForNorm", "PackedMatrix", "for_norm", "linear", "linear_for_norm", "linears", "swiglu_linears"]


_THREADS = 256  # of a block that multiplies by nothing
_Output = tuple[tuple[int, ...], mx.Dtype]  # shape and type


class PackedMatrix(NamedTuple):
    """codes: (out, in / 8) uint32. scales, biases: (out, in / group size) bfloat16."""

    codes: mx.array
    scales: mx.array
    biases: mx.array


class ForNorm(NamedTuple):
    """What a product behind RMSNorm takes: its sums are divided by the root mean square of a row, not the row.

    weighted: (..., n) bfloat16, times the norm's weight. squares: (rows, n / 16) float32, sums over 16 values of a row
    each, without the weight.
    """

    weighted: mx.array
    squares: mx.array


def for_norm(x: mx.array, norm: mx.array) -> ForNorm:
    """What a product behind RMSNorm takes of x, (..., n) bfloat16. norm: its weight, (n,) bfloat16."""
    flat = _three_dimensions(x)
    weighted, squares = _launch_elementwise("for_norm", [flat, norm], flat.shape, [], _left_for_norm(flat.shape))
    return ForNorm(_shaped(weighted, x), squares)


def linear(x: mx.array, matrix: PackedMatrix, tiling: Tiling, *, residual: mx.array | None = None) -> mx.array:
    """x @ matrix.T, plus the residual where there is one: (..., out) bfloat16.

    x: (..., in) bfloat16 of at most MAX_FEW_ROWS rows. residual: (..., out) bfloat16.
    """
    n_out, flat = matrix.codes.shape[0], _three_dimensions(x)
    added, is_added = flat if residual is None else residual, ("ADD", residual is not None)
    if tiling.n_slices > 1:
        slices, shape, own = _slices(flat, matrix, tiling), (*flat.shape[:2], n_out), [is_added, _n_slices(tiling)]
        [y] = _launch_elementwise("join", [slices, added], shape, own, [(shape, mx.bfloat16)])
    else:
        kind = "wide_linear" if tiling.is_wide(_n_rows(flat)) else "linear"
        [y] = _launch(kind, flat, [*matrix, added], [n_out], tiling, [is_added])
    return _shaped(y, x)


def linear_for_norm(
    x: mx.array, matrix: PackedMatrix, tiling: Tiling, *, residual: mx.array, norm: mx.array
) -> tuple[mx.array, ForNorm]:
    """`linear` with a residual, and `for_norm` of it. tiling: wide only where it has slices."""
    n_out, flat = matrix.codes.shape[0], _three_dimensions(x)
    shape = (*flat.shape[:2], n_out)
    left = _left_for_norm(shape)
    if tiling.n_slices > 1:
        arrays, own = [_slices(flat, matrix, tiling), residual, norm], [("ADD", True), _n_slices(tiling)]
        outputs: list[_Output] = [(shape, mx.bfloat16), *left]
        y, weighted, squares = _launch_elementwise("join_for_norm", arrays, shape, own, outputs)
    else:
        y, weighted, squares = _launch("linear_for_norm", flat, [*matrix, residual, norm], [n_out], tiling, more=left)
    return _shaped(y, x), ForNorm(_shaped(weighted, x), squares)


def linears(
    x: ForNorm, matrices: Sequence[tuple[PackedMatrix, mx.array]], tiling: Tiling, *, eps: float, n_zeros: int
) -> tuple[list[mx.array], mx.array]:
    """n @ matrix.T + bias for three matrices and RMSNorm's n of what left x, (..., out) bfloat16; and n_zeros, uint32.

    tiling: one that is never wide. eps: the norm's.
    """
    sizes = [matrix.codes.shape[0] for matrix, _ in matrices]
    arrays = [x.squares, *(array for matrix, bias in matrices for array in (*matrix, bias))]
    own, zeros_of = [("EPS", _bits(eps)), ("ZEROS", n_zeros)], [((n_zeros,), mx.uint32)]
    *outputs, zeros = _launch("linears", _three_dimensions(x.weighted), arrays, sizes, tiling, own, zeros_of)
    return [_shaped(y, x.weighted) for y in outputs], zeros


def swiglu_linears(x: ForNorm, gate: PackedMatrix, up: PackedMatrix, tiling: Tiling, *, eps: float) -> mx.array:
    """silu(n @ gate.T) * (n @ up.T), as `linears`, of a tiling that may be wide."""
    flat, arrays = _three_dimensions(x.weighted), [x.squares, *gate, *up]
    kind = "wide_swiglu_linears" if tiling.is_wide(_n_rows(flat)) else "swiglu_linears"
    [y] = _launch(kind, flat, arrays, [gate.codes.shape[0]], tiling, [("EPS", _bits(eps))])
    return _shaped(y, x.weighted)


def _three_dimensions(x: mx.array) -> mx.array:
    """As the kernels take it: a layer's x as it is, for each view costs the host as much as half a launch."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _shaped(y: mx.array, x: mx.array) -> mx.array:
    """What a kernel gave for x, whose last dimension may be another."""
    return y if x.ndim == 3 else y.reshape(*x.shape[:-1], y.shape[-1])


def _n_rows(x: mx.array) -> int:
    return x.shape[0] * x.shape[1]


def _left_for_norm(shape: tuple[int, ...]) -> list[_Output]:
    return [(shape, mx.bfloat16), ((math.prod(shape[:-1]), shape[-1] // TILE), mx.float32)]


def _n_slices(tiling: Tiling) -> tuple[str, int]:
    return "SLICES", tiling.n_slices


def _bits(number: float) -> int:
    """A float32 as a template takes it."""
    [bits] = struct.unpack("i", struct.pack("f", number))
    return int(bits)


def _slices(x: mx.array, matrix: PackedMatrix, tiling: Tiling) -> mx.array:
    """What blocks that share out the inner dimension found: (slices, rows, out) float32."""
    n_out = matrix.codes.shape[0]
    output = ((tiling.n_slices, _n_rows(x), n_out), mx.float32)
    [slices] = _launch("wide_slices", x, [*matrix], [n_out], tiling, outputs=[output])
    return slices


def _launch_elementwise(
    kind: str,
    arrays: Sequence[mx.array],
    shape: Sequence[int],
    own: Sequence[tuple[str, int]],
    outputs: Sequence[_Output],
) -> list[mx.array]:
    """A thread for each value of an array of this shape."""
    n = math.prod(shape)
    results: list[mx.array] = _kernel(kind, 0)(
        inputs=list(arrays),
        template=[("N0", shape[-1]), ("THREADS", _THREADS), *own],
        grid=(-(-n // _THREADS) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
    return results


@functools.cache
def _kernel(kind: str, n_shared: int) -> Any:
    return cuda_kernel(FILES, f"few_row_{kind}", INPUTS[kind], OUTPUTS[kind], BODIES[kind], n_shared=n_shared)


def _launch(
    kind: str,
    x: mx.array,
    arrays: Sequence[mx.array],
    sizes: Sequence[int],
    tiling: Tiling,
    own: Sequence[tuple[str, int]] = (),
    more: Sequence[_Output] = (),
    outputs: Sequence[_Output] | None = None,
) -> list[mx.array]:
    """x: (a, b, in). arrays: the kind's other inputs. sizes: of the products, (a, b, size) bfloat16 each.

    own: template values that not every kind has. more: outputs behind the products. outputs: what is given instead.
    """
    n_rows, is_wide = _n_rows(x), kind.startswith("wide")
    n_tiles, n_warps = _tiles(tiling, n_rows, sizes), WIDE_WARPS if is_wide else tiling.n_warps
    n_slices = tiling.n_slices if kind == "wide_slices" else 1
    values: list[tuple[str, Any]] = [
        ("K", tiling.n_in),
        ("GROUP", tiling.group_size),
        ("R", tiling.groups_a_run),
        ("TURNS", tiling.n_turns),
        ("WARPS", n_warps),
        ("NT", n_columns(n_rows)),
        *((f"N{part}", size) for part, size in enumerate(sizes)),
        *([("S", step_codes(tiling, n_rows)), ("SLICES", n_slices)] if is_wide else [("RT", n_tiles)]),
        *own,
    ]
    n_block_rows = WIDE_ROWS if is_wide else TILE * n_tiles
    n_blocks = sum(sizes) * (2 if kind.endswith("swiglu_linears") else 1) // n_block_rows * n_slices
    n_threads = 32 * n_warps
    if outputs is None:
        outputs = [*(((*x.shape[:2], size), mx.bfloat16) for size in sizes), *more]
    results: list[mx.array] = _kernel(kind, shared_bytes(tiling, n_rows, is_wide=is_wide, n_tiles=n_tiles))(
        inputs=[x, *arrays],
        template=values,
        grid=(n_blocks * n_threads, 1, 1),
        threadgroup=(n_threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
    return results


def _tiles(tiling: Tiling, n_rows: int, sizes: Sequence[int]) -> int:
    """Tiles of a warp: from 17 rows on two share what is read of x, where all matrices have them."""
    has_pairs = n_rows > 16 and all(size % (2 * TILE) == 0 for size in sizes)
    return 2 if has_pairs else tiling.n_tiles
