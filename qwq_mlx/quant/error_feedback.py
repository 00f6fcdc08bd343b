"""Codes, scales and biases that keep a matrix's outputs instead of its weights: error feedback, then descent.

What a matrix y = W x loses on a text is sum over rows of d H d, with d the row's error and H = mean(x x^T) over the
text. Rounding column by column, each column's error is made up for by the columns that are still to come (GPTQ,
Frantar et al. 2022, arXiv 2210.17323; the same as LDLQ, Chee et al. 2023, arXiv 2307.13304): with U the upper Cholesky
factor of H's inverse, an error e of column j is worth changing the later columns by -e U[j, j+1:] / U[j, j]. A group's
line is fitted when its turn comes, to its weights as they are by then, by least squares with column j counting
1 / U[j, j]^2, which is what its error still costs once the later columns have done what they can.

Then the same sum goes down by coordinates: group by group scale and bias move to where they are best for its codes (a
system of two unknowns), and each code to the one that is best while all others stay. Every step lowers the sum, so a
sweep more is never worse on the text.

H is damped by a share of its mean diagonal, since a text shows a part of what will be asked. In a wide matrix it is
kept in equal blocks along the diagonal, MAX_CHANNELS at most, which bounds memory and time; channels of different
blocks then do not make up for each other.

Does not: run a model, or read or write files. BLAS adds in another order on another machine, so codes may differ there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.quant.fit import fit_groups
from qwq_mlx.quant.packing import Packed, Packing, float_values, pack_groups, round_to

__all__ = ["DAMPING", "FLOOR", "MAX_CHANNELS", "SWEEPS", "InputMoments", "block_size", "factor_moments", "fit_rows"]

Floats = NDArray[np.float32]

MAX_CHANNELS = 5120
"""Input channels whose products are kept together; 5,120 take 0.1 GB in float32, and their factors 0.8 while made."""

DAMPING = 0.1  # of the mean diagonal; with 0.01 text that did not calibrate loses more
SWEEPS = 2
FLOOR = np.float32(0.01)  # of the mean, that a column of a group counts at least as its line is fitted


@dataclass(frozen=True, slots=True)
class _Block:
    """Channels first to first + len(products). products: H, damped; upper: U. Both (channels, channels) float32."""

    first: int
    products: Floats
    upper: Floats


@dataclass(frozen=True, slots=True)
class InputMoments:
    """What the inputs of a matrix are, as `fit_rows` takes it; made by `factor_moments`."""

    blocks: tuple[_Block, ...]

    @property
    def uppers(self) -> tuple[Floats, ...]:
        """Of each block, the upper factor U of the inverse of H: it is U^T U."""
        return tuple(block.upper for block in self.blocks)


def block_size(columns: int) -> int:
    """Channels of each block of a matrix with so many: equal parts in whole groups of 128, MAX_CHANNELS at most."""
    parts = math.ceil(columns / MAX_CHANNELS)
    return columns if parts == 1 else math.ceil(columns / parts / 128) * 128


def factor_moments(products: Iterable[NDArray[np.float64]]) -> InputMoments:
    """Damp and factor mean(x x^T) of each block of `block_size` channels, in their order; float64, symmetric, finite.

    A block that no input ever reached is as good as the identity. What is given is overwritten.
    """
    blocks, first = [], 0
    for damped in products:
        size = float(damped.diagonal().mean())
        damped.flat[:: len(damped) + 1] += DAMPING * size if size > 0 else 1.0
        # From the last channel to the first H = R R^T with R upper, so its inverse is U^T U with U the inverse of R.
        lower: NDArray[np.float64] = np.linalg.cholesky(damped[::-1, ::-1]).astype(np.float64, copy=False)
        upper = _inverse_of_lower(lower)[::-1, ::-1]
        blocks.append(_Block(first, damped.astype(np.float32), np.ascontiguousarray(upper, np.float32)))
        first += len(damped)
    return InputMoments(tuple(blocks))


def _inverse_of_lower(lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a lower triangular matrix, by halves: with Cholesky's a third of the time of inverting H."""
    if len(lower) <= 256:
        return np.asarray(np.linalg.inv(lower))
    half = len(lower) // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half] = _inverse_of_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_of_lower(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def fit_rows(weights: Floats, moments: InputMoments, packing: Packing, dtype: str) -> Packed:
    """Pack rows of a matrix.

    weights: (rows, columns), finite. moments: of its inputs. packing: affine; its groups divide the blocks.
    dtype: of scales and biases (DTYPES). Rows do not depend on each other.
    """
    rows, columns = weights.shape
    group = packing.group_size
    fitted = _Fitted(
        weights=np.ascontiguousarray(weights.T),
        codes=np.empty((columns, rows), np.float32),
        scales=np.empty((columns // group, rows), np.float32),
        biases=np.empty((columns // group, rows), np.float32),
        packing=packing,
        dtype=dtype,
    )
    for block in moments.blocks:
        _feed_errors_back(fitted, block)
        _descend(fitted, block)
    by_group = (
        fitted.codes.astype(np.uint8).reshape(-1, group, rows).transpose(1, 2, 0)
    )  # (group, rows, groups of a row)
    codes = pack_groups(np.ascontiguousarray(by_group).reshape(group, -1), packing.bits)
    return Packed(
        codes.reshape(rows, -1),
        round_to(np.ascontiguousarray(fitted.scales.T), dtype),
        round_to(np.ascontiguousarray(fitted.biases.T), dtype),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    """Rows under way, transposed so that a column of the matrix is contiguous.

    weights, codes: (columns, rows). scales, biases: (groups of a row, rows), rounded to what is stored.
    """

    weights: Floats
    codes: Floats
    scales: Floats
    biases: Floats
    packing: Packing
    dtype: str


def _feed_errors_back(fitted: _Fitted, block: _Block) -> None:
    """Codes and lines of a block's channels, column by column."""
    group, bits, upper = fitted.packing.group_size, fitted.packing.bits, block.upper
    n_channels, highest = len(upper), np.float32((1 << bits) - 1)
    targets = fitted.weights[block.first : block.first + n_channels].copy()
    errors = np.empty((group, targets.shape[1]), np.float32)
    change = np.empty_like(errors)
    for start in range(0, n_channels, group):
        at = slice(start, start + group)
        columns, u = targets[at], upper[at, at]
        importance = 1 / np.square(u.diagonal())
        importance = importance / importance.mean() + FLOOR
        line = fit_groups(columns.T, "F32", bits=bits, stored=fitted.dtype, importance=importance)
        place = block.first + start
        fitted.scales[place // group], fitted.biases[place // group] = line.scales, line.biases
        for j in range(group):
            code = fitted.codes[place + j]
            np.subtract(columns[j], line.biases, out=code)
            np.divide(code, line.scales, out=code)
            np.rint(code, out=code)
            np.clip(code, 0, highest, out=code)
            np.subtract(columns[j], code * line.scales + line.biases, out=errors[j])
            errors[j] /= u[j, j]
            later = np.multiply(u[j, j + 1 :, None], errors[j], out=change[j + 1 :])
            np.subtract(columns[j + 1 :], later, out=columns[j + 1 :])
        targets[start + group :] -= upper[at, start + group :].T @ errors


def _descend(fitted: _Fitted, block: _Block) -> None:
    """Lower the block's sum by coordinates, SWEEPS times."""
    group, products = fitted.packing.group_size, block.products
    channels = slice(block.first, block.first + len(products))
    errors = fitted.weights[channels] - _unpacked(fitted, channels)
    slopes = products @ errors  # half the derivative of the sum by each weight, downwards
    for start in SWEEPS * list(range(0, len(products), group)):
        at, place = slice(start, start + group), block.first + start
        change = _best_line(fitted, place, products[at, at], slopes[at])
        change += _best_codes(fitted, place, products[at, at], slopes[at] - products[at, at] @ change)
        slopes -= products[:, at] @ change


def _unpacked(fitted: _Fitted, channels: slice) -> Floats:
    group = fitted.packing.group_size
    groups = slice(channels.start // group, channels.stop // group)
    codes = fitted.codes[channels].reshape(-1, group, fitted.codes.shape[1])
    values: Floats = codes * fitted.scales[groups, None] + fitted.biases[groups, None]
    return values.reshape(-1, codes.shape[2])


def _best_line(fitted: _Fitted, place: int, products: Floats, slopes: Floats) -> Floats:
    """Move a group's scale and bias to where the sum is least; returns how its weights change, (group, rows).

    place: the group's first channel. products: (group, group); slopes: (group, rows). A line that rounding to what is
    stored makes worse stays.
    """
    group = fitted.packing.group_size
    codes, index = fitted.codes[place : place + group], place // group
    scale, bias = fitted.scales[index], fitted.biases[index]
    weighted = products @ codes
    codes2, both, ones = np.einsum("ij,ij->j", weighted, codes), weighted.sum(axis=0), products.sum()
    by_scale, by_bias = np.einsum("ij,ij->j", slopes, codes), slopes.sum(axis=0)
    determinant = codes2 * ones - both * both
    is_solvable = determinant > np.float32(1e-6) * codes2 * ones
    safe = np.where(is_solvable, determinant, 1)
    new_scale = _stored(scale + np.where(is_solvable, (by_scale * ones - by_bias * both) / safe, 0), fitted.dtype)
    new_bias = _stored(bias + np.where(is_solvable, (codes2 * by_bias - both * by_scale) / safe, 0), fitted.dtype)
    change = (new_scale - scale) * codes + (new_bias - bias)
    gain = 2 * np.einsum("ij,ij->j", slopes, change) - np.einsum("ij,ij->j", products @ change, change)
    is_better = (gain > 0) & (new_scale != 0)
    fitted.scales[index] = np.where(is_better, new_scale, scale)
    fitted.biases[index] = np.where(is_better, new_bias, bias)
    changed: Floats = np.where(is_better, change, np.float32(0))
    return changed


def _best_codes(fitted: _Fitted, place: int, products: Floats, slopes: Floats) -> Floats:
    """Move each code of a group to the best one in turn; returns how the weights change. slopes: is used up."""
    group, highest = fitted.packing.group_size, np.float32((1 << fitted.packing.bits) - 1)
    scale = fitted.scales[place // group]
    change, spare = np.zeros_like(slopes), np.empty_like(slopes)
    for j in range(group):
        code = fitted.codes[place + j]
        best = slopes[j] / products[j, j]
        best /= scale
        best += code
        np.rint(best, out=best)
        np.clip(best, 0, highest, out=best)
        np.subtract(best, code, out=change[j])
        change[j] *= scale
        code[:] = best
        np.multiply(products[:, j, None], change[j], out=spare)
        np.subtract(slopes, spare, out=slopes)
    return change


def _stored(values: Floats, dtype: str) -> Floats:
    """Rounded to what the file holds."""
    return float_values(round_to(values.astype(np.float32), dtype), dtype)
