"""Output shards, each tensor's bytes at the place that the plan gave it, durable before the journal says so.

The files have their full size and their headers from the start, so a full disk shows early and a resumed run continues
in the same files. Blocks arrive in order; the digest of each output tensor grows with them. A large tensor is synced
piece by piece beside the work, so that little is left to wait for at its end.

Does not: publish anything; the files lie in the partial folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qwq_mlx.convert.pack import PackedBlock
from qwq_mlx.convert.plan import OutputShard, Plan, PlannedTensor
from qwq_mlx.errors import ConversionError, DiskFullError, system_said
from qwq_mlx.files.atomic import fsync_file, fsync_folder

__all__ = ["ShardWriter", "create_shards", "disk_fault"]

_SYNC_BYTES = (
    32 << 20
)  # written before a sync begins: seldom enough to cost nothing, a third of a second of a slow disk


def create_shards(plan: Plan, folder: Path) -> None:
    """Make every output shard with its header and full size; all of it durable when this returns."""
    for shard in plan.shards:
        path = folder / shard.name
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(fd, shard.size_bytes)
                _pwrite(fd, shard.head, 0)
                fsync_file(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise disk_fault(error, path, shard.size_bytes) from error
    fsync_folder(folder)


class ShardWriter:
    """Writes packed blocks into the shards of a partial folder; use as a context manager."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._stack = ExitStack()
        self._fds: list[int] = []
        self._hashes: list[Any] = []
        self._unsynced_bytes = 0
        self._sync: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qwq-mlx-sync")

    def __enter__(self) -> ShardWriter:
        try:
            for shard in self._plan.shards:
                fd = self._open(shard)
                self._stack.callback(os.close, fd)
                self._fds.append(fd)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()  # before a file that it syncs is closed
        self._stack.close()

    def _open(self, shard: OutputShard) -> int:
        path = self._folder / shard.name
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConversionError(
                f"{path}: the unfinished conversion cannot go on without it "
                f"{system_said(error, 'Begin again with `restart=True`.')}"
            ) from error
        if (size := os.fstat(fd).st_size) != shard.size_bytes:
            os.close(fd)
            raise ConversionError(
                f"{path}: has {size:,} bytes, expected {shard.size_bytes:,} in the unfinished conversion. "
                "Begin again with `restart=True`."
            )
        return fd

    def write(self, packed: PackedBlock) -> None:
        """Write one block's outputs. Blocks of a tensor come in order of their rows."""
        block, tensor = packed.block, packed.block.tensor
        if block.first_row == 0:
            self._hashes = [hashlib.sha256() for _ in tensor.outputs]
        for output, data, sha256 in zip(tensor.outputs, packed.outputs, self._hashes, strict=True):
            entry = output.entry
            row_bytes = (entry.end - entry.start) // tensor.n_rows
            try:
                _pwrite(self._fds[output.shard], data.data, entry.start + block.first_row * row_bytes)
            except OSError as error:
                raise self._fault(error, tensor) from error
            sha256.update(data.data)
            self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= _SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._end_sync(tensor)
            self._sync = self._thread.submit(fsync_file, self._fds[tensor.outputs[0].shard])
            self._unsynced_bytes = 0

    def _end_sync(self, tensor: PlannedTensor) -> None:
        """Wait for the sync under way; what it met is not told a second time by a later one, so it is raised here."""
        try:
            if self._sync is not None:
                self._sync.result()
        except OSError as error:
            raise self._fault(error, tensor) from error
        self._sync = None

    def finish(self, tensor: PlannedTensor) -> tuple[str, ...]:
        """Make the tensor's bytes, all in one shard, durable; returns the sha256 of each output."""
        self._end_sync(tensor)
        self._unsynced_bytes = 0
        try:
            fsync_file(self._fds[tensor.outputs[0].shard])
        except OSError as error:
            raise self._fault(error, tensor) from error
        return tuple(sha256.hexdigest() for sha256 in self._hashes)

    def _fault(self, error: OSError, tensor: PlannedTensor) -> ConversionError:
        n_bytes = sum(output.entry.end - output.entry.start for output in tensor.outputs)
        return disk_fault(error, self._folder / self._plan.shards[tensor.outputs[0].shard].name, n_bytes)


def disk_fault(error: OSError, path: Path, n_bytes: int) -> ConversionError:
    """An error of the disk while writing, as a message that says what is needed and what is kept."""
    if DiskFullError.is_meant_by(error):
        free = shutil.disk_usage(path.parent if path.parent.exists() else "/").free
        return DiskFullError(
            f"{path}: {DiskFullError.reason(error)}: writing {n_bytes:,} bytes failed, {free:,} are free. "
            "Free some space and run the same command again; finished tensors are kept."
        )
    return ConversionError(
        f"{path}: writing failed {system_said(error, 'Check the disk and run the same command again.')} "
        "Finished tensors are kept."
    )


def _pwrite(fd: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while len(view):
        n = os.pwrite(fd, view, position)
        view, position = view[n:], position + n
