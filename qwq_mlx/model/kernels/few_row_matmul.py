"""Launches the kernels of few_row_matmul.cu: a product, three products of one input, and a gated pair.

Matrices of many rows, and long ones, are covered by wide blocks; of a long one blocks share out the inner dimension,
and a second launch adds what they found.

With MLX 0.32.4's own kernels decoding read a quarter of what an H200's memory gives, and a pass of 4 rows took 3.6
times one (docs/benchmarks.md). These read the same arrays, and unpack codes to bfloat16 as MLX's kernel of many rows.

A row's bits do not depend on how many rows, from 1 to `MAX_FEW_ROWS`, are multiplied with it.

Does not: choose which layers use them (`layers` does), or compute anything on another backend.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from qwq_mlx.model.kernels.device import cuda_kernel

__all__ = ["PackedMatrix", "Tiling", "choose_tiling", "linear", "linears", "shared_bytes", "swiglu_linears"]

_TILE = 16  # rows of a matrix in a product of the tensor cores
_WIDE = 16_384  # rows from which a block takes more than one tile: there are enough blocks, and x is read less often
_LONG = 16_384  # inner dimension from which blocks share it out, where the rows alone would be too few blocks
_RUN_CODES = 512  # at most, that a warp copies of a row at a time
_GROUPS_A_RUN = (8, 4, 2)  # their scales are one copy of 16, 8 or 4 bytes
_MAX_WARPS = {1: 10, 2: 5}  # of a block, by its tiles: measured on an H200
_WIDE_WARPS = 4  # of two tiles each
_WIDE_FROM = 5  # rows of x: fewer are read where they lie
_MIN_WIDE_BYTES = 77 << 10  # two blocks share a processor of 228 KiB: a third would keep the last ones waiting
_MAX_SLICES = 6
_FILES = ("tensor_cores.cu", "few_row_matmul.cu")


class PackedMatrix(NamedTuple):
    """codes: (out, in / 8) uint32. scales, biases: (out, in / group size) bfloat16."""

    codes: mx.array
    scales: mx.array
    biases: mx.array


@dataclass(frozen=True, slots=True)
class Tiling:
    """How blocks of threads cover a matrix: n_tiles of 16 rows, each warp n_turns runs of groups.

    wide_from: rows of x from which a block is wide, 8 tiles whatever n_tiles says; None is never. n_slices: parts of
    the inner dimension that wide blocks share out. It follows from the matrix alone: so does the order of sums.
    """

    n_in: int
    group_size: int
    groups_a_run: int
    n_tiles: int
    n_warps: int
    n_turns: int
    wide_from: int | None = None
    n_slices: int = 1

    def is_wide(self, n_rows: int) -> bool:
        """Whether so many rows of x are multiplied by wide blocks."""
        return self.wide_from is not None and n_rows >= self.wide_from

    @property
    def run_codes(self) -> int:
        """Codes of a row in a run."""
        return self.groups_a_run * self.group_size


@functools.cache
def choose_tiling(n_out: int, n_in: int, group_size: int, *, is_pair: bool = False) -> Tiling | None:
    """How a matrix of 4 bits is covered, or a pair of such matrices; None where the kernels do not fit its shape.

    >>> choose_tiling(5_120, 5_120, 64)
    Tiling(n_in=5120, group_size=64, groups_a_run=8, n_tiles=1, n_warps=10, n_turns=1, wide_from=None, n_slices=1)
    """
    n_tiles = 2 if is_pair or n_out >= _WIDE else 1
    n_groups, rest = divmod(n_in, group_size)
    fitting = [n for n in _GROUPS_A_RUN if n_groups % n == 0 and n * group_size <= _RUN_CODES]
    if group_size not in (32, 64, 128) or rest or not fitting or n_out % (_TILE * (1 if is_pair else n_tiles)):
        return None
    n_runs = n_groups // fitting[0]
    n_turns = -(-n_runs // _MAX_WARPS[n_tiles])
    narrow = Tiling(n_in, group_size, fitting[0], n_tiles, -(-n_runs // n_turns), n_turns)
    if n_out % (_TILE * _WIDE_WARPS * (1 if is_pair else 2)) or narrow.run_codes != _RUN_CODES:
        return narrow
    if n_out >= _WIDE:
        return replace(narrow, wide_from=_WIDE_FROM)
    n_slices = max(n for n in range(1, _MAX_SLICES + 1) if n_runs % n == 0)
    return narrow if is_pair or n_in < _LONG or n_slices == 1 else replace(narrow, wide_from=1, n_slices=n_slices)


def shared_bytes(tiling: Tiling, n_rows: int, *, is_wide: bool, n_tiles: int) -> int:
    """Shared memory of a block: a run of each warp, n_tiles high, or two steps of a wide one, and later the sums."""
    columns = 8 * _columns(n_rows)
    if not is_wide:
        return tiling.n_warps * _TILE * n_tiles * max(tiling.run_codes // 2 + 32, (columns + 1) * 4)
    n_codes, n_block_rows = _step_codes(tiling, n_rows), 2 * _TILE * _WIDE_WARPS
    steps = 2 * (n_block_rows * (n_codes // 2 + 32) + columns * (2 * n_codes + 16))
    return max(steps, n_block_rows * (columns + 1) * 4, _MIN_WIDE_BYTES)


def _step_codes(tiling: Tiling, n_rows: int) -> int:
    """Codes of a row in a step of a wide block: long steps read memory in order, and short ones take less of it."""
    return min(8 * tiling.group_size, 512 if n_rows <= 8 else 256)


def linear(x: mx.array, matrix: PackedMatrix, tiling: Tiling, *, residual: mx.array | None = None) -> mx.array:
    """x @ matrix.T, plus the residual where there is one: (..., out) bfloat16.

    x: (..., in) bfloat16 of at most MAX_FEW_ROWS rows. residual: (..., out) bfloat16.
    """
    n_out = matrix.codes.shape[0]
    flat = x.reshape(-1, tiling.n_in)
    added = flat if residual is None else residual
    is_wide = tiling.is_wide(len(flat))
    if is_wide and tiling.n_slices > 1:
        [sums] = _launch("wide_slices", flat, [*matrix], [n_out], tiling)
        y = _joined(sums, added, is_added=residual is not None)
    else:
        kind = "wide_linear" if is_wide else "linear"
        [y] = _launch(kind, flat, [*matrix, added], [n_out], tiling, is_added=residual is not None)
    return y.reshape(*x.shape[:-1], n_out)


def linears(x: mx.array, matrices: Sequence[tuple[PackedMatrix, mx.array]], tiling: Tiling) -> list[mx.array]:
    """x @ matrix.T + bias for three matrices, as `linear`, of a tiling that is never wide."""
    sizes = [matrix.codes.shape[0] for matrix, _ in matrices]
    arrays = [array for matrix, bias in matrices for array in (*matrix, bias)]
    outputs = _launch("linears", x.reshape(-1, tiling.n_in), arrays, sizes, tiling)
    return [y.reshape(*x.shape[:-1], -1) for y in outputs]


def swiglu_linears(x: mx.array, gate: PackedMatrix, up: PackedMatrix, tiling: Tiling) -> mx.array:
    """silu(x @ gate.T) * (x @ up.T), as `linear`."""
    flat = x.reshape(-1, tiling.n_in)
    kind = "wide_swiglu_linears" if tiling.is_wide(len(flat)) else "swiglu_linears"
    [y] = _launch(kind, flat, [*gate, *up], [gate.codes.shape[0]], tiling)
    return y.reshape(*x.shape[:-1], -1)


_PACKED, _PAIR = ("x", "w0", "s0", "b0"), ("x", "w0", "s0", "b0", "w1", "s1", "b1")
_INPUTS = {
    "linear": (*_PACKED, "added"),
    "linears": ("x", *(f"{name}{part}" for part in range(3) for name in ("w", "s", "b", "bias"))),
    "swiglu_linears": _PAIR,
    "wide_linear": (*_PACKED, "added"),
    "wide_slices": _PACKED,
    "wide_swiglu_linears": _PAIR,
}
_OUTPUTS = {"linears": ("y0", "y1", "y2")}  # others have y0
_BEGIN = """
  extern __shared__ __align__(16) unsigned char shared[];
  const int n_rows = x_shape[0];
"""
_PRODUCTS = "  const auto sums = products<K, GROUP, R, TURNS, RT, WARPS, NT>(x, n_rows, tiles, shared);\n"
_WIDE_LINEAR = f"""{_BEGIN}
  constexpr int ROWS = 32 * WARPS, STEPS = K / S / SLICES, PART = SLICES > 1 ? STEPS : TURNS * R * GROUP / S;
  const int slice = blockIdx.x % SLICES, first = blockIdx.x / SLICES * ROWS;
  const Tile tile = tile_at<GROUP, K>(w0, s0, b0, first);
  const auto sums =
      wide_products<K, GROUP, S, STEPS, PART, WARPS, NT, false>(x, n_rows, tile, tile, slice * STEPS, shared);
  for (int i = threadIdx.x; i < ROWS * n_rows; i += ROWS) {{
    const int row = i % ROWS, m = i / ROWS;
"""
_SOURCES = {
    "linear": f"""{_BEGIN}
  Tile tiles[RT];
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
  Tile tiles[RT];
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
  const Tile tiles[2] = {{tile_at<GROUP, K>(w0, s0, b0, first), tile_at<GROUP, K>(w1, s1, b1, first)}};
{_PRODUCTS}
  for (int i = threadIdx.x; i < 16 * n_rows; i += 32 * WARPS) {{
    const int row = i % 16, m = i / 16;
    y0[(size_t)m * N0 + first + row] = __float2bfloat16(swiglu(sums(row, m), sums(16 + row, m)));
  }}
""",
    "wide_linear": f"""{_WIDE_LINEAR}
    const size_t at = (size_t)m * N0 + first + row;
    y0[at] = __float2bfloat16(sums[row][m] + (ADD ? __bfloat162float(added[at]) : 0.f));
  }}
""",
    "wide_slices": f"""{_WIDE_LINEAR}
    y0[((size_t)slice * n_rows + m) * N0 + first + row] = sums[row][m];
  }}
""",
    "wide_swiglu_linears": f"""{_BEGIN}
  constexpr int HALF = 16 * WARPS, PART = TURNS * R * GROUP / S;
  const int first = blockIdx.x * HALF;
  const Tile gate = tile_at<GROUP, K>(w0, s0, b0, first), up = tile_at<GROUP, K>(w1, s1, b1, first);
  const auto sums = wide_products<K, GROUP, S, K / S, PART, WARPS, NT, true>(x, n_rows, gate, up, 0, shared);
  for (int i = threadIdx.x; i < HALF * n_rows; i += 2 * HALF) {{
    const int row = i % HALF, m = i / HALF;
    y0[(size_t)m * N0 + first + row] = __float2bfloat16(swiglu(sums[row][m], sums[HALF + row][m]));
  }}
""",
}
_JOIN = """
  const int at = blockIdx.x * THREADS + threadIdx.x;
  if (at >= N) return;
  float sum = 0.f;
  for (int slice = 0; slice < SLICES; ++slice) sum += sums[(size_t)slice * N + at];
  y[at] = __float2bfloat16(sum + (ADD ? __bfloat162float(added[at]) : 0.f));
"""
_JOIN_THREADS = 256


def _columns(n_rows: int) -> int:
    """Products of 8 columns that so many rows of x take."""
    return -(-n_rows // 8)


@functools.cache
def _kernel(kind: str, n_shared: int) -> Any:
    names = _INPUTS[kind], _OUTPUTS.get(kind, ("y0",))
    return cuda_kernel(_FILES, f"few_row_{kind}", *names, _SOURCES[kind], n_shared=n_shared)


@functools.cache
def _join_kernel() -> Any:
    return cuda_kernel(_FILES[:1], "few_row_join", ("sums", "added"), ("y",), _JOIN)


def _joined(sums: mx.array, added: mx.array, *, is_added: bool) -> mx.array:
    """The slices of sums, (slices, rows, out) float32, as one, (rows, out) bfloat16."""
    n_slices, n_rows, n_out = sums.shape
    n = n_rows * n_out
    outputs: list[mx.array] = _join_kernel()(
        inputs=[sums, added],
        template=[("N", n), ("SLICES", n_slices), ("THREADS", _JOIN_THREADS), ("ADD", is_added)],
        grid=(-(-n // _JOIN_THREADS) * _JOIN_THREADS, 1, 1),
        threadgroup=(_JOIN_THREADS, 1, 1),
        output_shapes=[(n_rows, n_out)],
        output_dtypes=[mx.bfloat16],
    )
    return outputs[0]


def _launch(
    kind: str,
    x: mx.array,
    arrays: Sequence[mx.array],
    sizes: Sequence[int],
    tiling: Tiling,
    *,
    is_added: bool | None = None,
) -> list[mx.array]:
    """x: (rows, in). sizes: of the outputs, (rows, size) bfloat16 each; of slices (slices, rows, size) float32."""
    n_rows, is_wide, is_sliced = x.shape[0], kind.startswith("wide"), kind == "wide_slices"
    n_tiles, n_warps = _tiles(tiling, n_rows, sizes), _WIDE_WARPS if is_wide else tiling.n_warps
    values: list[tuple[str, Any]] = [
        ("K", tiling.n_in),
        ("GROUP", tiling.group_size),
        ("R", tiling.groups_a_run),
        ("TURNS", tiling.n_turns),
        ("WARPS", n_warps),
        ("NT", _columns(n_rows)),
        *((f"N{part}", size) for part, size in enumerate(sizes)),
    ]
    n_slices = tiling.n_slices if is_sliced else 1
    values += [("S", _step_codes(tiling, n_rows)), ("SLICES", n_slices)] if is_wide else [("RT", n_tiles)]
    if is_added is not None:
        values.append(("ADD", is_added))
    n_block_rows = _TILE * (2 * n_warps if is_wide else n_tiles)
    n_blocks = sum(sizes) * (2 if kind.endswith("swiglu_linears") else 1) // n_block_rows * n_slices
    n_threads = 32 * n_warps
    outputs: list[mx.array] = _kernel(kind, shared_bytes(tiling, n_rows, is_wide=is_wide, n_tiles=n_tiles))(
        inputs=[x, *arrays],
        template=values,
        grid=(n_blocks * n_threads, 1, 1),
        threadgroup=(n_threads, 1, 1),
        output_shapes=[(n_slices, n_rows, size) if is_sliced else (n_rows, size) for size in sizes],
        output_dtypes=[mx.float32 if is_sliced else mx.bfloat16] * len(sizes),
    )
    return outputs


def _tiles(tiling: Tiling, n_rows: int, sizes: Sequence[int]) -> int:
    """Tiles of a warp: from 17 rows on two share what is read of x, where all matrices have them."""
    has_pairs = n_rows > 16 and all(size % (2 * _TILE) == 0 for size in sizes)
    return 2 if has_pairs else tiling.n_tiles
