"""Scale and bias of each group by least squares: better weights than min/max in the same bytes.

Min/max puts the outermost codes on the outermost weights, though rounding all the others a little finer is worth more
than hitting those two. Here a line is moved, the weights are rounded to it, and the line that fits those codes best is
known in closed form (a regression of weights on codes); that refit is kept if its sum of squares is the smallest so
far, and the next move starts from it. Few local steps end in a poor minimum, so the moves are fixed and not small: six
out of 70, each the one that lowered the errors of 2, 3 and 4 bits together most when it was found (normal and t(5)
weights, groups of 64). Errors may count by the importance of their input channel (`error_feedback` says by which).

Does not: round to what a file stores or compare with min/max (`fit` does both).
"""

from __future__ import annotations

import numpy as np

from qwq_mlx.quant.tile import Floats, Line, Tile, where

__all__ = ["MOVES", "closest_line", "weighted_squares"]

MOVES = ((-0.8, 0.25), (-0.15, -0.4), (0.3, 0.12), (0.15, -0.12), (-0.15, 0.12), (0.0, 0.0))
"""Each in codes: how much longer the range gets, and how far it shifts."""


def closest_line(tile: Tile, line: Line, bits: int, importance: Floats | None) -> Line:
    """The line of least squared error that the moves reach.

    tile.steps: (weights - line.bias) / line.scale; used up, as values and products are. importance: as
    `weighted_squares` takes it. A group whose weights are all alike keeps its line.
    """
    half, steps = np.float32(1 << (bits - 1)), tile.steps
    np.subtract(steps, half, out=steps)  # steps and codes around zero: their sums keep more digits
    weight = np.float32(len(steps)) if importance is None else importance.sum()
    mean_step = _sum(tile, steps, importance) / weight
    # Steps are about slope * codes + offset. One number for all groups at first: that is cheaper to sweep with.
    slope: Floats | np.float32 = np.float32(1)
    offset: Floats | np.float32 = np.float32(0)
    best: Floats | np.float32 = np.float32(-1)
    for longer, shift in MOVES:
        factor = np.float32(1 + longer / ((1 << bits) - 1))
        tried = slope * factor
        start = offset + slope * (np.float32(shift) - np.float32(0.5) * (1 - factor))  # codes' centre is at -1/2
        np.multiply(steps, 1 / tried, out=tile.values)
        np.subtract(tile.values, start / tried, out=tile.values)
        np.rint(tile.values, out=tile.values)
        np.clip(tile.values, -half, half - 1, out=tile.values)
        mean_code, variance, covariance = _moments(tile, weight, mean_step, importance)
        explained = covariance * covariance / variance  # 0 / 0 where all codes are one: not better
        is_better = explained > best
        best = np.fmax(best, explained)
        refit = covariance / variance
        slope = where(is_better, refit, slope)
        offset = where(is_better, mean_step - refit * mean_code, offset)
    return Line(line.scale * slope, line.bias + line.scale * (offset + half * (1 - slope)))


def weighted_squares(values: Floats, importance: Floats, spare: Floats) -> Floats:
    """Sum of squares of each group, every one times the importance of its input channel; (groups,).

    values: (group size, groups). importance: (group size,), positive. spare: as values, is written.
    """
    np.multiply(values, importance[:, None], out=spare)
    products: Floats = np.einsum("ij,ij->j", spare, values)
    return products


def _sum(tile: Tile, values: Floats, importance: Floats | None) -> Floats:
    if importance is not None:
        np.multiply(values, importance[:, None], out=tile.products)
    sums: Floats = np.add.reduce(values if importance is None else tile.products, axis=0)
    return sums


def _moments(
    tile: Tile, weight: np.float32, mean_step: Floats, importance: Floats | None
) -> tuple[Floats, Floats, Floats]:
    """Mean of the codes, and times the weight their variance and their covariance with the steps."""
    codes = tile.values
    weighted = codes
    if importance is not None:
        weighted = np.multiply(codes, importance[:, None], out=tile.products)
    # Sums of whole numbers are exact in any order; BLAS reads them twice as fast as numpy adds rows.
    is_whole = importance is None
    sum_code: Floats = np.ones(len(codes), np.float32) @ codes if is_whole else np.add.reduce(weighted, axis=0)
    mean_code: Floats = np.divide(sum_code, weight)
    variance = np.einsum("ij,ij->j", weighted, codes) - mean_code * sum_code
    covariance = np.einsum("ij,ij->j", weighted, tile.steps) - mean_step * sum_code
    return mean_code, variance, covariance
