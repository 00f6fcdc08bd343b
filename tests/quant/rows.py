"""Weights that are hard to pack, and every packing that MLX has; shared by the tests of this folder."""

from __future__ import annotations

import itertools

import numpy as np

from qwq_mlx.quant.fit import closest_stored_line
from qwq_mlx.quant.packing import MODES, Packed, Packing, float_values, pack_groups, round_to
from qwq_mlx.quant.tile import Tile

PACKINGS = [
    Packing(mode=mode, bits=bits, group_size=group)
    for mode, (all_bits, groups) in MODES.items()
    for bits, group in itertools.product(all_bits, groups)
]


def awkward_rows(seed: int = 0) -> np.ndarray:
    """Rows (12, 256): normal, shifted, one sign, outliers, constants, zeros, tiny and huge values."""
    random = np.random.default_rng(seed)
    rows = 0.02 * random.standard_normal((12, 256)).astype(np.float32)
    rows[1] += 0.5
    rows[2] = np.abs(rows[2])
    rows[3] = -np.abs(rows[3])
    rows[4, ::37] *= 80
    rows[5] = 0.25
    rows[6] = 0.0
    rows[7] = -0.0
    rows[8] *= 1e-6
    rows[9] *= 1e4
    rows[10, :128] = 0.0
    rows[11] = np.round(rows[11] * 400) / 400  # many exact ties
    return rows


def weighted_fit(raw: np.ndarray, dtype: str, packing: Packing, importance: np.ndarray) -> Packed:
    """Rows packed by `closest_stored_line`, errors counted by the importance of their input channel, (columns,)."""
    rows, group = len(raw), packing.group_size
    codes, lines = [], []
    for first in range(0, raw.shape[1], group):
        at = slice(first, first + group)
        weights = np.ascontiguousarray(float_values(np.ascontiguousarray(raw[:, at]), dtype).T)
        tile = Tile(weights, *(np.empty_like(weights) for _ in range(3)), np.empty(weights.shape, np.uint8))
        lines.append(closest_stored_line(tile, packing.bits, dtype, importance[at]))
        codes.append(tile.codes)
    packed = pack_groups(np.stack(codes, axis=2).reshape(group, -1), packing.bits)
    scales, biases = (
        round_to(np.stack([getattr(line, name) for line in lines], axis=1), dtype) for name in ("scale", "bias")
    )
    return Packed(packed.reshape(rows, -1), scales, biases)
