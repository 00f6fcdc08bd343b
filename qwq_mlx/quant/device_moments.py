"""Moments of a matrix's inputs on MLX's device, and the factors that error feedback needs of them.

H is factored in blocks of _FACTORED channels: the blocks on the diagonal by LAPACK in float64, all else by products in
float32, which LAPACK on one core would take ten times as long for. TF32 would be too coarse there, so on
CUDA each product is three products of parts that TF32 holds exactly or nearly (Ootomo & Yokota 2022, arXiv 2203.03341).

Does not: collect products (`convert.calibration` does), or fit (`device_feedback` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwq_mlx.quant.error_feedback import DAMPING, factor_moments

__all__ = ["DeviceMoments", "exact_product", "factor_on_device"]

_FACTORED = 256


@dataclass(frozen=True, slots=True)
class DeviceMoments:
    """`error_feedback.InputMoments` on the device. blocks: H, damped, and the upper factor of its inverse; both
    (channels, channels) float32."""

    blocks: tuple[tuple[mx.array, mx.array], ...]

    @property
    def uppers(self) -> tuple[mx.array, ...]:
        """Of each block, the factor."""
        return tuple(upper for _, upper in self.blocks)


def factor_on_device(products: Sequence[mx.array]) -> DeviceMoments:
    """Damp and factor mean(x x^T) of each block of `block_size` channels, as `factor_moments` does; float32."""
    blocks = []
    for h in products:
        size = float(np.array(mx.diag(h).mean()))
        damped = h + mx.eye(len(h)) * (DAMPING * size if size > 0 else 1.0)
        try:
            upper = mx.contiguous(_inverse_of_lower(_cholesky(damped[::-1, ::-1]))[::-1, ::-1])
        except np.linalg.LinAlgError:  # so close to singular that float32 cannot tell: float64 can
            upper = mx.array(factor_moments([np.array(h, dtype=np.float64)]).blocks[0].upper)
        mx.eval(damped, upper)
        blocks.append((damped, upper))
    return DeviceMoments(tuple(blocks))


@dataclass(frozen=True, slots=True)
class _Panel:
    """Columns of a lower triangular matrix. inverse: of the block on the diagonal; below: what is under that."""

    inverse: mx.array
    below: mx.array


def _cholesky(matrix: mx.array) -> list[_Panel]:
    """The lower factor of a symmetric matrix, _FACTORED columns a panel. Raises LinAlgError where it is singular."""
    panels = []
    while len(matrix):
        corner = np.linalg.cholesky(np.array(matrix[:_FACTORED, :_FACTORED], dtype=np.float64))
        inverse = mx.array(np.linalg.inv(corner).astype(np.float32))
        below = matrix[_FACTORED:, :_FACTORED]
        if len(below):
            below = exact_product(below, inverse.T)
            matrix = matrix[_FACTORED:, _FACTORED:] - exact_product(below, below.T)
        panels.append(_Panel(inverse, below))
        if not len(below):
            break
    return panels


def _inverse_of_lower(panels: Sequence[_Panel]) -> mx.array:
    """Of the matrix that the panels make, by halves."""
    if len(panels) == 1:
        return panels[0].inverse
    half = len(panels) // 2
    first, second = _inverse_of_lower(panels[:half]), _inverse_of_lower(panels[half:])
    n_first, n_second = len(first), len(second)
    skipped = [n_first - _FACTORED * (place + 1) for place in range(half)]  # rows of a panel above the second half
    between = mx.concatenate(
        [panel.below[skip : skip + n_second] for panel, skip in zip(panels[:half], skipped, strict=True)], axis=1
    )
    corner = -exact_product(second, exact_product(between, first))
    upper = mx.concatenate([first, mx.zeros((n_first, n_second))], axis=1)
    return mx.concatenate([upper, mx.concatenate([corner, second], axis=1)])


def exact_product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b in float32, also where MLX multiplies in TF32."""
    if not mx.cuda.is_available():
        return a @ b
    (a_high, a_low), (b_high, b_low) = _parted(a), _parted(b)
    return a_high @ b_high + (a_high @ b_low + a_low @ b_high)


def _parted(values: mx.array) -> tuple[mx.array, mx.array]:
    """The ten leading bits of each fraction, which TF32 holds, and the rest."""
    high = (values.view(mx.uint32) & 0xFFFFE000).view(mx.float32)
    return high, values - high
