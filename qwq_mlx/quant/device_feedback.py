"""Error feedback and descent on MLX's device: what `error_feedback` does in numpy, for the backends that have a GPU.

The steps, their order and the formulas are those of `error_feedback`; sums are added in the device's order, and on CUDA
products of float32 may be rounded to TF32 (MLX_ENABLE_TF32=0 forbids it), so that some codes differ from numpy's. What
a text loses by them does not (tests/quant/test_device_feedback.py).

The columns of a group depend on each other and go one after the other, in parts of _PART: within a part each column
changes the later ones at once, and a part changes the rest of its group by one product. A GPU gets few and long
operations that way: some 600 for a group and its sweeps, whatever the number of rows. On CUDA a group is two kernels of
`group_kernels` instead.

Does not: factor the moments (`device_moments` does), or divide rows by memory (the caller does).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from qwq_mlx.quant.device_moments import DeviceMoments
from qwq_mlx.quant.error_feedback import FLOOR, SWEEPS
from qwq_mlx.quant.group_kernels import descend_group, feed_back_group, group_kernels_run
from qwq_mlx.quant.least_squares import MOVES, SMALLEST_STEP, STARTS
from qwq_mlx.quant.packing import DTYPES, Packed, Packing, pack_groups

__all__ = ["fit_rows_on_device"]

_PART = 16
_STORED = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def fit_rows_on_device(
    weights: mx.array, moments: DeviceMoments, packing: Packing, dtype: str
) -> tuple[Packed, mx.array]:
    """Pack rows of a matrix on the default device.

    weights: (rows, columns) float32, finite. moments, packing, dtype: as `error_feedback.fit_rows` takes them; its
    memory is about five times the weights'. Returns the packed rows, and (rows, columns) float32: them unpacked.
    """
    rows, group = len(weights), packing.group_size
    by_column = mx.contiguous(weights.T)
    codes: list[mx.array] = []
    scales: list[mx.array] = []
    biases: list[mx.array] = []
    first = 0
    for products, upper in moments.blocks:
        part = by_column[first : first + len(products)]
        first += len(products)
        fitted = _descend(part, products, _feed_errors_back(part, upper, packing, dtype), packing, dtype)
        for lists, arrays in zip((codes, scales, biases), fitted, strict=True):
            lists.extend(arrays)
    mx.eval(codes, scales, biases)
    unpacked = mx.concatenate([c * s + b for c, s, b in zip(codes, scales, biases, strict=True)]).T
    by_group = mx.stack([each.astype(mx.uint8) for each in codes]).transpose(1, 2, 0)  # (group, rows, groups of a row)
    packed = pack_groups(np.array(mx.contiguous(by_group)).reshape(group, -1), packing.bits)
    return Packed(packed.reshape(rows, -1), _stored_bits(scales, dtype), _stored_bits(biases, dtype)), unpacked


_Groups = tuple[list[mx.array], list[mx.array], list[mx.array]]
"""Of each group of a block: codes (group, rows), scales and biases (rows,), float32, as they are stored."""


def _feed_errors_back(targets: mx.array, upper: mx.array, packing: Packing, dtype: str) -> _Groups:
    """Codes and lines of a block's channels. targets: (channels, rows)."""
    group = packing.group_size
    fitted: _Groups = ([], [], [])
    importance = mx.unflatten(1 / mx.square(mx.diag(upper)), 0, (-1, group))
    importance = importance / importance.mean(axis=1, keepdims=True) + FLOOR.item()
    has_kernels = group_kernels_run()
    line = _compiled_line(packing.bits, dtype)
    for start in range(0, len(upper), group):
        u = upper[start : start + group, start:]
        if has_kernels:
            codes, scale, bias, errors = feed_back_group(targets, upper, importance.reshape(-1), start, packing, dtype)
        else:
            scale, bias = line(targets[:group], importance[start // group][:, None])
            codes, errors = _codes_in_turn(targets[:group], u[:, :group], scale, bias, packing.bits)
        if start + group < len(upper):
            targets = mx.addmm(targets[group:], u[:, group:].T, errors, alpha=-1)
        _start(targets, codes, scale, bias)
        for each, array in zip(fitted, (codes, scale, bias), strict=True):
            each.append(array)
    return fitted


def _descend(weights: mx.array, products: mx.array, fitted: _Groups, packing: Packing, dtype: str) -> _Groups:
    """Lower a block's sum by coordinates, SWEEPS times; the lists are changed."""
    codes, scales, biases = fitted
    group, h = packing.group_size, products
    errors = weights - mx.concatenate([c * s + b for c, s, b in zip(codes, scales, biases, strict=True)])
    slopes = h @ errors
    has_kernels = group_kernels_run()
    for index in SWEEPS * list(range(len(codes))):
        at, now = slice(index * group, (index + 1) * group), (codes[index], scales[index], biases[index])
        codes[index], scales[index], biases[index], change = (
            descend_group(h, slopes, now, at.start, packing, dtype)
            if has_kernels
            else _step(h[at, at], slopes[at], *now, packing.bits, dtype)
        )
        slopes = mx.addmm(slopes, h[:, at], change, alpha=-1)
        _start(slopes, codes[index], scales[index], biases[index])
    return fitted


def _codes_in_turn(
    columns: mx.array, upper: mx.array, scale: mx.array, bias: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """Round a group's columns, each error made up for by the later ones. Returns codes and what was fed back."""
    round_one, factors = _compiled_round(bits), 1 / mx.diag(upper)
    return _in_turn(columns, upper, lambda j, column: round_one(column, scale, bias, factors[j]))


def _step(
    products: mx.array, slopes: mx.array, codes: mx.array, scale: mx.array, bias: mx.array, bits: int, dtype: str
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Move a group's line, then each code in turn, to where the sum is least. Returns codes, scale, bias, and how the
    weights change, (group, rows)."""
    scale, bias, by_line = _compiled_best_line(dtype)(products, slopes, codes, scale, bias)
    best_one, factors, before = _compiled_best(bits), 1 / mx.diag(products), codes
    codes, by_codes = _in_turn(
        slopes - products @ by_line, products, lambda j, slope: best_one(slope, before[j], scale, factors[j])
    )
    return codes, scale, bias, by_line + by_codes


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Small functions, that one kernel each does; on a CPU that would start a C++ compiler."""
    return function if mx.default_device().type == mx.cpu else mx.compile(function)


@functools.cache
def _compiled_line(bits: int, dtype: str) -> Callable[..., Any]:
    return _compiled(functools.partial(_line, bits=bits, dtype=dtype))


@functools.cache
def _compiled_best_line(dtype: str) -> Callable[..., Any]:
    return _compiled(functools.partial(_best_line, dtype=dtype))


@functools.cache
def _compiled_round(bits: int) -> Callable[..., Any]:
    def round_one(column: mx.array, scale: mx.array, bias: mx.array, factor: mx.array) -> tuple[mx.array, mx.array]:
        code = _nearest((column - bias) / scale, bits)
        return code, (column - (code * scale + bias)) * factor

    return _compiled(round_one)


@functools.cache
def _compiled_best(bits: int) -> Callable[..., Any]:
    def best_one(slope: mx.array, code: mx.array, scale: mx.array, factor: mx.array) -> tuple[mx.array, mx.array]:
        best = _nearest(slope * factor / scale + code, bits)
        return best, (best - code) * scale

    return _compiled(best_one)


@functools.cache
def _compiled_less() -> Callable[..., Any]:
    return _compiled(lambda part, factors, change: part - factors[:, None] * change)


def _best_line(
    products: mx.array, slopes: mx.array, codes: mx.array, scale: mx.array, bias: mx.array, dtype: str
) -> tuple[mx.array, mx.array, mx.array]:
    """As `error_feedback._best_line`: scale, bias and how the weights change."""
    weighted = products @ codes
    codes2, both, ones = (weighted * codes).sum(axis=0), weighted.sum(axis=0), products.sum()
    by_scale, by_bias = (slopes * codes).sum(axis=0), slopes.sum(axis=0)
    determinant = codes2 * ones - both * both
    is_solvable = determinant > 1e-6 * codes2 * ones
    safe = mx.where(is_solvable, determinant, 1)
    new_scale = _stored(scale + mx.where(is_solvable, (by_scale * ones - by_bias * both) / safe, 0), dtype)
    new_bias = _stored(bias + mx.where(is_solvable, (codes2 * by_bias - both * by_scale) / safe, 0), dtype)
    change = (new_scale - scale) * codes + (new_bias - bias)
    gain = 2 * (slopes * change).sum(axis=0) - ((products @ change) * change).sum(axis=0)
    is_better = (gain > 0) & (new_scale != 0)
    return (
        mx.where(is_better, new_scale, scale),
        mx.where(is_better, new_bias, bias),
        mx.where(is_better, change, 0),
    )


def _in_turn(
    state: mx.array, coupling: mx.array, choose: Callable[[int, mx.array], tuple[mx.array, mx.array]]
) -> tuple[mx.array, mx.array]:
    """Go through the rows of `state`, (group, rows): `choose(j, row)` gives a code and a change, and later rows lose
    coupling[j, later] times that change. Returns all codes and all changes, (group, rows)."""
    less = _compiled_less()
    codes: list[mx.array] = []
    changes: list[mx.array] = []
    for first in range(0, len(coupling), _PART):
        part = state[:_PART]
        for j in range(first, first + _PART):
            code, change = choose(j, part[0])
            codes.append(code)
            changes.append(change)
            if j + 1 < first + _PART:
                part = less(part[1:], coupling[j, j + 1 : first + _PART], change)
        if first + _PART < len(coupling):
            state = state[_PART:] - coupling[first : first + _PART, first + _PART :].T @ mx.stack(changes[first:])
    return mx.stack(codes), mx.stack(changes)


def _line(columns: mx.array, importance: mx.array, bits: int, dtype: str) -> tuple[mx.array, mx.array]:
    """Scale and bias of a group by least squares, as `fit.fit_groups` finds them. importance: (group, 1)."""
    scale, bias = _min_max(columns, bits)
    first = _as_stored(scale, bias, dtype)
    codes = _nearest((columns - bias) / scale, bits)  # rounded to the line before it is stored, as min-max does
    second = _as_stored(*_closest(columns, scale, bias, importance, bits), dtype)
    counted_first = _counted(columns, codes, first, importance)
    counted_second = _counted(columns, _nearest((columns - second[1]) / second[0], bits), second, importance)
    is_better = counted_second < counted_first
    return mx.where(is_better, second[0], first[0]), mx.where(is_better, second[1], first[1])


def _min_max(columns: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """As `fit_kernel._min_max`."""
    high, low = columns.max(axis=0), columns.min(axis=0)
    longer = mx.abs(high) - mx.abs(low)
    edge = mx.where(longer < 0, low, high)
    size = mx.maximum((high - low) / ((1 << bits) - 1), SMALLEST_STEP)
    scale = mx.where(longer < 0, size, -size)
    steps = mx.round(edge / scale)
    is_zero = steps == 0
    return mx.where(is_zero, scale, edge / mx.where(is_zero, 1, steps)), mx.where(is_zero, 0, edge)


def _closest(
    columns: mx.array, scale: mx.array, bias: mx.array, importance: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """As `fit_kernel._closest_line`."""
    half = float(1 << (bits - 1))
    steps = (columns - bias) / scale - half
    weight = importance.sum()
    mean_step = (steps * importance).sum(axis=0) / weight
    slope, offset, best = mx.ones_like(scale), mx.zeros_like(scale), mx.full(scale.shape, -1.0)
    for index, (longer, shift) in enumerate(STARTS + MOVES):
        factor = 1 + longer / ((1 << bits) - 1)
        moved, at = (1.0, 0.0) if index < len(STARTS) else (slope, offset)
        tried = moved * factor
        start = at + moved * (shift - 0.5 * (1 - factor))
        codes = mx.clip(mx.round((steps - start) / tried), -half, half - 1)
        weighted = codes * importance
        sum_code = weighted.sum(axis=0)
        mean_code = sum_code / weight
        variance = (weighted * codes).sum(axis=0) - mean_code * sum_code
        covariance = (weighted * steps).sum(axis=0) - mean_step * sum_code
        is_better = (variance > 0) & (covariance * covariance > best * variance)
        safe = mx.where(variance > 0, variance, 1)
        best = mx.where(is_better, covariance * covariance / safe, best)
        refit = covariance / safe
        slope = mx.where(is_better, refit, slope)
        offset = mx.where(is_better, mean_step - refit * mean_code, offset)
    return scale * slope, bias + scale * (offset + half * (1 - slope))


def _counted(columns: mx.array, codes: mx.array, line: tuple[mx.array, mx.array], importance: mx.array) -> mx.array:
    errors = codes * line[0] + line[1] - columns
    return (errors * errors * importance).sum(axis=0)


def _nearest(steps: mx.array, bits: int) -> mx.array:
    return mx.clip(mx.round(steps), 0, (1 << bits) - 1)


def _as_stored(scale: mx.array, bias: mx.array, dtype: str) -> tuple[mx.array, mx.array]:
    return _stored(scale, dtype), _stored(bias, dtype)


def _start(*arrays: mx.array) -> None:
    """Compute them while the next are described; else the whole matrix would be one graph."""
    evaluate: Callable[..., None] = mx.async_eval
    evaluate(*arrays)


def _stored(values: mx.array, dtype: str) -> mx.array:
    """Rounded to what the file holds, in float32."""
    return values.astype(_STORED[dtype]).astype(mx.float32)


def _stored_bits(groups: list[mx.array], dtype: str) -> np.ndarray:
    """(rows, groups) as DTYPES[dtype]; each of `groups` is (rows,), and already what is stored."""
    values = mx.contiguous(mx.stack(groups, axis=1).astype(_STORED[dtype]))
    return np.array(values.view(mx.uint16)) if dtype == "BF16" else np.array(values).astype(DTYPES[dtype])
