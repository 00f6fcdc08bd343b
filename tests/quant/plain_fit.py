"""The fit's kernel again, in plain numpy: groups as columns, every sum a loop over the group, in its order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwq_mlx.quant.packing import float_values, pack_groups, round_to

STARTS = ((0.0, 0.0), (-0.4, 0.4), (-1.2, -0.4), (-0.8, 0.0))
MOVES = ((0.0, 0.12), (0.15, -0.12))
F32 = np.float32


@dataclass
class Plain:
    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    errors: np.ndarray
    weights2: np.ndarray


def plain_fit(groups: np.ndarray, dtype: str, bits: int, stored: str, importance: np.ndarray | None) -> Plain:
    """By least squares; groups: (groups, group size), DTYPES[dtype]. importance: (group size,)."""
    weights = np.ascontiguousarray(float_values(groups, dtype).T)
    counts = np.ones((len(weights), 1), F32) if importance is None else importance[:, None].astype(F32)
    half, top = F32(1 << (bits - 1)), (1 << bits) - 1
    weights2 = added(counts * weights * weights)
    scale, bias = min_max_line(weights, top)
    stored_scale, stored_bias = as_stored(scale, stored), as_stored(bias, stored)
    count = counts[:, 0].sum() if importance is not None else F32(len(weights))
    mean = added(counts * weights) / count
    steps = (weights - mean) * (1 / scale)
    best = [np.full(len(mean), -1, F32)] * 3  # explained, codes for a step, code of the mean
    for index, (longer, shift) in enumerate(STARTS + MOVES):
        center = (mean - bias) * (1 / scale) - half
        per_step, mean_code = (F32(1), center) if index < len(STARTS) else best[1:]
        shorter, shifted = F32(1 / (1 + longer / top)), F32(shift + longer / top / 2)
        codes = np.clip(np.rint(steps * (per_step * shorter) + (mean_code - shifted) * shorter), -half, half - 1)
        code_sum, code_square = added(counts * codes), added(counts * codes * codes)
        refit_mean, product = code_sum / count, added(counts * codes * steps)
        refit = (code_square - refit_mean * code_sum) / product
        found = [product / refit, refit, refit_mean]
        if index == 0:
            min_max_error = weights2 - found[0] * np.square(scale)
            min_max_error += found[0] * np.square(stored_scale * refit - scale)
            offset = stored_scale * (refit_mean + half) + stored_bias - mean
            min_max_error += (np.square(offset) - np.square(mean)) * count
        is_better = found[0] > best[0]
        best = [np.where(is_better, new, old) for new, old in zip(found, best, strict=True)]
    new_scale = scale / best[1]
    new_bias = mean - new_scale * (best[2] + half)
    new_scale, new_bias = as_stored(new_scale, stored), as_stored(new_bias, stored)
    steps = (weights - new_bias) * (1 / new_scale)
    codes = np.clip(np.rint(steps), 0, top)
    errors = added((steps - codes) * counts * (steps - codes)) * np.square(new_scale)
    edge_codes = np.clip(np.rint((weights - bias) / scale), 0, top)
    differences = edge_codes * stored_scale + stored_bias - weights
    counted = added(differences * counts * differences)
    is_kept = ~(errors + F32(2e-5) * weights2 < min_max_error) & ~(errors < counted)
    codes, scales, biases, errors = (
        np.where(is_kept, old, new)
        for old, new in (
            (edge_codes, codes),
            (stored_scale, new_scale),
            (stored_bias, new_bias),
            (counted, errors),
        )
    )
    return Plain(pack_groups(codes.astype(np.uint8), bits), scales, biases, errors, weights2)


def added(values: np.ndarray) -> np.ndarray:
    """Along a group, in its order; numpy's own sums may fuse products, or take another order."""
    total = values[0].copy()
    for row in values[1:]:
        total += row
    return total


def min_max_line(weights: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    high, low = weights.max(axis=0), weights.min(axis=0)
    is_low = np.abs(low) > np.abs(high)
    edge = np.where(is_low, low, high)
    size = np.maximum((high - low) / F32(top), F32(1e-7))
    size = np.where(is_low, size, -size)
    steps = np.rint(edge / size)
    scale = np.where(steps == 0, size, edge / np.where(steps == 0, 1, steps))
    return scale.astype(F32), np.where(steps == 0, F32(0), edge)


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return float_values(round_to(values, dtype), dtype)
