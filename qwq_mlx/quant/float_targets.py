"""What the matrices of packed layers should be, to give what the float model gives there.

Behind packed layers a matrix W is fed with x, where the float model feeds it with x + d. Fitting it so that its outputs
stay W x would leave d for good. What is wanted is W (x + d): by least squares with H = mean(x x^T), damped, that is W'
x with W' = W + W mean(d x^T) H^-1 (GPTAQ, Li et al. 2025, arXiv 2504.02692; QEP, Arai & Ichikawa 2025, arXiv
2504.09629). Where the product is added to a residual stream that has drifted by r, it can give W (x + d) + r, and W' is
W + (W mean(d x^T) + mean(r x^T)) H^-1. That fits what the text shows, so it takes much of it: see
`MIN_IDS_TOWARD_FLOAT`.

In a wide matrix H is kept in blocks of channels (`error_feedback`), and so is mean(d x^T): each block makes up for its
own d, and for an equal part of r.

Does not: collect the means (`convert.calibration` does), or pack.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["MIN_IDS_TOWARD_FLOAT", "float_targets"]

MIN_IDS_TOWARD_FLOAT = 60_000
"""Ids of a text from which on the change is made. On a real 1.5B at 3 bits it brought the KL of other outputs from
0.039 to 0.028 by 65,536 ids; half of it by 16,384 and 32,768 ids of riddles, from 0.066 to 0.126 and 0.078. Nothing
between them was measured."""


def float_targets(
    weights: Any,
    uppers: Sequence[Any],
    drifts: Sequence[Any],
    residual: Any = None,
    *,
    product: Callable[[Any, Any], Any] = operator.matmul,
) -> Any:
    """Rows of a matrix as they should be, (rows, columns) float32; of numpy or MLX, as all that is given.

    weights: (rows, columns) float32. uppers: of each block of channels, the upper factor U with H^-1 = U^T U.
    drifts: of each, mean(d x^T), (channels, channels); none: the rows stay as they are. residual: mean(r x^T), (rows,
    columns); None: no stream is corrected. product: multiplies.
    """
    if not drifts:
        return weights
    parts, first = [], 0
    for upper, drift in zip(uppers, drifts, strict=True):
        at = slice(first, first + len(upper))
        first = at.stop
        missing = product(weights[:, at], drift)
        if residual is not None:
            missing = missing + residual[:, at] / len(uppers)
        parts.append(weights[:, at] + product(product(missing, upper.T), upper))
    if isinstance(weights, np.ndarray):
        return np.concatenate(parts, axis=1)
    import mlx.core as mx

    return mx.concatenate(parts, axis=1)
