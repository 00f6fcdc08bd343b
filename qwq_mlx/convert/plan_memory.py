"""How much memory a conversion will need: what the process has now, and what each phase adds to it.

Packing, calibrating and measuring the quality come one after the other, so the peak is the largest of the three. What
the process has already is read and not assumed: a program that converts may hold anything, and the libraries differ
between machines.

Does not: limit anything.
"""

from __future__ import annotations

import importlib.util
import sys

from qwq_mlx.model.process_memory import release_freed_memory, resident_bytes
from qwq_mlx.quant.compiled_fit import is_compiled

__all__ = ["kernel_bytes", "model_peak_bytes", "n_blocks_in_flight", "packing_peak_bytes"]

_STARTED_BYTES = 7_000_000  # threads, MLX's stream and the code of libraries that runs for the first time
_LIBRARY_BYTES = {"transformers": 21_000_000, "mlx_lm": 12_000_000, "torch": 190_000_000}
"""Resident once they are imported (Linux x86; mlx-lm 0.32.2, transformers 5.23). mlx_lm imports the others, PyTorch
only where it is installed."""

_FITTED_BYTES_PER_WEIGHT = 2  # of a block: what it was packed into
_BYTES_PER_WEIGHT = (
    6  # of a block that is not fitted: as float32, and a tile of what it was packed into, as float32 again
)
_LOADED_BYTES, _COMPILED_BYTES = 18_000_000, 160_000_000
"""The fit's machine code with what runs of LLVM; numba, where it has to be compiled first (Linux x86, numba 0.68)."""
_DECODED_BYTES_PER_WEIGHT = 12  # of a GGUF's block: float32, and what decoding it takes


def n_blocks_in_flight(n_workers: int) -> int:
    """Blocks that exist at once: two per worker, and enough more to keep the workers busy while a tensor is synced."""
    return 2 * n_workers + 12


def packing_peak_bytes(
    block_bytes: int, block_weights: int, n_workers: int, *, other_weights: int, unplaced_bytes: int, is_gguf: bool
) -> int:
    """Of reading, packing and writing: buffers of the largest block, and what the workers have of their own.

    block_weights: of the largest block; other_weights: of the largest that is not fitted. unplaced_bytes: of the
    largest packed block that is longer than a buffer, so that it cannot take its rows' place.
    """
    total = n_blocks_in_flight(n_workers) * (block_bytes + unplaced_bytes)
    total += n_workers * max(_FITTED_BYTES_PER_WEIGHT * block_weights, _BYTES_PER_WEIGHT * other_weights)
    if is_gguf:
        total += n_workers * _DECODED_BYTES_PER_WEIGHT * block_weights
    return _present_bytes() + _STARTED_BYTES + total


def kernel_bytes() -> int:
    """Of the fit's kernel, which stays until the process ends. To be asked first: afterwards LLVM itself is there."""
    return _LOADED_BYTES if is_compiled() else _COMPILED_BYTES


def model_peak_bytes(n_bytes: int) -> int:
    """Of running the model, which needs n_bytes of its own, and libraries that packing does without."""
    to_come = (name for name in _LIBRARY_BYTES if name not in sys.modules and importlib.util.find_spec(name))
    return _present_bytes() + _STARTED_BYTES + sum(_LIBRARY_BYTES[name] for name in to_come) + n_bytes


def _present_bytes() -> int:
    """What the process has now, without what it has freed: a tokenizer that was checked leaves 74 MB of that."""
    release_freed_memory()
    return resident_bytes()
