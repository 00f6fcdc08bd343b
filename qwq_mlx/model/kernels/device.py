"""Where the CUDA kernels of this package run.

Does not: choose which layers use them (`layers` and `model.rotations` do).
"""

from __future__ import annotations

import mlx.core as mx

__all__ = ["cuda_kernels_run"]

_MIN_CAPABILITY = 8  # cp.async, and products of bfloat16


def cuda_kernels_run() -> bool:
    """Whether this backend runs the kernels: an NVIDIA GPU of compute capability 8.0 or more."""
    if mx.default_device().type == mx.cpu or not mx.cuda.is_available():
        return False
    return int(mx.device_info().get("compute_capability_major", 0)) >= _MIN_CAPABILITY
