"""Products with a matrix that is packed or not, by numpy's BLAS where MLX's own is slow.

Does not: read matrices (`layers` does), or choose the compute type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwq_mlx.model.blas import Blas, causal_attention, uses_blas
from qwq_mlx.model.kernels.layers import uses_few_row_kernels
from qwq_mlx.model.load import ComputeType
from qwq_mlx.model.memory.activations import MAX_FEW_ROWS, MIN_BLAS_ROWS
from qwq_mlx.model.upstream import import_mlx

__all__ = ["Rows", "attention", "linear_product", "most_rows_alike"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a matrix, packed or not."""

    weight: Any
    scales: Any = None
    biases: Any = None
    packing: dict[str, Any] | None = None
    compute_type: ComputeType = "float32"
    is_blas: bool = False

    def whole(self) -> Any:
        """The rows as floats, (rows, in), in the compute type."""
        if self.packing is None:
            return self.weight
        mx = import_mlx()
        # Unless a type is named, affine codes come out in that of their scales and the float modes in bfloat16.
        dtype = getattr(mx, self.compute_type)
        return mx.dequantize(self.weight, scales=self.scales, biases=self.biases, dtype=dtype, **self.packing)

    def times(self, x: Any) -> Any:
        """x @ rows.T, (positions, rows)."""
        if self.is_blas:
            return Blas(self.weight)(x)
        if self.packing is None:
            return x @ self.weight.T
        mx = import_mlx()
        return mx.quantized_matmul(
            x, self.weight, scales=self.scales, biases=self.biases, transpose=True, **self.packing
        )


def attention(queries: Any, keys: Any, values: Any) -> Any:
    """Causal attention of float32 as streamed layers compute it on this backend; to time it.

    Each is (1, heads, positions, width).
    """
    mx = import_mlx()
    if mx.default_device().type == mx.cpu:
        return mx.array(causal_attention(*(np.asarray(each)[0] for each in (queries, keys, values)), scale=0.1))
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask="causal")


def linear_product(x: Any, weight: Any) -> Any:
    """x @ weight.T of float32 as layers compute it on this backend; to time it."""
    mx = import_mlx()
    return Blas(weight)(x) if mx.default_device().type == mx.cpu else x @ weight.T


def most_rows_alike(module: Any) -> int:
    """Rows that a pass of a model may have so that each gets the bits that it gets alone."""
    if uses_blas(module):
        return MIN_BLAS_ROWS - 1
    return MAX_FEW_ROWS if uses_few_row_kernels(module) else 1
