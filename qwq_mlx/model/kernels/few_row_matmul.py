"""Launches the kernels of few_row_matmul.cu: a product, three products of one input, and a gated pair.

With MLX 0.32.4's own kernels decoding read a quarter of what an H200's memory gives, and a pass of 4 rows took 3.6
times one (docs/benchmarks.md). These read the same arrays, and unpack codes to bfloat16 as MLX's kernel of many rows.

A row's bits do not depend on how many rows, from 1 to `MAX_ROWS`, are multiplied with it.

Does not: choose which layers use them (`layers` does), or compute anything on another backend.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.model.kernels.device import cuda_kernel

__all__ = ["MAX_ROWS", "PackedMatrix", "Tiling", "choose_tiling", "linear", "linears", "shared_bytes", "swiglu_linears"]

MAX_ROWS = 32
"""Rows of x that one launch multiplies."""
_TILE = 16  # rows of a matrix in a product of the tensor cores
_WIDE = 16_384  # rows from which a block takes two tiles: there are enough blocks, and x is read half as often
_RUN_CODES = 512  # at most, that a warp copies of a row at a time
_GROUPS_A_RUN = (8, 4, 2)  # their scales are one copy of 16, 8 or 4 bytes
_MAX_WARPS = {1: 10, 2: 5}  # of a block, by its tiles: measured on an H200


class PackedMatrix(NamedTuple):
    """codes: (out, in / 8) uint32. scales, biases: (out, in / group size) bfloat16."""

    codes: mx.array
    scales: mx.array
    biases: mx.array


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a block of threads covers its part of a matrix: n_tiles of 16 rows, its warps taking turns at runs of groups.

    It follows from the matrix alone, so that the order of sums does too.
    """

    n_in: int
    group_size: int
    groups_a_run: int
    n_tiles: int
    n_warps: int


@functools.cache
def choose_tiling(n_out: int, n_in: int, group_size: int, *, is_pair: bool = False) -> Tiling | None:
    """How a matrix of 4 bits is covered, or a pair of such matrices; None where the kernels do not fit its shape.

    >>> choose_tiling(5_120, 27_648, 64)
    Tiling(n_in=27648, group_size=64, groups_a_run=8, n_tiles=1, n_warps=9)
    """
    n_tiles = 2 if is_pair or n_out >= _WIDE else 1
    n_groups, rest = divmod(n_in, group_size)
    fitting = [n for n in _GROUPS_A_RUN if n_groups % n == 0 and n * group_size <= _RUN_CODES]
    if group_size not in (32, 64, 128) or rest or not fitting or n_out % (_TILE * (1 if is_pair else n_tiles)):
        return None
    n_runs = n_groups // fitting[0]
    n_turns = -(-n_runs // _MAX_WARPS[n_tiles])
    return Tiling(n_in, group_size, fitting[0], n_tiles, n_warps=-(-n_runs // n_turns))


def shared_bytes(tiling: Tiling, n_rows: int) -> int:
    """Shared memory of a block: a run of each warp, and later the sums of each."""
    run = _TILE * tiling.n_tiles * (tiling.groups_a_run * tiling.group_size // 2 + 32)
    sums = _TILE * tiling.n_tiles * (8 * _columns(n_rows) + 1) * 4
    return tiling.n_warps * max(run, sums)


def linear(x: mx.array, matrix: PackedMatrix, tiling: Tiling, *, residual: mx.array | None = None) -> mx.array:
    """x @ matrix.T, plus the residual where there is one: (..., out) bfloat16.

    x: (..., in) bfloat16 of at most MAX_ROWS rows. residual: (..., out) bfloat16.
    """
    n_out = matrix.codes.shape[0]
    flat = x.reshape(-1, tiling.n_in)
    added = flat if residual is None else residual
    [y] = _launch("linear", flat, [*matrix, added], [n_out], tiling, is_added=residual is not None)
    return y.reshape(*x.shape[:-1], n_out)


def linears(x: mx.array, matrices: Sequence[tuple[PackedMatrix, mx.array]], tiling: Tiling) -> list[mx.array]:
    """x @ matrix.T + bias for three matrices, as `linear`. Each has a multiple of 16 * tiling.n_tiles rows."""
    sizes = [matrix.codes.shape[0] for matrix, _ in matrices]
    arrays = [array for matrix, bias in matrices for array in (*matrix, bias)]
    outputs = _launch("linears", x.reshape(-1, tiling.n_in), arrays, sizes, tiling)
    return [y.reshape(*x.shape[:-1], -1) for y in outputs]


def swiglu_linears(x: mx.array, gate: PackedMatrix, up: PackedMatrix, tiling: Tiling) -> mx.array:
    """silu(x @ gate.T) * (x @ up.T), as `linear`."""
    [y] = _launch("swiglu_linears", x.reshape(-1, tiling.n_in), [*gate, *up], [gate.codes.shape[0]], tiling)
    return y.reshape(*x.shape[:-1], -1)


_INPUTS = {
    "linear": ("x", "w0", "s0", "b0", "added"),
    "linears": ("x", *(f"{name}{part}" for part in range(3) for name in ("w", "s", "b", "bias"))),
    "swiglu_linears": ("x", "w0", "s0", "b0", "w1", "s1", "b1"),
}
_OUTPUTS = {"linear": ("y0",), "linears": ("y0", "y1", "y2"), "swiglu_linears": ("y0",)}
_BEGIN = """
  extern __shared__ __align__(16) unsigned char shared[];
  const int n_rows = x_shape[0];
  Tile tiles[RT];
"""
_PRODUCTS = "  const auto sums = products<K, GROUP, R, RT, WARPS, NT>(x, n_rows, tiles, shared);\n"
_SOURCES = {
    "linear": f"""{_BEGIN}
  const int first = blockIdx.x * 16 * RT;
  for (int r = 0; r < RT; ++r) tiles[r] = tile_at<GROUP, K>(w0, s0, b0, first + 16 * r);
{_PRODUCTS}
  for (int i = threadIdx.x; i < 16 * RT * n_rows; i += 32 * WARPS) {{
    const int row = i % (16 * RT), m = i / (16 * RT);
    const size_t at = (size_t)m * N0 + first + row;
    y0[at] = __float2bfloat16(sums(row, m) + (ADD ? __bfloat162float(added[at]) : 0.f));
  }}
""",
    "linears": f"""{_BEGIN}
  const int place = blockIdx.x * 16 * RT;
  const int part = place < N0 ? 0 : place < N0 + N1 ? 1 : 2;
  const int first = place - (part == 0 ? 0 : part == 1 ? N0 : N0 + N1), n_out = part == 0 ? N0 : part == 1 ? N1 : N2;
  const uint32_t* w = part == 0 ? w0 : part == 1 ? w1 : w2;
  const bf16* s = part == 0 ? s0 : part == 1 ? s1 : s2;
  const bf16* b = part == 0 ? b0 : part == 1 ? b1 : b2;
  const bf16* bias = part == 0 ? bias0 : part == 1 ? bias1 : bias2;
  bf16* y = part == 0 ? y0 : part == 1 ? y1 : y2;
  for (int r = 0; r < RT; ++r) tiles[r] = tile_at<GROUP, K>(w, s, b, first + 16 * r);
{_PRODUCTS}
  for (int i = threadIdx.x; i < 16 * RT * n_rows; i += 32 * WARPS) {{
    const int row = i % (16 * RT), m = i / (16 * RT);
    y[(size_t)m * n_out + first + row] = __float2bfloat16(sums(row, m) + __bfloat162float(bias[first + row]));
  }}
""",
    "swiglu_linears": f"""{_BEGIN}
  const int first = blockIdx.x * 16;
  tiles[0] = tile_at<GROUP, K>(w0, s0, b0, first);
  tiles[1] = tile_at<GROUP, K>(w1, s1, b1, first);
{_PRODUCTS}
  for (int i = threadIdx.x; i < 16 * n_rows; i += 32 * WARPS) {{
    const int row = i % 16, m = i / 16;
    const float gate = sums(row, m), up = sums(16 + row, m);
    y0[(size_t)m * N0 + first + row] = __float2bfloat16(gate / (1.f + __expf(-gate)) * up);
  }}
""",
}


def _columns(n_rows: int) -> int:
    """Products of 8 columns that so many rows of x take."""
    return -(-n_rows // 8)


@functools.cache
def _kernel(kind: str, n_shared: int) -> Any:
    return cuda_kernel(
        "few_row_matmul.cu", f"few_row_{kind}", _INPUTS[kind], _OUTPUTS[kind], _SOURCES[kind], n_shared=n_shared
    )


def _launch(
    kind: str,
    x: mx.array,
    arrays: Sequence[mx.array],
    sizes: Sequence[int],
    tiling: Tiling,
    *,
    is_added: bool | None = None,
) -> list[mx.array]:
    """x: (rows, in). sizes: of the outputs, (rows, size) bfloat16 each."""
    n_rows = x.shape[0]
    values: list[tuple[str, Any]] = [
        ("K", tiling.n_in),
        ("GROUP", tiling.group_size),
        ("R", tiling.groups_a_run),
        ("RT", tiling.n_tiles),
        ("WARPS", tiling.n_warps),
        ("NT", _columns(n_rows)),
        *((f"N{part}", size) for part, size in enumerate(sizes)),
    ]
    if is_added is not None:
        values.append(("ADD", is_added))
    n_threads = 32 * tiling.n_warps
    n_tiles = 1 if kind == "swiglu_linears" else tiling.n_tiles
    n_blocks = sum(sizes) // (_TILE * n_tiles)
    outputs: list[mx.array] = _kernel(kind, shared_bytes(tiling, n_rows))(
        inputs=[x, *arrays],
        template=values,
        grid=(n_blocks * n_threads, 1, 1),
        threadgroup=(n_threads, 1, 1),
        output_shapes=[(n_rows, size) for size in sizes],
        output_dtypes=[mx.bfloat16] * len(sizes),
    )
    return outputs
