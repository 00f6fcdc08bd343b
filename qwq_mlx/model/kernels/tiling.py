"""How blocks of threads cover a 4-bit matrix in the kernels of few_row_matmul.cu.

Matrices of many rows, and long ones, are covered by wide blocks; of a long one blocks share out the inner dimension,
and another launch adds what they found.

Does not: launch anything (`few_row_matmul` does).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

__all__ = ["TILE", "WIDE_ROWS", "WIDE_WARPS", "Tiling", "choose_tiling", "n_columns", "shared_bytes", "step_codes"]

TILE = 16  # rows of a matrix in a product of the tensor cores
_WIDE = 16_384  # rows from which a block takes more than one tile: there are enough blocks, and x is read less often
_LONG = 16_384  # inner dimension from which blocks share it out, where the rows alone would be too few blocks
_RUN_CODES = 512  # at most, that a warp copies of a row at a time
_GROUPS_A_RUN = (8, 4, 2)  # their scales are one copy of 16, 8 or 4 bytes
_MAX_WARPS = {1: 10, 2: 5}  # of a block, by its tiles: measured on an H200
WIDE_WARPS = 4  # of two tiles each
WIDE_ROWS = 2 * TILE * WIDE_WARPS  # of a matrix, that a wide block multiplies by
_WIDE_FROM = 5  # rows of x: fewer are read where they lie
_MIN_WIDE_BYTES = 77 << 10  # two blocks share a processor of 228 KiB: a third would keep the last ones waiting
_MAX_SLICES = 6


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
    if group_size not in (32, 64, 128) or rest or not fitting or n_out % (TILE * (1 if is_pair else n_tiles)):
        return None
    n_runs = n_groups // fitting[0]
    n_turns = -(-n_runs // _MAX_WARPS[n_tiles])
    narrow = Tiling(n_in, group_size, fitting[0], n_tiles, -(-n_runs // n_turns), n_turns)
    if n_out % (WIDE_ROWS // (2 if is_pair else 1)) or narrow.run_codes != _RUN_CODES:
        return narrow
    if n_out >= _WIDE:
        return replace(narrow, wide_from=_WIDE_FROM)
    n_slices = max(n for n in range(1, _MAX_SLICES + 1) if n_runs % n == 0)
    return narrow if is_pair or n_in < _LONG or n_slices == 1 else replace(narrow, wide_from=1, n_slices=n_slices)


def shared_bytes(tiling: Tiling, n_rows: int, *, is_wide: bool, n_tiles: int) -> int:
    """Shared memory of a block: a run of each warp, n_tiles high, or two steps of a wide one, and later the sums."""
    columns = 8 * n_columns(n_rows)
    if not is_wide:
        return tiling.n_warps * TILE * n_tiles * max(tiling.run_codes // 2 + 32, (columns + 1) * 4)
    n_codes = step_codes(tiling, n_rows)
    steps = 2 * (WIDE_ROWS * (n_codes // 2 + 32) + columns * (2 * n_codes + 16))
    return max(steps, WIDE_ROWS * (columns + 1) * 4, _MIN_WIDE_BYTES)


def step_codes(tiling: Tiling, n_rows: int) -> int:
    """Codes of a row in a step of a wide block: long steps read memory in order, and short ones take less of it."""
    return min(8 * tiling.group_size, 512 if n_rows <= 8 else 256)


def n_columns(n_rows: int) -> int:
    """Products of 8 columns that so many rows of x take."""
    return -(-n_rows // 8)
