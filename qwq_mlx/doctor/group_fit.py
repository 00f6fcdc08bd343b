"""The CUDA kernels of the calibrated fit beside numpy: what a random matrix loses by each, and how many codes agree.

Both add in another order, so that ties and what follows from them differ: on an H200 losses were 0.996 to 1.003 of
numpy's and 97 to 99 % of the codes the same (other matrices, 2026-11-29; this check itself has not run there). Products
of MLX that round to TF32 change 0.7 % of these codes and 0.0011 of the loss, by emulation.

Does not: measure their speed, or fit on the CPU or on Metal, where no such kernels run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quant.packing import Packed, Packing, unpack_codes

__all__ = ["check_group_fit"]

_BITS = (3, 4)
_ROWS, _COLUMNS, _STORED = 200, 512, "BF16"  # a block of threads that is not full, and groups behind others
_MAX_APART = 0.02  # of numpy's loss
_MIN_SAME = 0.95  # share of codes


def check_group_fit(subject: Subject) -> Result:
    """The kernels lose what numpy loses, by nearly the same codes."""
    from qwq_mlx.quant.group_kernels import group_kernels_run

    if not group_kernels_run():
        return Result(outcome="not checkable", found=f"this is {subject.backend}; the kernels run on NVIDIA GPUs")
    found = {bits: _beside_numpy(Packing(bits=bits)) for bits in _BITS}
    wrong = [bits for bits, (ratio, same) in found.items() if not (abs(ratio - 1) <= _MAX_APART and same >= _MIN_SAME)]
    each = (
        f"{bits} bits: {ratio:.4f} of numpy's loss, {same:.1%} of its codes" for bits, (ratio, same) in found.items()
    )
    return Result(
        outcome="failed" if wrong else "ok",
        found="; ".join(each),
        expected=f"{1 - _MAX_APART} to {1 + _MAX_APART} of its loss, at least {_MIN_SAME:.0%} of its codes",
        values={
            "wrong": wrong,
            "loss_ratio": {str(bits): ratio for bits, (ratio, _) in found.items()},
            "same_codes": {str(bits): same for bits, (_, same) in found.items()},
        },
    )


def _beside_numpy(packing: Packing) -> tuple[float, float]:
    """Loss over numpy's, and the share of codes that are the same."""
    from qwq_mlx.quant.device_feedback import fit_rows_on_device
    from qwq_mlx.quant.device_moments import factor_on_device
    from qwq_mlx.quant.error_feedback import factor_moments, fit_rows

    mx, random = import_mlx(), np.random.default_rng(packing.bits)
    mixed = random.standard_normal((2 * _COLUMNS, _COLUMNS)) @ random.standard_normal((_COLUMNS, _COLUMNS))
    inputs = mixed * np.exp(random.standard_normal(_COLUMNS))  # correlated, and some channels far larger than others
    products = inputs.T @ inputs / len(inputs)
    weights = (0.02 * random.standard_t(5, (_ROWS, _COLUMNS))).astype(np.float32)

    expected = fit_rows(weights, factor_moments([products.copy()]), packing, _STORED)
    moments = factor_on_device([mx.array(products.astype(np.float32))])
    packed, _ = fit_rows_on_device(mx.array(weights), moments, packing, _STORED)
    losses = (_loss(weights, each, products, packing) for each in (packed, expected))
    same = unpack_codes(packed.codes, packing.bits) == unpack_codes(expected.codes, packing.bits)
    return next(losses) / next(losses), float(same.mean())


def _loss(weights: NDArray[np.float32], packed: Packed, products: NDArray[np.float64], packing: Packing) -> float:
    """What the matrix's outputs lose, summed over rows."""
    from qwq_mlx.quant.rounding_error import unpack

    errors = weights.astype(np.float64) - unpack(packed, packing, _STORED, stream=None)
    return float(np.sum((errors @ products) * errors))
