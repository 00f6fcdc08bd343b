"""Scale, bias and codes of every group, as numba compiles it: LANES groups at a time, one beside the other.

Everything that is known of a group lies in the same lane of every row, so each inner loop is over lanes, which LLVM
makes vector instructions of, and what a step needs stays in the core's first cache. Sums of a group are added weight by
weight in their order and no product is fused with a sum, so the bytes are the same on every machine.

Imported only where it is compiled (`compiled_fit`), since numba takes a while. Does not: check its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numpy.typing import NDArray

from qwq_mlx.quant.least_squares import LANES, MOVES, ROWS, SMALLEST_STEP, STARTS

__all__ = ["compiled"]

_F32 = np.float32
_BF16, _F16 = 16, 13  # the low bits of a float32 that the type lacks; 0 of float32 itself
_SMALLEST_NORMAL, _LARGEST = _F32(2**-14), _F32(65504)  # of float16
_ROUNDING = _F32(2e-5)
"""Of a group's sums, above what rounding in float32 takes from them: where the errors of two lines are this near, they
are measured."""
_AT_ONCE = 4  # weights of a group, whose sums need not leave their registers between them
_MOVES, _N_STARTS = np.array(STARTS + MOVES), len(STARTS)

Lanes = NDArray[np.float32]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    jit: Any = njit(error_model="numpy")
    compiled: _Function = jit(function)
    return compiled


def _inlined(function: _Function) -> _Function:
    """Before LLVM sees it, which then knows that rows do not overlap; it takes longer to compile."""
    jit: Any = njit(inline="always", error_model="numpy")
    inlined: _Function = jit(function)
    return inlined


def compiled() -> Any:
    """numba's compiled callback around `fit_groups`."""
    pointer: Any = types.CPointer
    number, numbers, words = types.intp, pointer(types.float32), pointer(types.uint32)
    signature = types.void(pointer(types.uint16), *[number] * 8, numbers, types.float32, numbers, words, numbers)
    return cfunc(signature, error_model="numpy")(fit_groups)


def fit_groups(
    raw: Any,
    n_groups: int,
    group: int,
    group_stride: int,
    weight_stride: int,
    lacking: int,
    stored_lacking: int,
    bits: int,
    is_refined: int,
    importance: Any,
    total: np.float32,
    memory: Any,
    codes: Any,
    fitted: Any,
) -> None:
    """Fit groups, given by pointers.

    raw: weights in units of 16 bits; group_stride, weight_stride: from one group or weight to the next, in those.
    lacking, stored_lacking: low bits of a float32 that the weights' type and that of scales and biases lack.
    is_refined: least squares, else min/max. importance: (group,) of each weight's squared error, total is its sum.
    memory: (2 group + ROWS, LANES), to work in. codes: packed, (n_groups, group * bits / 32).
    fitted: (4, n_groups), in which scales and biases as they are stored, squared errors and squares of weights go, both
    as they count.
    """
    rows = carray(memory, (2 * group + ROWS, LANES))
    weights, steps, lanes = rows[:group], rows[group : 2 * group], rows[2 * group :]
    counts, packed = carray(importance, (group,)), carray(codes, (n_groups, group * bits // 32))
    out = carray(fitted, (4, n_groups))
    for first in range(0, n_groups, LANES):
        n = min(LANES, n_groups - first)
        _load(raw, first, n_groups, group_stride, weight_stride, lacking, weights)
        _sum_weights(weights, counts, lanes)
        _min_max(lanes, bits)
        if is_refined:
            _least_squares(weights, counts, total, bits, stored_lacking, steps, lanes)
        else:
            _by_min_max(weights, bits, stored_lacking, steps, lanes)
        _pack(steps, bits, n, lanes[4].view(np.uint32), packed[first:])
        for row in range(4):
            for j in range(n):
                out[row, first + j] = lanes[row, j]


@_compiled
def _load(
    raw: Any, first: int, n_groups: int, group_stride: int, weight_stride: int, lacking: int, weights: Lanes
) -> None:
    """Weights as float32; lanes behind the last group hold it again."""
    bits = weights.view(np.uint32)
    for j in range(LANES):
        start = min(first + j, n_groups - 1) * group_stride
        for i in range(len(weights)):
            value = np.uint32(raw[start + i * weight_stride])
            if lacking == _BF16:
                bits[i, j] = value << 16
            elif lacking == _F16:
                infinity = np.uint32(0x7F800000) if value & 0x7C00 == 0x7C00 else np.uint32(0)
                bits[i, j] = ((value & 0x8000) << 16) | ((value & 0x7FFF) << 13) | infinity
            else:
                bits[i, j] = value | (np.uint32(raw[start + i * weight_stride + 1]) << 16)
    if lacking == _F16:
        for i in range(len(weights)):
            for j in range(LANES):
                weights[i, j] *= _F32(2.0**112)  # the two types' exponents begin so far apart


@_compiled
def _sum_weights(weights: Lanes, counts: Lanes, lanes: Lanes) -> None:
    """Row 3: squares; 5: sum; 6, 7: largest and smallest."""
    square, total, high, low = lanes[3], lanes[5], lanes[6], lanes[7]
    for j in range(LANES):
        high[j] = low[j] = weights[0, j]
        square[j], total[j] = _F32(0), _F32(-0.0)
    for i in range(0, len(weights), _AT_ONCE):
        for j in range(LANES):
            largest, smallest, sums, squares = high[j], low[j], total[j], square[j]
            for k in range(_AT_ONCE):
                weight = weights[i + k, j]
                counted = counts[i + k] * weight
                largest, smallest = max(largest, weight), min(smallest, weight)
                sums, squares = sums + counted, squares + counted * weight
            high[j], low[j], total[j], square[j] = largest, smallest, sums, squares


@_compiled
def _min_max(lanes: Lanes, bits: int) -> None:
    """Row 8: scale, 9: bias that spread the codes over each group's range, each step that of mlx::core::quantize."""
    high, low, scale, bias = lanes[6], lanes[7], lanes[8], lanes[9]
    top = _F32((1 << bits) - 1)
    for j in range(LANES):
        longer = abs(high[j]) - abs(low[j])
        edge = low[j] if longer < 0 else high[j]
        size = max((high[j] - low[j]) / top, _F32(SMALLEST_STEP))
        size = size if longer < 0 else -size  # downwards from high, where both are as long, too
        steps = np.rint(edge / size)
        scale[j] = size if steps == 0 else edge / steps
        bias[j] = _F32(0) if steps == 0 else edge


@_compiled
def _round(values: Lanes, lacking: int, rounded: Lanes) -> None:
    """To the nearest values of the type that lacks so many bits, ties to even."""
    bits, out = values.view(np.uint32), rounded.view(np.uint32)
    for j in range(LANES):
        value, size = values[j], abs(values[j])
        if lacking == 0:
            out[j] = bits[j]
        else:
            up = ((bits[j] >> lacking) & 1) + (1 << (lacking - 1)) - 1
            out[j] = (bits[j] + up) >> lacking << lacking
        if lacking == _F16:
            if size < _SMALLEST_NORMAL:
                rounded[j] = np.copysign((size + _F32(0.5)) - _F32(0.5), value)  # to multiples of 2**-24
            elif abs(rounded[j]) > _LARGEST:
                rounded[j] = np.copysign(_F32(np.inf), value)


@_inlined
def _nearest(step: np.float32, low: np.float32, high: np.float32) -> np.float32:
    code = np.rint(step)
    code = low if code < low else code
    return high if code > high else code


@_compiled
def _by_min_max(weights: Lanes, bits: int, stored_lacking: int, codes: Lanes, lanes: Lanes) -> None:
    """Rows 0 to 2: scale, bias, error. The bias is a weight or zero, which the weights' own type stores as it is;
    errors are counted from the stored one."""
    stored_scale, stored_bias, error, scale, bias = lanes[0], lanes[1], lanes[2], lanes[8], lanes[9]
    top = _F32((1 << bits) - 1)
    _round(scale, stored_lacking, stored_scale)
    _round(bias, stored_lacking, stored_bias)
    for j in range(LANES):
        error[j] = _F32(0)
    for i in range(len(weights)):
        for j in range(LANES):
            step = weights[i, j] - stored_bias[j]
            code = _nearest(step / scale[j], _F32(0), top)
            codes[i, j] = code
            difference = code * stored_scale[j] - step
            error[j] += difference * difference


@_inlined
def _least_squares(
    weights: Lanes, counts: Lanes, total: np.float32, bits: int, stored_lacking: int, steps: Lanes, lanes: Lanes
) -> None:
    """Rows 0 to 2: scale, bias, error; the codes go into `steps`. A group that is not improved keeps min/max's."""
    scale, bias, error, square, counted = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    min_max_scale, min_max_bias, min_max_error = lanes[10], lanes[11], lanes[12]
    _round(lanes[8], stored_lacking, min_max_scale)
    _round(lanes[9], stored_lacking, min_max_bias)
    _closest_line(weights, counts, total, bits, steps, lanes)
    _round(scale, stored_lacking, scale)
    _round(bias, stored_lacking, bias)
    _round_weights(weights, counts, bits, steps, lanes)
    doubtful = 0
    for j in range(LANES):
        doubtful += 0 if error[j] + _ROUNDING * square[j] < min_max_error[j] else 1
    if doubtful == 0:
        return
    _count_min_max(weights, counts, bits, lanes)
    top = _F32((1 << bits) - 1)
    for j in range(LANES):
        if error[j] + _ROUNDING * square[j] < min_max_error[j] or error[j] < counted[j]:
            continue
        for i in range(len(weights)):
            steps[i, j] = _nearest((weights[i, j] - lanes[9, j]) / lanes[8, j], _F32(0), top)
        scale[j], bias[j], error[j] = min_max_scale[j], min_max_bias[j], counted[j]


@_inlined
def _closest_line(weights: Lanes, counts: Lanes, total: np.float32, bits: int, steps: Lanes, lanes: Lanes) -> None:
    """Rows 0, 1: the line of least squared error that the moves reach; 12: the error of min/max's codes with its
    stored line. The error comes out of the sums, with their rounding. Where all weights of a group are alike it is no
    number, and the line is of no use."""
    new_scale, new_bias, square, scale, bias = lanes[0], lanes[1], lanes[3], lanes[8], lanes[9]
    stored_scale, stored_bias, min_max_error, mean, center = lanes[10], lanes[11], lanes[12], lanes[13], lanes[14]
    best, best_step, best_mean, per_step, start = lanes[15], lanes[16], lanes[17], lanes[18], lanes[19]
    code_sum, code_square, product = lanes[4], lanes[6], lanes[7]
    half, top = _F32(1 << (bits - 1)), (1 << bits) - 1
    for j in range(LANES):
        mean[j] = lanes[5, j] / total
        per_step[j] = _F32(1) / scale[j]
        center[j] = (mean[j] - bias[j]) * per_step[j] - half  # codes are counted from their middle
        best[j], best_step[j], best_mean[j] = _F32(-1), _F32(-1), _F32(-1)
    for i in range(len(weights)):
        for j in range(LANES):
            steps[i, j] = (weights[i, j] - mean[j]) * per_step[j]  # about zero: sums keep more digits
    for index in range(len(_MOVES)):
        is_start, longer, shift = index < _N_STARTS, _MOVES[index, 0], _MOVES[index, 1]
        shorter, shifted = _F32(1 / (1 + longer / top)), _F32(shift + longer / top / 2)
        for j in range(LANES):
            per_step[j] = (_F32(1) if is_start else best_step[j]) * shorter
            start[j] = ((center[j] if is_start else best_mean[j]) - shifted) * shorter
        _sum_codes(steps, counts, half, lanes)
        for j in range(LANES):
            mean_code = code_sum[j] / total
            step = (code_square[j] - mean_code * code_sum[j]) / product[j]
            explained = product[j] / step
            if index == 0:
                longer_step = stored_scale[j] * step - scale[j]
                offset = stored_scale[j] * (mean_code + half) + stored_bias[j] - mean[j]
                error = square[j] - explained * (scale[j] * scale[j])
                error += explained * (longer_step * longer_step)
                min_max_error[j] = error + (offset * offset - mean[j] * mean[j]) * total
            is_better = explained > best[j]
            best[j] = explained if is_better else best[j]
            best_step[j] = step if is_better else best_step[j]
            best_mean[j] = mean_code if is_better else best_mean[j]
    for j in range(LANES):
        new_scale[j] = scale[j] / best_step[j]
        new_bias[j] = mean[j] - new_scale[j] * (best_mean[j] + half)


@_inlined
def _sum_codes(steps: Lanes, counts: Lanes, half: np.float32, lanes: Lanes) -> None:
    """Of the codes nearest to steps * row 18 + row 19 their sum (row 4), their squares' (6) and their product's with
    the steps (7)."""
    code_sum, code_square, product, per_step, start = lanes[4], lanes[6], lanes[7], lanes[18], lanes[19]
    low, high = -half, half - _F32(1)
    for j in range(LANES):
        code_sum[j], code_square[j], product[j] = _F32(0), _F32(0), _F32(0)
    for i in range(0, len(steps), _AT_ONCE):
        for j in range(LANES):
            sums, squares, products = code_sum[j], code_square[j], product[j]
            for k in range(_AT_ONCE):
                step = steps[i + k, j]
                code = _nearest(step * per_step[j] + start[j], low, high)
                counted = counts[i + k] * code
                sums, squares, products = sums + counted, squares + counted * code, products + counted * step
            code_sum[j], code_square[j], product[j] = sums, squares, products


@_compiled
def _round_weights(weights: Lanes, counts: Lanes, bits: int, codes: Lanes, lanes: Lanes) -> None:
    """To the stored line of rows 0 and 1; row 2: squared errors."""
    scale, bias, error, inverse = lanes[0], lanes[1], lanes[2], lanes[4]
    top = _F32((1 << bits) - 1)
    for j in range(LANES):
        inverse[j], error[j] = _F32(1) / scale[j], _F32(0)
    for i in range(len(weights)):
        for j in range(LANES):
            step = (weights[i, j] - bias[j]) * inverse[j]
            code = _nearest(step, _F32(0), top)
            codes[i, j] = code
            difference = step - code
            error[j] += difference * counts[i] * difference
    for j in range(LANES):
        error[j] *= scale[j] * scale[j]


@_compiled
def _count_min_max(weights: Lanes, counts: Lanes, bits: int, lanes: Lanes) -> None:
    """Row 4: squared errors of min/max's codes with its stored line."""
    counted, scale, bias, stored_scale, stored_bias = lanes[4], lanes[8], lanes[9], lanes[10], lanes[11]
    top = _F32((1 << bits) - 1)
    for j in range(LANES):
        counted[j] = _F32(0)
    for i in range(len(weights)):
        for j in range(LANES):
            code = _nearest((weights[i, j] - bias[j]) / scale[j], _F32(0), top)
            difference = code * stored_scale[j] + stored_bias[j] - weights[i, j]
            counted[j] += difference * counts[i] * difference


@_compiled
def _pack(codes: Lanes, bits: int, n: int, words: NDArray[np.uint32], packed: NDArray[np.uint32]) -> None:
    """The first n lanes' codes as `packing.pack_groups` lays them. words: of each lane the one under way."""
    filled = place = 0
    for j in range(LANES):
        words[j] = 0
    for i in range(len(codes)):
        for j in range(LANES):
            words[j] |= np.uint32(np.int32(codes[i, j])) << (filled & 31)
        filled += bits
        if filled >= 32:
            filled -= 32
            for j in range(n):
                packed[j, place] = words[j]
            place += 1
            for j in range(LANES):
                words[j] = np.uint32(np.int32(codes[i, j])) >> (bits - filled)
