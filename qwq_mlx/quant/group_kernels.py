"""A group of columns packed by one CUDA kernel and moved down by another, for the steps that `device_feedback` takes.

The kernels (`group_fit.cu`) have its formulas and add in another order, and in float32 where products of MLX may be
TF32. A group is three launches and three products in place of some 600 launches; compiling what MLX fuses of those 600
takes two seconds a piece.

Does not: anything on Metal, where the steps are MLX's own and the kernels were never run.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from qwq_mlx.quant.least_squares import MOVES, SMALLEST_STEP, STARTS
from qwq_mlx.quant.packing import Packing

__all__ = ["descend_group", "feed_back_group", "group_kernels_run"]

_SHARED_FLOATS = 4096  # of each of two arrays of a block: 32 KB
_STORED = {"F32": 0, "F16": 1, "BF16": 2}
_OUTPUTS = ("codes", "scales", "biases", "changes")


def group_kernels_run() -> bool:
    """Whether the kernels are for the default device."""
    return mx.default_device().type != mx.cpu and mx.cuda.is_available()


def feed_back_group(
    columns: mx.array, upper: mx.array, importance: mx.array, first: int, packing: Packing, dtype: str
) -> list[mx.array]:
    """Fit a group's line and round its columns in turn.

    columns: (group or more, rows) float32, the group's first. upper: of the block, (channels, channels); importance:
    (channels,), how much each channel's error counts. first: the group's first channel. Returns codes, scales, biases,
    and the errors over the factor's diagonal; float32, (group, rows) and (rows,).
    """
    starts = mx.array(STARTS + MOVES, mx.float32)
    return _launch(
        "feed_back", [columns, upper, importance, starts], (first, len(upper), columns.shape[1]), packing, dtype
    )


def descend_group(
    products: mx.array, slopes: mx.array, group: Sequence[mx.array], first: int, packing: Packing, dtype: str
) -> list[mx.array]:
    """Move a group's line and its codes to where the sum is least.

    products: of the block, (channels, channels); slopes: (channels, rows). group: its codes, scales and biases as
    `feed_back_group` returns them. Returns the same three, and how the weights change, (group, rows).
    """
    return _launch("descend", [products, slopes, *group], (first, len(products), slopes.shape[1]), packing, dtype)


def _launch(
    kind: str, inputs: Sequence[mx.array], place: tuple[int, int, int], packing: Packing, dtype: str
) -> list[mx.array]:
    group, n_rows = packing.group_size, place[2]
    n_threads = _SHARED_FLOATS // group
    arrays: list[mx.array] = _kernel(kind)(
        inputs=[*inputs, mx.array([*place, (1 << packing.bits) - 1], mx.int32)],
        template=[("GROUP", group), ("THREADS", n_threads), ("STORED", _STORED[dtype])],
        grid=(-(-n_rows // n_threads) * n_threads, 1, 1),
        threadgroup=(n_threads, 1, 1),
        output_shapes=[(group, n_rows), (n_rows,), (n_rows,), (group, n_rows)],
        output_dtypes=[mx.float32] * 4,
    )
    return arrays


_INPUTS = {
    "feed_back": ("columns", "upper", "importance", "moves", "at"),
    "descend": ("products", "slopes", "old_codes", "old_scales", "old_biases", "at"),
}
_SOURCES = {
    "feed_back": f"""
  feed_back<GROUP, THREADS, STORED, {len(STARTS)}, {len(STARTS) + len(MOVES)}>(
      columns, upper, importance, moves, at, {SMALLEST_STEP:.9e}f, codes, scales, biases, changes);
""",
    "descend": """
  descend<GROUP, THREADS, STORED>(
      products, slopes, old_codes, old_scales, old_biases, at, codes, scales, biases, changes);
""",
}


@functools.cache
def _kernel(kind: str) -> Any:
    return mx.fast.cuda_kernel(
        name=f"group_fit_{kind}",
        input_names=list(_INPUTS[kind]),
        output_names=list(_OUTPUTS),
        source=_SOURCES[kind],
        header=importlib.resources.files(__package__).joinpath("group_fit.cu").read_text(encoding="utf-8"),
    )
