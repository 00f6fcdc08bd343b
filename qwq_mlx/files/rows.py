"""Rows of a tensor, read from its shard by position: a few rows of an embedding, a block of a head, or all of it; or
some columns of all rows.

Nothing is mapped and nothing kept, so what is in memory is what the caller holds.

Does not: check headers (`files.header` did) or turn bytes into numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.errors import SourceError, system_said
from qwq_mlx.files.header import Header, TensorEntry
from qwq_mlx.files.reading import open_to_read

__all__ = ["read_columns", "read_rows"]

_PAGE_BYTES = 4 << 10  # a file system reads no less, so fewer bytes between two pieces are read with them
_BLOCK_BYTES = 64 << 20
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
    with _opened(shard) as fd:
        for place, row, n in _runs(wanted):
            _read(fd, shard, entry, entry.start + row * row_bytes, out[place : place + n].reshape(-1).data)
    return out


def read_columns(shard: Header, entry: TensorEntry, columns: range) -> NDArray[np.uint8]:
    """Some neighbouring bytes of every row of a tensor, (rows, len(columns)) uint8. columns: which bytes of a row.

    Rows with less than 4 KiB of others are read whole, 64 MiB at a time. Raises SourceError as `read_rows` does.
    """
    row_bytes = (entry.end - entry.start) // entry.shape[0]
    out = np.empty((entry.shape[0], len(columns)), np.uint8)
    with _opened(shard) as fd:
        if row_bytes - len(columns) >= _PAGE_BYTES:
            for row, piece in enumerate(out):
                _read(fd, shard, entry, entry.start + row * row_bytes + columns.start, piece.data)
            return out
        n_block = max(1, _BLOCK_BYTES // row_bytes)
        for row in range(0, len(out), n_block):
            block = np.empty((min(n_block, len(out) - row), row_bytes), np.uint8)
            _read(fd, shard, entry, entry.start + row * row_bytes, block.reshape(-1).data)
            out[row : row + n_block] = block[:, columns.start : columns.stop]
    return out


@contextmanager
def _opened(shard: Header) -> Iterator[int]:
    try:
        fd = open_to_read(shard.path)
    except OSError as error:
        raise SourceError(f"{shard.path}: cannot be opened any more {system_said(error, _AGAIN)}") from error
    try:
        yield fd
    finally:
        os.close(fd)


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
