"""Read, fit and write at the same time: one reading thread, a worker per core, and the caller's thread that writes.

Blocks pass through in order, so tensors become durable in order: a tensor's last block is written, its files are
synced, the journal gets its line, and only then does the next tensor's first byte go to disk. A fixed set of buffers
holds everything back to the pace of the slowest stage.

Does not: decide anything about formats; the plans did.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path

from qwq_mlx.convert.calibration.fitted import FittedMatrices
from qwq_mlx.convert.journal import FinishedTensor, Journal
from qwq_mlx.convert.pack import PackedBlock, pack_block, workers
from qwq_mlx.convert.plan import Plan
from qwq_mlx.convert.plan_memory import n_blocks_in_flight
from qwq_mlx.convert.progress import ConvertProgress
from qwq_mlx.convert.read import Buffers, Stopped, read_blocks
from qwq_mlx.convert.source import Shards
from qwq_mlx.convert.write import ShardWriter
from qwq_mlx.model.blas_threads import one_blas_thread
from qwq_mlx.model.process_memory import release_freed_memory

__all__ = ["run_pipeline"]


class _Feed:
    """Runs the reader in its own thread and hands out packed blocks in order."""

    def __init__(self, plan: Plan, journal: Journal, buffers: Buffers, shards: Shards, fitted: FittedMatrices) -> None:
        self._plan = plan
        self._fitted = fitted
        self._shards = shards
        self._buffers = buffers
        self._finished = dict(journal.finished)  # the writing thread adds to the journal's own
        self._queue: queue.SimpleQueue[Future[PackedBlock] | BaseException | None] = queue.SimpleQueue()
        self._pending: list[Future[PackedBlock]] = []
        self._thread = threading.Thread(target=self._read, name="qwq-mlx-read", daemon=True)

    def _read(self) -> None:
        plan, pool = self._plan, workers(self._plan.n_workers)
        try:
            for block in read_blocks(plan, self._finished, self._buffers, self._shards):
                shard = plan.checkpoint.shards[block.tensor.shard].path
                self._queue.put(pool.submit(pack_block, block, fit=plan.fit, shard=shard, fitted=self._fitted))
            self._queue.put(None)
        except Stopped:
            self._queue.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that writes
            self._queue.put(error)

    def __enter__(self) -> Iterator[PackedBlock]:
        self._thread.start()
        return self._blocks()

    def _blocks(self) -> Iterator[PackedBlock]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            self._pending = [item]
            yield item.result()

    def __exit__(self, *_: object) -> None:
        """Stop reading and let the blocks under way end, so that no thread touches the folder afterwards."""
        self._buffers.stop()
        self._shards.stop()
        self._thread.join()
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, Future) and not item.cancel():
                self._pending.append(item)
        wait(self._pending)


def run_pipeline(
    plan: Plan,
    folder: Path,
    journal: Journal,
    shards: Shards,
    progress: Callable[[ConvertProgress], None],
    fitted: FittedMatrices,
) -> None:
    """Convert every tensor that the journal does not have, into the output shards in `folder`.

    shards: the source's; each is let go when its last tensor is durable. fitted: by the calibration pass.
    Raises SourceError and ConversionError from the stages; what the journal has by then stays good.
    """
    sizes = {each.source.name: each.source.end - each.source.start for each in plan.tensors}
    total = sum(sizes.values())
    done_bytes = resumed = sum(n for name, n in sizes.items() if name in journal.finished)
    release_freed_memory()  # of the checks and the calibration pass
    buffer_bytes = max(each.largest_block[0] for each in plan.tensors)
    buffers = Buffers(n_blocks_in_flight(plan.n_workers), buffer_bytes)
    last_of_shard = {each.shard: each.source.name for each in plan.tensors}
    feed = _Feed(plan, journal, buffers, shards, fitted)
    with one_blas_thread(), ShardWriter(plan, folder) as writer, feed as blocks:
        tally = _Tally(journal, writer)
        for packed in blocks:
            block, name = packed.block, packed.block.tensor.source.name
            tally.add(packed)
            if block.is_last and last_of_shard[block.tensor.shard] == name:
                shards.drop(plan.checkpoint.shards[block.tensor.shard].path.name)
            done_bytes += len(block.data)
            buffers.give_back(block.buffer)
            progress(
                ConvertProgress(
                    phase="convert", what=name, done_bytes=done_bytes, total_bytes=total, resumed_bytes=resumed
                )
            )


class _Tally:
    """Writes blocks and adds up what the tensor under way cost."""

    def __init__(self, journal: Journal, writer: ShardWriter) -> None:
        self._journal, self._writer = journal, writer
        self._error2 = self._weight2 = 0.0
        self._zero_pages = 0

    def add(self, packed: PackedBlock) -> None:
        """Blocks of a tensor come in order; with its last one the tensor is durable, and the journal says so."""
        block = packed.block
        if block.first_row == 0:
            self._error2, self._weight2, self._zero_pages = 0.0, 0.0, 0
        self._writer.write(packed)
        self._error2, self._weight2 = self._error2 + packed.error2, self._weight2 + packed.weight2
        self._zero_pages += packed.zero_pages
        if not block.is_last:
            return
        assert block.source_sha256 is not None  # the reader sets it on every last block
        self._journal.append(
            FinishedTensor(
                name=block.tensor.source.name,
                sha256=self._writer.finish(block.tensor),
                source_sha256=block.source_sha256,
                source_ctime_ns=block.source_ctime_ns,
                error2=self._error2,
                weight2=self._weight2,
                zero_pages=self._zero_pages,
            )
        )
