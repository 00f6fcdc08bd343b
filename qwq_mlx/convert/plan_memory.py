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
from qwq_mlx.quant.fit import TILE

__all__ = ["model_peak_bytes", "n_blocks_in_flight", "packing_peak_bytes", "workers_bytes"]

_STARTED_BYTES = 7_000_000  # threads, MLX's stream and the code of libraries that runs for the first time
_LIBRARY_BYTES = {"transformers": 21_000_000, "mlx_lm": 12_000_000, "torch": 190_000_000}
"""Resident once they are imported (Linux x86; mlx-lm 0.32.2, transformers 5.23). mlx_lm imports the others, PyTorch
only where it is installed."""

_BYTES_PER_WEIGHT = 36  # of a tile: its scratch, temporary arrays, and what its block was packed into
_DECODED_BYTES_PER_WEIGHT = 12  # of a GGUF's block: float32, and what decoding it takes


def n_blocks_in_flight(n_workers: int) -> int:
    """Blocks that exist at once: two per worker, and enough more to keep the workers busy while a tensor is synced."""
    return 2 * n_workers + 12


def packing_peak_bytes(
    block_bytes: int, block_weights: int, n_workers: int, *, unplaced_bytes: int, is_gguf: bool
) -> int:
    """Of reading, packing and writing: buffers of the largest block, and what the workers have of their own.

    unplaced_bytes: of the largest packed block that is longer than a buffer, so that it cannot take its rows' place.
    """
    total = n_blocks_in_flight(n_workers) * (block_bytes + unplaced_bytes) + workers_bytes(block_weights, n_workers)
    if is_gguf:
        total += n_workers * _DECODED_BYTES_PER_WEIGHT * block_weights
    return _present_bytes() + _STARTED_BYTES + total


def workers_bytes(block_weights: int, n_workers: int) -> int:
    """What packing threads keep for themselves; it stays with them until the process ends.

    block_weights: of the largest block.
    """
    return n_workers * _BYTES_PER_WEIGHT * min(block_weights, TILE)


def model_peak_bytes(n_bytes: int) -> int:
    """Of running the model, which needs n_bytes of its own, and libraries that packing does without."""
    to_come = (name for name in _LIBRARY_BYTES if name not in sys.modules and importlib.util.find_spec(name))
    return _present_bytes() + _STARTED_BYTES + sum(_LIBRARY_BYTES[name] for name in to_come) + n_bytes


def _present_bytes() -> int:
    """What the process has now, without what it has freed: a tokenizer that was checked leaves 74 MB of that."""
    release_freed_memory()
    return resident_bytes()
