"""Weights that are hard to pack, and every packing that MLX has; shared by the tests of this folder."""

from __future__ import annotations

import itertools

import numpy as np

from qwq_mlx.quant.fit import fit_groups
from qwq_mlx.quant.packing import MODES, Packed, Packing, round_to

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
    """Rows packed by `fit_groups`, errors counted by the importance of their input channel, (columns,)."""
    groups = [slice(first, first + packing.group_size) for first in range(0, raw.shape[1], packing.group_size)]
    fitted = [
        fit_groups(raw[:, at], dtype, bits=packing.bits, stored=dtype, importance=importance[at]) for at in groups
    ]
    scales, biases = (
        round_to(np.stack([getattr(each, name) for each in fitted], axis=1), dtype) for name in ("scales", "biases")
    )
    return Packed(np.concatenate([each.codes for each in fitted], axis=1), scales, biases)
