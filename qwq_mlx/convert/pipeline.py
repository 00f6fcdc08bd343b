"""Read, fit and write at the same time: one reading thread, a worker per core, and the caller's thread that writes.

Blocks pass through in order, so tensors become durable in order: a tensor's last block is written, its files are
synced, the journal gets its line, and only then does the next tensor's first byte go to disk. A fixed set of buffers
holds everything back to the pace of the slowest stage.

Several conversions of one source (targets) go through together: a block is read once and packed for each of them. A
shard is let go when the last of them has it.

Does not: decide anything about formats; the plans did.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qwq_mlx.convert.calibration.importance import Importance
from qwq_mlx.convert.journal import Done, Journal
from qwq_mlx.convert.pack import PackedBlock, pack_block, workers
from qwq_mlx.convert.plan import Plan, n_blocks_in_flight
from qwq_mlx.convert.progress import Progress
from qwq_mlx.convert.read import Buffers, Stopped, read_blocks
from qwq_mlx.convert.source import Shards
from qwq_mlx.convert.write import ShardWriter

__all__ = ["Target", "run_pipeline"]


@dataclass(frozen=True, slots=True)
class Target:
    """One conversion under way. folder: where its output shards lie, whole in size."""

    plan: Plan
    folder: Path
    journal: Journal


class _Feed:
    """Runs the reader in its own thread and hands out packed blocks in order."""

    def __init__(self, targets: Sequence[Target], buffers: Buffers, shards: Shards, importance: Importance) -> None:
        self._plans = [each.plan for each in targets]
        self._importance = importance
        self._shards = shards
        self._buffers = buffers
        self._done = [dict(each.journal.done) for each in targets]
        self._queue: queue.SimpleQueue[Future[PackedBlock] | BaseException | None] = queue.SimpleQueue()
        self._pending: list[Future[PackedBlock]] = []
        self._thread = threading.Thread(target=self._read, name="qwq-mlx-read", daemon=True)

    def _read(self) -> None:
        pool = workers(self._plans[0].n_workers)
        try:
            for block in read_blocks(self._plans, self._done, self._buffers, self._shards):
                plan = self._plans[block.target]
                shard = plan.checkpoint.shards[block.tensor.shard].path
                own = self._importance.get(block.tensor.source.name.removesuffix(".weight"))
                self._queue.put(pool.submit(pack_block, block, fit=plan.fit, shard=shard, importance=own))
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
    targets: Sequence[Target],
    shards: Shards,
    progress: Callable[[Progress], None],
    importance: Importance,
) -> None:
    """Convert every tensor that a target's journal does not have, into the output shards in its folder.

    targets: of one source, with one number of workers. shards: the source's; each is let go when its last tensor is
    durable in every target. importance: empty where nothing is calibrated.
    Raises SourceError and ConversionError from the stages; what the journals have by then stays good.
    """
    plan = targets[0].plan
    sizes = {each.source.name: each.source.end - each.source.start for each in plan.tensors}
    total = sum(sizes.values())
    done = resumed = sum(n for name, n in sizes.items() if all(name in each.journal.done for each in targets))
    buffer_bytes = max(each.block_rows * each.row_bytes for each in plan.tensors)
    buffers = Buffers(n_blocks_in_flight(plan.n_workers), buffer_bytes)
    last_of_shard = {each.shard: each.source.name for each in plan.tensors}
    with ExitStack() as stack:
        tallies = [_Tally(each, stack.enter_context(ShardWriter(each.plan, each.folder))) for each in targets]
        for packed in stack.enter_context(_Feed(targets, buffers, shards, importance)):
            block, name = packed.block, packed.block.tensor.source.name
            tallies[block.target].add(packed)
            if not block.is_last_use:
                continue
            if block.is_last and last_of_shard[block.tensor.shard] == name:
                shards.drop(plan.checkpoint.shards[block.tensor.shard].path.name)
            done += len(block.data)
            buffers.give_back(block.buffer)
            if progress is not None:
                progress(
                    Progress(phase="convert", what=name, done_bytes=done, total_bytes=total, resumed_bytes=resumed)
                )


class _Tally:
    """Writes a target's blocks and adds up what its tensor cost."""

    def __init__(self, target: Target, writer: ShardWriter) -> None:
        self._journal, self._writer = target.journal, writer
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
            Done(
                name=block.tensor.source.name,
                sha256=self._writer.finish(block.tensor),
                source_sha256=block.source_sha256,
                source_ctime_ns=block.source_ctime_ns,
                error2=self._error2,
                weight2=self._weight2,
                zero_pages=self._zero_pages,
            )
        )
