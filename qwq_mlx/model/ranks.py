"""One of several processes that hold a model together: what it has of the model, and how it reads that.

Does not: say how tensors are split (`tensor_parallel` does), or what the processes do together (`engine.ranks` does).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwq_mlx.files.header import Header, TensorEntry
from qwq_mlx.files.rows import read_rows
from qwq_mlx.model.tensor_bytes import array_of
from qwq_mlx.model.tensor_parallel import split_axis

__all__ = ["Ranks", "ranks_of", "read_part"]

_BLOCK_BYTES = 64 << 20  # of a tensor split by columns, that are read at a time


def read_part(shard: Header, entry: TensorEntry, name: str, rank: int, n_ranks: int, compute_type: str) -> Any:
    """A rank's part of a tensor, evaluated: floats in the compute type, codes as they are.

    Of a tensor split by rows, and of a whole one, only its bytes are read; of one split by columns a block of rows at a
    time, so that beside the part 64 MiB are held. Raises SourceError.
    """
    axis, shape = split_axis(name), entry.shape
    if axis is None:
        return array_of(read_rows(shard, entry), entry.dtype, shape, compute_type)
    size = shape[axis] // n_ranks
    if axis == 0:
        raw = read_rows(shard, entry, range(rank * size, (rank + 1) * size))
        return array_of(raw, entry.dtype, (size, *shape[1:]), compute_type)
    row_bytes = (entry.end - entry.start) // shape[0]
    first, n_bytes = rank * row_bytes // n_ranks, row_bytes // n_ranks
    raw = np.empty((shape[0], n_bytes), np.uint8)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for row in range(0, shape[0], step):
        rows = range(row, min(row + step, shape[0]))
        raw[rows.start : rows.stop] = read_rows(shard, entry, rows)[:, first : first + n_bytes]
    return array_of(raw, entry.dtype, (shape[0], size), compute_type)


class Ranks:
    """The processes that hold a model together, and what one of them has of it.

    group: from `mx.distributed.init`. layers: of the model's n_layers, those that this rank has. kv_heads: of the
    model's, those in this rank's KV caches. sends: what it computes goes to another rank, so that it has to be computed
    also where nobody here reads it.
    """

    def __init__(self, group: Any, *, n_layers: int, n_kv_heads: int) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.n_layers = n_layers
        self.sends = False
        self.layers = range(n_layers)
        n_own = n_kv_heads // self.size
        self.kv_heads = range(self.rank * n_own, (self.rank + 1) * n_own)


def ranks_of(module: Any) -> Ranks | None:
    """The ranks that hold a loaded model together; None where it is whole in this process."""
    ranks: Ranks | None = getattr(module, "ranks", None)
    return ranks
