"""Rows of a tensor, read from its shard by position: a few rows of an embedding, a block of a head, or all of it.

Nothing is mapped and nothing kept, so what is in memory is what the caller holds.

Does not: check headers (`files.header` did) or turn bytes into numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.header import Header, TensorEntry
from qwq_mlx.files.reading import open_to_read

__all__ = ["read_rows"]

_AGAIN = "The folder changed since its headers were read, or the disk fails; let it settle and run again."


def read_rows(shard: Header, entry: TensorEntry, rows: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """The bytes of some rows of a tensor, in the order given; neighbours are read at once.

    rows: of the first axis; None is the whole tensor, in one row. Returns (rows, bytes of a row), uint8.
    Raises SourceError when the shard cannot be read or has ended.
    """
    n_rows = 1 if rows is None else entry.shape[0]
    wanted: Sequence[int] = (0,) if rows is None else rows
    row_bytes = (entry.end - entry.start) // n_rows
    out = np.empty((len(wanted), row_bytes), np.uint8)
    try:
        fd = open_to_read(shard.path)
    except OSError as error:
        raise SourceError(f"{shard.path}: cannot be opened any more {system_said(error, _AGAIN)}") from error
    try:
        for place, row, n in _runs(wanted):
            _read(fd, shard, entry, entry.start + row * row_bytes, out[place : place + n].reshape(-1).data)
    finally:
        os.close(fd)
    return out


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place, first row, count) of each run of neighbours."""
    if isinstance(rows, range) and rows.step == 1:
        yield 0, rows.start, len(rows)
        return
    for _, run in groupby(enumerate(rows), key=lambda item: item[1] - item[0]):
        items = list(run)
        yield items[0][0], items[0][1], len(items)


def _read(fd: int, shard: Header, entry: TensorEntry, position: int, view: memoryview) -> None:
    while len(view):
        try:
            data = os.pread(fd, min(len(view), 1 << 26), position)
        except OSError as error:
            raise SourceError(
                f"{shard.path}: tensor {entry.name}: reading at byte {position:,} failed {system_said(error, _AGAIN)}"
            ) from error
        if not data:
            raise SourceError(
                f"{shard.path}: tensor {entry.name}: the file ends at byte {position:,}, it had "
                f"{shard.size_bytes:,} bytes. {_AGAIN}"
            )
        view[: len(data)] = data
        view, position = view[len(data) :], position + len(data)
