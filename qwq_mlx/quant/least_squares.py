"""Scale and bias of each group by least squares: better weights than min/max in the same bytes.

Min/max puts the outermost codes on the outermost weights, though rounding all the others a little finer is worth more
than hitting those two. Here a line is moved, the weights are rounded to it, and the line that fits those codes best is
known in closed form (a regression of weights on codes). The first moves all start from min/max's own line, the later
ones from the best refit so far. Few local steps end in a poor minimum, so the moves are fixed and not small; they were
searched for together (normal and t(5) weights, groups of 64, 2 to 5 bits, 4 counting most). Errors may count by the
importance of their input channel (`error_feedback` says by which).

Does not: round to what a file stores or compare with min/max (`fit` does both).
"""

from __future__ import annotations

import numpy as np

from qwq_mlx.quant.tile import Floats, Line, Tile, replace_where

__all__ = ["MOVES", "STARTS", "closest_line", "weighted_squares"]

STARTS = ((0.0, 0.0), (-0.4, 0.4), (-1.2, -0.4), (-0.8, 0.0))
"""Moves of min/max's line, the first of them none; each in codes: how much longer the range gets, how far it shifts."""
MOVES = ((0.0, 0.12), (0.15, -0.12))
"""Moves of the best line so far, one after the other."""


def closest_line(
    tile: Tile, line: Line, stored: Line, bits: int, importance: Floats | None, weights2: Floats
) -> tuple[Line, Floats]:
    """The line of least squared error that the moves reach, and the error of min/max's codes with its stored line.

    line, stored: by min/max, and as the file would hold it. tile.values, steps and products are used up. importance:
    as `weighted_squares` takes it. weights2: (groups,), the weights' sums of squares. The error comes out of the sums,
    with their rounding. Where all weights of a group are alike it is no number, and the line is of no use.
    """
    half, top = np.float32(1 << (bits - 1)), (1 << bits) - 1
    count = np.float32(len(tile.weights)) if importance is None else importance.sum()
    mean = _sum(tile, tile.weights, importance) / count
    inverse = 1 / line.scale
    np.subtract(tile.weights, mean, out=tile.steps)  # about zero: sums keep more digits
    np.multiply(tile.steps, inverse, out=tile.steps)
    center = (mean - line.bias) * inverse - half  # codes are counted from their middle
    best = np.full((3, len(mean)), -1, np.float32)  # of each group's best line, as `_refit` says
    found = np.empty_like(best)
    error = weights2
    for index, (longer, shift) in enumerate(STARTS + MOVES):
        per_step, mean_code = (np.float32(1), center) if index < len(STARTS) else best[1:]
        shorter = np.float32(1 / (1 + longer / top))
        np.multiply(tile.steps, per_step * shorter, out=tile.values)
        np.add(tile.values, (mean_code - np.float32(shift + longer / top / 2)) * shorter, out=tile.values)
        np.rint(tile.values, out=tile.values)
        np.clip(tile.values, -half, half - 1, out=tile.values)
        _refit(tile, count, importance, out=found)
        if index == 0:
            explained, per_step, mean_code = found
            error = weights2 - explained * np.square(line.scale)
            error += explained * np.square(stored.scale * per_step - line.scale)
            error += (np.square(stored.scale * (mean_code + half) + stored.bias - mean) - np.square(mean)) * count
        replace_where(found[0] > best[0], found, best)
    scale = line.scale / best[1]
    return Line(scale, mean - scale * (best[2] + half)), error


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


def _refit(tile: Tile, count: np.float32, importance: Floats | None, *, out: Floats) -> None:
    """The line that fits the codes in tile.values best, into `out` (3, groups).

    Its rows: how much of the steps' sum of squares it explains, its codes for a step, and its code of the mean step, 0.
    No number, or an infinity, where all codes of a group are alike.
    """
    codes = weighted = tile.values
    explained, per_step, mean_code = out
    if importance is None:  # sums of whole numbers are exact in any order; BLAS reads them twice as fast as numpy
        sum_code: Floats = np.ones(len(codes), np.float32) @ codes
    else:
        weighted = np.multiply(codes, importance[:, None], out=tile.products)
        sum_code = np.add.reduce(weighted, axis=0)
    np.divide(sum_code, count, out=mean_code)
    variance = np.einsum("ij,ij->j", weighted, codes)
    variance -= mean_code * sum_code
    covariance = np.einsum("ij,ij->j", weighted, tile.steps)
    np.divide(variance, covariance, out=per_step)
    np.divide(covariance, per_step, out=explained)
