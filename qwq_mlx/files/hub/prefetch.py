"""The shards of a repository one after another: while one is converted the next is fetched, and done ones are dropped.

At most two shards are on the disk at any time, so 65.5 GB pass through 8 GB. A shard is handed over only when its
sha256 is proven and its header is the one that the plan was made from.

Does not: decide the order, or delete what it did not fetch into its place.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qwq_mlx.errors import SourceError
from qwq_mlx.files.digest import ByteProgress
from qwq_mlx.files.header import Header, read_header
from qwq_mlx.files.hub.repository import Hub, Snapshot

__all__ = ["N_ON_DISK", "ShardsAhead"]

N_ON_DISK = 2
"""Shards of a repository that are there at a time, unless they are kept."""

_JOIN_S = 1.0


class _Stopped(Exception):  # noqa: N818 - not an error: ends the thread's fetch
    pass


class ShardsAhead:
    """`with ShardsAhead(hub, snapshot, headers) as shards:` then wait(name) and drop(name) for each, in the same order.

    headers: of the shards still wanted, as `Hub.open_checkpoint` gives them; each goes to its header's path.
    keep: leave the shards on the disk. progress: called from the fetching thread, see `Fetcher.fetch_file`.
    Leaving the block stops a fetch within a second; its part stays for the next run.
    """

    def __init__(
        self,
        hub: Hub,
        snapshot: Snapshot,
        headers: Sequence[Header],
        *,
        keep: bool = False,
        progress: ByteProgress | None = None,
    ) -> None:
        self._hub, self._snapshot, self._keep, self._progress = hub, snapshot, keep, progress
        self._headers = {header.path.name: header for header in headers}
        self._changed = threading.Condition()
        self._ready: set[str] = set()
        self._n_free = len(self._headers) if keep else N_ON_DISK
        self._error: BaseException | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="fetch shards", daemon=True)

    def __enter__(self) -> ShardsAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join(_JOIN_S)  # longer only while a server is silent; the thread ends with the process then

    def stop(self) -> None:
        """Fetch no further; a `wait` under way raises SourceError."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def wait(self, name: str) -> Path:
        """Block until a shard is there, proven; its path.

        Raises SourceError when it cannot be fetched, has another header than planned, or fetching was stopped; and
        what else ended the fetch, an OSError of the disk for example.
        """
        with self._changed:
            self._changed.wait_for(lambda: name in self._ready or self._error is not None or self._is_stopped)
            if name in self._ready:
                return self._headers[name].path
            if self._error is not None:
                raise self._error
        raise SourceError(f"{name}: fetching was stopped. Run the same command again to go on.")

    def drop(self, name: str) -> None:
        """A shard is done: delete it, unless it is to be kept, and let the next one be fetched."""
        with self._changed:
            self._ready.discard(name)
            if not self._keep:
                self._headers[name].path.unlink(missing_ok=True)
                self._n_free += 1
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for name, header in self._headers.items():
                with self._changed:
                    self._changed.wait_for(lambda: self._n_free > 0 or self._is_stopped)
                    self._n_free -= 1
                self._report(0)
                self._hub.fetch_shard(self._snapshot, name, to=header.path, progress=self._report)
                if read_header(header.path) != header:
                    raise SourceError(
                        f"{header.path}: its header is not the one that was read before the fetch, though the digest "
                        "is right. The server gives out different bytes for one file; try another network or a mirror."
                    )
                with self._changed:
                    self._ready.add(name)
                    self._changed.notify_all()
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in `wait`, where the work is
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _report(self, n_bytes: int) -> None:
        if self._is_stopped:
            raise _Stopped
        if self._progress is not None and n_bytes:
            self._progress(n_bytes)
