"""Source shards to blocks of rows, each byte read once, in order, by one thread, and hashed on its way.

A block is read with pread into a buffer of a fixed set; the reader waits for a free one, so what is in memory does not
grow with the tensor, the shard or the model. The running sha256 of a shard is noted at the end of every tensor.

Does not: parse anything (headers were checked before), or change a byte.
"""

from __future__ import annotations

import hashlib
import os
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.convert.journal import FinishedTensor
from qwq_mlx.convert.plan import Plan, PlannedTensor
from qwq_mlx.convert.source import Shards
from qwq_mlx.errors import ConversionError, SourceError, system_said
from qwq_mlx.files.header import Header
from qwq_mlx.files.reading import open_to_read

__all__ = ["Block", "Buffers", "Stopped", "open_shard", "read_blocks", "read_into"]

_HASH_BYTES = 1 << 20


class Stopped(Exception):  # noqa: N818 - not an error
    """The reader was told to stop; never leaves this package."""


class Buffers:
    """A fixed number of equal buffers that go round between reader, workers and writer."""

    def __init__(self, n: int, n_bytes: int) -> None:
        self._free: queue.SimpleQueue[NDArray[np.uint8] | None] = queue.SimpleQueue()
        for _ in range(n):
            self._free.put(np.empty(n_bytes, np.uint8))

    def take(self) -> NDArray[np.uint8]:
        """Wait for a free buffer. Raises Stopped after `stop`."""
        buffer = self._free.get()
        if buffer is None:
            self._free.put(None)
            raise Stopped
        return buffer

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        """Free a buffer."""
        self._free.put(buffer)

    def stop(self) -> None:
        """Make the `take` that waits, or the next one, raise Stopped. There is one reader, and it ends by that."""
        while True:
            try:
                self._free.get_nowait()
            except queue.Empty:
                break
        self._free.put(None)


@dataclass(slots=True, kw_only=True)
class Block:
    """Rows of one tensor. data: their bytes, a view of `buffer`.

    source_ctime_ns: see `FinishedTensor`. source_sha256: of the shard up to here, on a tensor's last block.
    """

    tensor: PlannedTensor
    first_row: int
    n_rows: int
    buffer: NDArray[np.uint8]
    data: NDArray[np.uint8]
    source_ctime_ns: int
    source_sha256: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with this block."""
        return self.first_row + self.n_rows == self.tensor.n_rows


def read_blocks(
    plan: Plan, finished: Mapping[str, FinishedTensor], buffers: Buffers, shards: Shards
) -> Iterator[Block]:
    """Every block of every tensor that is not in `finished`, in the source's order.

    A shard that begins with finished tensors is hashed from its start and compared with what the journal noted; one
    that is finished as a whole is left alone while its time of change is the one noted.
    shards: asked for each shard before it is opened.
    Raises SourceError if a shard ends early or changed, ConversionError if it is not the one the journal knows.
    """
    for index, shard in enumerate(plan.checkpoint.shards):
        tensors = [each for each in plan.tensors if each.shard == index]
        if plan.origin.is_remote and all(each.source.name in finished for each in tensors):
            continue  # fetched and proven by its digest then, and deleted since
        shards.wait(shard.path.name)
        yield from _read_shard(shard, tensors, finished, buffers)


def _read_shard(
    shard: Header, tensors: Sequence[PlannedTensor], finished: Mapping[str, FinishedTensor], buffers: Buffers
) -> Iterator[Block]:
    fd = open_shard(shard)
    try:
        ctime_ns = os.fstat(fd).st_ctime_ns
        records = [finished.get(each.source.name) for each in tensors]
        if all(record is not None and record.source_ctime_ns == ctime_ns for record in records):
            return
        sha256 = hashlib.sha256()
        _hash_range(fd, shard, 0, tensors[0].source.start, sha256)
        ends = [*(each.source.start for each in tensors[1:]), shard.size_bytes]  # with the ignored tensors behind each
        for tensor, record, end in zip(tensors, records, ends, strict=True):
            if record is None:
                yield from _read_tensor(fd, shard, tensor, end, ctime_ns, sha256, buffers)
            else:
                _hash_range(fd, shard, tensor.source.start, end, sha256)
                _check_prefix(shard, record, sha256.hexdigest())
    finally:
        os.close(fd)


def _read_tensor(
    fd: int, shard: Header, tensor: PlannedTensor, end: int, ctime_ns: int, sha256: Any, buffers: Buffers
) -> Iterator[Block]:
    """The tensor's blocks; what follows it up to `end` is hashed with its last one."""
    for first in range(0, tensor.n_rows, tensor.block_rows):
        n_rows = min(tensor.block_rows, tensor.n_rows - first)
        buffer = buffers.take()
        data = buffer[: n_rows * tensor.row_bytes]
        read_into(fd, shard, tensor.source.start + first * tensor.row_bytes, data, tensor.source.name)
        sha256.update(data.data)
        is_last = first + n_rows == tensor.n_rows
        if is_last:
            _hash_range(fd, shard, tensor.source.end, end, sha256)
        yield Block(
            tensor=tensor,
            first_row=first,
            n_rows=n_rows,
            buffer=buffer,
            data=data,
            source_ctime_ns=ctime_ns,
            source_sha256=sha256.hexdigest() if is_last else None,
        )


def open_shard(shard: Header) -> int:
    """Open a shard for reading and check that its size is still the one of its header."""
    try:
        fd = open_to_read(shard.path)
    except OSError as error:
        said = system_said(error, "Put it back and run again.")
        raise SourceError(f"{shard.path}: cannot be opened any more {said}") from error
    size = os.fstat(fd).st_size
    if size != shard.size_bytes:
        os.close(fd)
        raise SourceError(
            f"{shard.path}: has {size:,} bytes, had {shard.size_bytes:,} when its header was read. "
            "The source changed during the conversion; let it settle and run again."
        )
    return fd


def read_into(fd: int, shard: Header, position: int, out: NDArray[np.uint8], name: str) -> None:
    """Fill `out` from a position of the shard. name: the tensor, for messages. Raises SourceError."""
    n_read = 0
    view = out.data
    while n_read < len(out):
        try:
            n = _pread(fd, view[n_read:], position + n_read)
        except OSError as error:
            raise SourceError(
                f"{shard.path}: tensor {name}: reading at byte {position + n_read:,} failed ({error.strerror}). "
                "Check the disk or fetch the shard again, then run again; finished tensors are kept."
            ) from error
        if n == 0:
            raise SourceError(
                f"{shard.path}: tensor {name}: the file ends at byte {position + n_read:,}, it had "
                f"{shard.size_bytes:,} bytes before. The source changed during the conversion; fetch the shard again "
                "and run again."
            )
        n_read += n


def _pread(fd: int, view: memoryview, position: int) -> int:
    """Bytes read into `view`; without a copy where the system has preadv (macOS since 11)."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], position)
    data = os.pread(fd, len(view), position)
    view[: len(data)] = data
    return len(data)


def _hash_range(fd: int, shard: Header, start: int, end: int, sha256: Any) -> None:
    buffer = np.empty(_HASH_BYTES, np.uint8)
    for position in range(start, end, _HASH_BYTES):
        part = buffer[: min(_HASH_BYTES, end - position)]
        read_into(fd, shard, position, part, "(finished before)")
        sha256.update(part.data)


def _check_prefix(shard: Header, record: FinishedTensor, sha256: str) -> None:
    if record.source_sha256 != sha256:
        raise ConversionError(
            f"{shard.path}: differs from the shard that the unfinished conversion read: up to the end of "
            f"{record.name} its sha256 is {sha256[:12]}…, it was {record.source_sha256[:12]}…. "
            "Give the same source to finish it, or `restart=True` to throw it away and begin again."
        )
