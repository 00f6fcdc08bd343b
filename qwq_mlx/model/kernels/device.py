"""Where the CUDA kernels of this package run, and the making of one from a file of this folder.

Does not: choose which layers use them (`layers` and `model.rotations` do).
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

__all__ = ["cuda_kernel", "cuda_kernels_run"]

_MIN_CAPABILITY = 8  # cp.async, and products of bfloat16


def cuda_kernels_run() -> bool:
    """Whether this backend runs the kernels: an NVIDIA GPU of compute capability 8.0 or more."""
    if mx.default_device().type == mx.cpu or not mx.cuda.is_available():
        return False
    return int(mx.device_info().get("compute_capability_major", 0)) >= _MIN_CAPABILITY


def cuda_kernel(
    files: Sequence[str], name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, *, n_shared: int = 0
) -> Any:
    """`mx.fast.cuda_kernel` behind files of this folder. source: its body. n_shared: bytes of shared memory."""
    folder = importlib.resources.files(__package__)
    return mx.fast.cuda_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header="".join(_included(folder.joinpath(file)) + "\n" for file in files),
        shared_memory=n_shared,
    )


def _included(file: Any) -> str:
    """A line that includes a file, or its text: MLX 0.32.4 hashes a kernel's whole source at each launch."""
    path = str(file)
    if isinstance(file, Path) and path.isascii() and path.isprintable() and not {*'"\\'} & {*path}:
        return f'#include "{file.absolute()}"'
    return str(file.read_text(encoding="utf-8"))
