"""One of several processes that hold a model together: it reads its part of the weights, and agrees with the others.

Every rank runs the same program on the same question. Rank 0 draws; its ids, and whether any rank is asked to stop,
reach all in the same step.

Does not: say how tensors are split (`tensor_parallel` does), or start and watch processes (`generate --hosts` does).
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
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
    """The processes that hold a model together, as one of them sees them.

    group: from `mx.distributed.init`.
    wants_stop: set it, also in a signal handler, to end what runs on every rank.
    has_agreed_to_stop: some rank wanted it; known to all in the same step.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.wants_stop = False
        self.has_agreed_to_stop = False

    def begin(self) -> None:
        """Let what begins now run, where an earlier run was stopped; a wish that no rank has heard yet is kept.

        All ranks know of the same stops, so after it they still agree.
        """
        if self.has_agreed_to_stop:
            self.wants_stop = self.has_agreed_to_stop = False

    def agreed(self, drawn: mx.array) -> tuple[mx.array, mx.array]:
        """Rank 0's ids, (n,) uint32, and how many ranks want to stop, () float32; unread."""
        mine = drawn if self.rank == 0 else mx.zeros_like(drawn)
        wish = mx.array([self.wants_stop], mx.uint32)
        both = mx.distributed.all_sum(mx.concatenate([mine.astype(mx.uint32), wish]), group=self.group)
        return both[:-1], both[-1].astype(mx.float32)

    def first(self, value: int) -> int:
        """What rank 0 gives, below 2^32; waits for all."""
        mine = mx.array([value if self.rank == 0 else 0], mx.uint32)
        return cast(int, mx.distributed.all_sum(mine, group=self.group).item())

    def smallest(self, value: int) -> int:
        """The smallest of what the ranks give; waits for all."""
        low = mx.array([value >> 20], mx.int32)  # MiB: MLX sums integers of 32 bits over ranks
        return cast(int, mx.distributed.all_min(low, group=self.group).item()) << 20


def ranks_of(module: Any) -> Ranks | None:
    """The ranks that hold a loaded model together; None where it is whole in this process."""
    ranks: Ranks | None = getattr(module, "ranks", None)
    return ranks
