"""Read, fit and write at the same time: one reading thread, a worker per core, and the caller's thread that writes.

Blocks pass through in order, so tensors become durable in order: a tensor's last block is written, its files are
synced, the journal gets its line, and only then does the next tensor's first byte go to disk. A fixed set of buffers
holds everything back to the pace of the slowest stage.

Does not: decide anything about formats; the plan did.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path

from qwq_mlx.convert.calibration import Importance
from qwq_mlx.convert.journal import Done, Journal
from qwq_mlx.convert.origin import Shards
from qwq_mlx.convert.pack import PackedBlock, pack_block, workers
from qwq_mlx.convert.plan import Plan, n_blocks_in_flight
from qwq_mlx.convert.progress import Progress
from qwq_mlx.convert.read import Block, Buffers, Stopped, read_blocks
from qwq_mlx.convert.write import ShardWriter

__all__ = ["run_pipeline"]


class _Feed:
    """Runs the reader in its own thread and hands out packed blocks in order."""

    def __init__(self, plan: Plan, journal: Journal, buffers: Buffers, shards: Shards, importance: Importance) -> None:
        self._plan = plan
        self._importance = importance
        self._shards = shards
        self._buffers = buffers
        self._done = dict(journal.done)
        self._queue: queue.SimpleQueue[Future[PackedBlock] | BaseException | None] = queue.SimpleQueue()
        self._pending: list[Future[PackedBlock]] = []
        self._thread = threading.Thread(target=self._read, name="qwq-mlx-read", daemon=True)

    def _read(self) -> None:
        pool, fit = workers(self._plan.n_workers), self._plan.fit
        try:
            for block in read_blocks(self._plan, self._done, self._buffers, self._shards):
                shard = self._plan.checkpoint.shards[block.tensor.shard].path
                own = self._importance.get(block.tensor.source.name.removesuffix(".weight"))
                self._queue.put(pool.submit(pack_block, block, fit=fit, shard=shard, importance=own))
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
    progress: Callable[[Progress], None],
    importance: Importance,
) -> None:
    """Convert every tensor that the journal does not have, into the output shards that lie in `folder`.

    shards: the source's; each is let go when its last tensor is durable. importance: empty where nothing is calibrated.
    Raises SourceError and ConversionError from the stages; what the journal has by then stays good.
    """
    total = sum(each.source.end - each.source.start for each in plan.tensors)
    done = resumed = sum(e.source.end - e.source.start for e in plan.tensors if e.source.name in journal.done)
    buffer_bytes = max(each.block_rows * each.row_bytes for each in plan.tensors)
    buffers = Buffers(n_blocks_in_flight(plan.n_workers), buffer_bytes)
    error2 = weight2 = 0.0
    zero_pages = 0
    last_of_shard = {each.shard: each for each in plan.tensors}
    with ShardWriter(plan, folder) as writer, _Feed(plan, journal, buffers, shards, importance) as blocks:
        for packed in blocks:
            block = packed.block
            if block.first_row == 0:
                error2, weight2, zero_pages = 0.0, 0.0, 0
            writer.write(packed)
            error2, weight2 = error2 + packed.error2, weight2 + packed.weight2
            zero_pages += packed.zero_pages
            done += len(block.data)
            if block.is_last:
                journal.append(_done(block, writer.finish(block.tensor), error2, weight2, zero_pages))
                if last_of_shard[block.tensor.shard] is block.tensor:
                    shards.drop(plan.checkpoint.shards[block.tensor.shard].path.name)
            buffers.give_back(block.buffer)
            if progress is not None:
                name = block.tensor.source.name
                progress(
                    Progress(phase="convert", what=name, done_bytes=done, total_bytes=total, resumed_bytes=resumed)
                )


def _done(block: Block, sha256: tuple[str, ...], error2: float, weight2: float, zero_pages: int) -> Done:
    assert block.source_sha256 is not None  # the reader sets it on every last block
    return Done(
        name=block.tensor.source.name,
        sha256=sha256,
        source_sha256=block.source_sha256,
        source_ctime_ns=block.source_ctime_ns,
        error2=error2,
        weight2=weight2,
        zero_pages=zero_pages,
    )
