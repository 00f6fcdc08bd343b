"""How long a calibration pass takes on this machine, before it starts: a product and a small fit are timed.

A pass is two times every id through every layer, the products of the layers' inputs, and the fit, whose time a weight
has a part of its own and one that grows with the columns of its matrix, on the GPU where there is one. Within a factor
of two where it was measured (an x86 CPU); not measured on Metal.

Does not: know the disk, or how busy the machine will be.
"""

from __future__ import annotations

import functools

import numpy as np

from qwq_mlx.convert.plan import Plan
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quality.estimate import best_time, estimate_s
from qwq_mlx.quant.device_feedback import fit_rows_on_device
from qwq_mlx.quant.device_moments import factor_on_device
from qwq_mlx.quant.error_feedback import block_size, factor_moments, fit_rows
from qwq_mlx.quant.packing import Packing
from qwq_mlx.quant.recipe import layer_of

__all__ = ["estimate_calibration_s"]

_PRODUCTS_PER_WEIGHT = 8  # operations of the fit for each weight and column of a block: feedback, and two sweeps
_SIDE = 256
_DEVICE_ROWS = 8192  # of a long matrix, so that not only starts of kernels are timed


def estimate_calibration_s(plan: Plan) -> float:
    """Seconds, packing and writing not counted. plan: with a calibration."""
    calibration, config = plan.calibration, plan.config
    assert calibration is not None
    weight_s, operation_s, factor_s = _costs(plan.n_workers)
    passes = estimate_s(config, [len(text) for text in calibration.texts], weights_bytes=2 * plan.source_bytes)
    fits = products = in_layers = 0.0
    for each in plan.tensors:
        if each.packing is None or (each.source.name.startswith("model.embed") and not config.tie_word_embeddings):
            continue
        rows, columns = each.source.shape
        block = block_size(columns)
        in_layers += rows * columns if layer_of(each.source.name) is not None else 0
        fits += rows * columns * (weight_s + _PRODUCTS_PER_WEIGHT * block * operation_s)
        if each.source.name.endswith(("q_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")):
            products += calibration.n_ids * columns * block * operation_s + 2 * columns * block**2 * factor_s
    return passes * in_layers / plan.n_weights + fits + products


@functools.cache
def _costs(n_workers: int) -> tuple[float, float, float]:
    """Seconds for a weight of a narrow matrix, and for an operation of a product and of a factorization; all where
    matrices are fitted."""
    random, mx = np.random.default_rng(0), import_mlx()
    wide = random.standard_normal((4 * _SIDE, 4 * _SIDE)).astype(np.float32)
    n_operations = 2 * len(wide) ** 3
    if backend_name() == "cpu":
        moments, by_blas = factor_moments([np.eye(_SIDE)]), best_time(lambda: wide @ wide) / n_operations
        weights = random.standard_normal((_SIDE, _SIDE)).astype(np.float32)
        fit_s = best_time(lambda: fit_rows(weights, moments, Packing(), "F32"))
        return fit_s / weights.size / n_workers, by_blas, by_blas
    rows, factor = mx.array(random.standard_normal((_DEVICE_ROWS, _SIDE)).astype(np.float32)), mx.array(wide)
    on_device = factor_on_device([mx.eye(_SIDE)])
    fit_s = best_time(lambda: fit_rows_on_device(rows, on_device, Packing(), "F32"))
    by_gpu = best_time(lambda: mx.eval(factor @ factor)) / n_operations
    return fit_s / rows.size, by_gpu, 3 * by_gpu  # three products for one
