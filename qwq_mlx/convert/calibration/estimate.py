"""How long a calibration pass takes on this machine, before it starts: a product and a small fit are timed.

A pass is two times every id through every layer, four times where the float model is run too, the products of the
layers' inputs, and the fit, whose time a weight has a part of its own and one that grows with the columns of its
matrix, on the GPU where there is one. There columns go one after the other, however few rows they have, and a core
factors a part of each input's products: both are timed apart. Within a factor of two where it was measured (an x86
CPU); not measured on Metal, or beside a GPU's seconds.

Does not: know the disk, or how busy the machine will be.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from qwq_mlx.convert.calibration.text import DEVICE_WEIGHTS
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

_PRODUCTS_PER_WEIGHT = (8, 14)
"""Operations of the fit for each weight and column of a block: feedback and two sweeps, and with the float model's
stream its target."""

_PRODUCTS_PER_CHANNEL = (1, 3)
"""Of a position and each of a channel's products: moments, which are symmetric, and with that stream the drift."""

_SIDE = 256
_DEVICE_ROWS = (256, 8192)  # of a short and a long matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """Seconds where matrices are fitted.

    weight_s: of a weight of a narrow matrix. operation_s, factor_s: of an operation of a product, of a factorization.
    column_s, channel_s: what a column of a matrix and a channel of an input cost beside that, on a GPU.
    """

    weight_s: float
    operation_s: float
    factor_s: float
    column_s: float = 0.0
    channel_s: float = 0.0


def estimate_calibration_s(plan: Plan) -> float:
    """Seconds, packing and writing not counted. plan: with a calibration."""
    calibration, config = plan.calibration, plan.config
    assert calibration is not None
    costs = _costs(plan.n_workers)
    n_streams = 1 + calibration.is_toward_float
    # up to each part of a layer and, as it is packed then, through all of it
    passes = n_streams * estimate_s(config, [len(text) for text in calibration.texts], weights_bytes=plan.source_bytes)
    fits = products = in_layers = 0.0
    for each in plan.tensors:
        if each.packing is None or (each.source.name.startswith("model.embed") and not config.tie_word_embeddings):
            continue
        rows, columns = each.source.shape
        block, is_in_layer = block_size(columns), layer_of(each.source.name) is not None
        in_layers += rows * columns if is_in_layer else 0
        n_parts = math.ceil(rows / max(1, DEVICE_WEIGHTS // columns))
        fits += rows * columns * (costs.weight_s + _PRODUCTS_PER_WEIGHT[n_streams - 1] * block * costs.operation_s)
        fits += n_parts * columns * costs.column_s
        own_input = ("q_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")
        if not is_in_layer or each.source.name.endswith(own_input):
            n_products = _PRODUCTS_PER_CHANNEL[n_streams - 1]
            products += n_products * calibration.n_ids * columns * block * costs.operation_s
            if n_streams > 1 and is_in_layer and each.source.name.endswith(("o_proj.weight", "down_proj.weight")):
                products += 2 * calibration.n_ids * columns * rows * costs.operation_s  # with the residual stream
            products += 2 * columns * block**2 * costs.factor_s + columns * costs.channel_s
    return passes * in_layers / plan.n_weights + fits + products


@functools.cache
def _costs(n_workers: int) -> _Costs:
    """Timed once a process."""
    random, mx = np.random.default_rng(0), import_mlx()
    wide = random.standard_normal((4 * _SIDE, 4 * _SIDE)).astype(np.float32)
    n_operations = 2 * len(wide) ** 3
    if backend_name() == "cpu":
        moments, by_blas = factor_moments([np.eye(_SIDE)]), best_time(lambda: wide @ wide) / n_operations
        weights = random.standard_normal((_SIDE, _SIDE)).astype(np.float32)
        fit_s = best_time(lambda: fit_rows(weights, moments, Packing(), "F32"))
        return _Costs(weight_s=fit_s / weights.size / n_workers, operation_s=by_blas, factor_s=by_blas)
    weights, factor = random.standard_normal((_DEVICE_ROWS[-1], _SIDE)).astype(np.float32), mx.array(wide)
    on_device, identity = factor_on_device([mx.eye(_SIDE)]), mx.eye(_SIDE)
    of_few, of_many = (
        best_time(functools.partial(fit_rows_on_device, mx.array(weights[:n]), on_device, Packing(), "F32"))
        for n in _DEVICE_ROWS
    )
    weight_s = max(0.0, of_many - of_few) / (weights.size - _DEVICE_ROWS[0] * _SIDE)
    by_gpu = best_time(lambda: mx.eval(factor @ factor)) / n_operations
    return _Costs(
        weight_s=weight_s,
        operation_s=by_gpu,
        factor_s=3 * by_gpu,  # three products for one
        column_s=max(0.0, of_few / _SIDE - _DEVICE_ROWS[0] * weight_s),
        channel_s=best_time(lambda: factor_on_device([identity])) / _SIDE,
    )
