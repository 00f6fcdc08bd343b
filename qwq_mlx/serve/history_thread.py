"""The history as the event loop asks it: in a thread of its own, and with errors that a client may read.

Does not: know which runs are in memory (`runs` does).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from qwq_mlx.errors import SourceError
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.history import History
from qwq_mlx.serve.jobs import Ended, Failed
from qwq_mlx.serve.run import Run

__all__ = ["HistoryThread"]

_T = TypeVar("_T")


class HistoryThread:
    """A history that is closed by `close`.

    warn: takes a line when it cannot be written, which ends no run.
    """

    def __init__(self, history: History, *, warn: Callable[[str], None]) -> None:
        self._history, self._warn = history, warn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qwq-mlx-history")
        self._is_failing = False

    def close(self) -> None:
        """Write what is still to be written; from then on nothing is kept."""
        self._thread.shutdown()
        self._history.close()

    async def infos(self, *, limit: int, offset: int, parent: str | None) -> list[dict[str, Any]]:
        """As `History.infos`, of runs that no job writes. Raises ApiError."""
        infos = await self._ask(lambda history: history.infos(limit=limit, offset=offset, parent=parent))
        for info in infos:
            if info["state"] in ("running", "interrupted"):  # as `Run.of_history`
                info.update(state="interrupted", can_resume=True)
        return infos

    async def find(self, run_id: str) -> Run | None:
        """The run as it was kept; None where it is not. Raises ApiError."""
        kept = await self._ask(lambda history: history.find(run_id))
        try:
            return None if kept is None else Run.of_history(*kept)
        except (KeyError, TypeError, ValueError) as error:
            raise _failed(f"The entry of {run_id} is damaged ({error}). Delete it.") from error

    async def remove(self, run_id: str) -> bool:
        """Delete a run. Returns whether it was there. Raises ApiError."""
        return await self._ask(lambda history: history.remove(run_id))

    async def keep(self, run: Run, event: Ended | Failed | None = None) -> None:
        """Write a run as it is. event: how it ends, of which nobody is told before it is written."""
        async with run.writing:  # so that each knows what those before it have written
            if not run.is_removed:
                await self._write(run, event)

    async def _write(self, run: Run, event: Ended | Failed | None) -> None:
        kept = run.kept(event)
        start = run.n_kept if event is None else 0  # at the end all steps in one piece
        lines = run.steps[start:]
        n_steps = len(run.steps)
        try:
            await self._in_thread(lambda history: history.write(kept, start=start, lines=lines))
        except sqlite3.Error as error:
            if not self._is_failing:
                self._warn(f"warning: history: runs are not kept ({error}). Make room, or give another `history`.")
            self._is_failing = True
        else:
            run.n_kept = n_steps
            run.is_kept, run.is_kept_whole, self._is_failing = True, event is not None, False

    async def _ask(self, question: Callable[[History], _T]) -> _T:
        try:
            return await self._in_thread(question)
        except (sqlite3.Error, SourceError) as error:
            raise _failed(str(error)) from error

    async def _in_thread(self, work: Callable[[History], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._history)


def _failed(reason: str) -> ApiError:
    return ApiError(500, f"The history failed: {reason}", code="history_failed")
