"""Runs that outlive the request that started them: watched token by token, forked, voted on, resumed, kept in a file.

They live in the HTTP loop alone: a task for each takes a job's events, and whoever watches reads what there is. With a
history they outlive the process as well; it is read and written in a thread of its own.

Does not: hold more than `MAX_RUNS`, `MAX_STEPS` or `MAX_KEPT_STEPS` in memory (the oldest that have ended go first).
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwq_mlx.errors import QwqError
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import dumped
from qwq_mlx.serve.history import History
from qwq_mlx.serve.history_thread import HistoryThread
from qwq_mlx.serve.jobs import Ask, Ended, Failed, Job, Restored, Stepped, in_time
from qwq_mlx.serve.run import Run
from qwq_mlx.serve.run_state import SavedRun
from qwq_mlx.serve.worker import Worker

__all__ = ["MAX_KEPT_STEPS", "MAX_RUNS", "MAX_STEPS", "Runs"]

MAX_RUNS = 64
MAX_STEPS = 100_000
"""Tokens of all runs together that are remembered; with alternatives about 4 kB each."""
MAX_KEPT_STEPS = 10_000
"""Those of them that have ended and that the history has, too: it gives them back when they are asked for."""

_LINES_AT_ONCE = 500  # about 1 MB, which is all that waits in memory for a reader who takes nothing
_LOOK_S = 0.05  # between two looks at whether the last run is over
_MAX_ID_CHARS = 64  # a file's name has at most 255


class Runs:
    """Starts runs, and finds them by id.

    history: where they are kept; None keeps none.
    folder: of files that `save` wrote; None has none.
    warn: takes a line when the history cannot be written, which ends no run, of an internal error, which does, and of
      what becomes at the end of a run that the history does not keep.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        heartbeat_s: float,
        history: History | None = None,
        folder: Path | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._worker, self._heartbeat_s, self._folder, self._warn = worker, heartbeat_s, folder, warn
        self._history = None if history is None else HistoryThread(history, warn=warn)
        self._runs: dict[str, Run] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Any:
        return reversed(list(self._runs.values()))

    async def drain(self, left_s: Callable[[], float]) -> None:
        """Let runs go on until they end or their time is over. What the history does not keep then is saved in the
        folder, or told to be lost.

        left_s: seconds that are left; -inf ends at once, also while the model's thread is to save.
        """
        while running := [run for run in self if run.state == "running"]:
            if left_s() <= 0:
                for run in reversed(running):
                    if not run.is_kept:
                        self._warn(await self._left_behind(run, left_s))
                return
            await asyncio.sleep(_LOOK_S)

    async def _left_behind(self, run: Run, left_s: Callable[[], float]) -> str:
        """What becomes of a run that goes on when the process ends, and that only its memory has."""
        path, reason = self.path_of(run.id), "no `runs_folder`"
        if path is not None and run.job is not None:
            saving = asyncio.ensure_future(self._worker.save(run.job, path))
            while not saving.done() and left_s() > -math.inf:
                await asyncio.wait([saving], timeout=_LOOK_S)
            try:
                if saving.done():
                    saving.result()
                    return (
                        f"{run.id} is saved after {len(run.steps)} tokens; `generate --resume {path}` goes on with it"
                    )
                saving.cancel()
                reason = "the end came before it was saved"
            except (ApiError, QwqError, RuntimeError, MemoryError) as error:
                reason = str(error)
        return f"warning: {run.id} is lost after {len(run.steps)} tokens: it is in no history, and {reason}"

    def close(self) -> None:
        """Write what is still to be written; from then on nothing is kept."""
        if self._history is not None:
            self._history.close()

    async def infos(self, *, limit: int, offset: int = 0, parent: str | None = None) -> list[dict[str, Any]]:
        """What clients read of the runs, the newest first. parent: of those that were forked from that run alone."""
        of_memory = [run for run in self if parent is None or (run.info["parent"] or {}).get("id") == parent]
        if self._history is None:
            return [run.to_json() for run in of_memory][offset : offset + limit]
        infos = await self._history.infos(limit=limit, offset=offset, parent=parent)
        unkept = [run.to_json() for run in of_memory if not run.is_kept and not offset]
        return [*unkept, *(self._runs[info["id"]].to_json() if info["id"] in self._runs else info for info in infos)]

    async def find(self, run_id: str) -> Run:
        """The run of that id. Raises ApiError."""
        if run_id in self._runs:
            return self._runs[run_id]
        run = None if self._history is None else await self._history.find(run_id)
        if run is None:
            raise _missing(run_id)
        self._evict()
        return self._runs.setdefault(run_id, run)

    async def start(self, ask: Ask, *, question: str) -> Run:
        """A new run, in the line. Raises ApiError."""
        self._make_room()
        job = await self._worker.prepare(ask)
        self._worker.submit(job)
        return await self._follow(Run.of_job(job, card=self._worker.card, question=question), job)

    async def fork(self, run: Run, *, at: int, seed: int | None, group: str = "") -> Run:
        """A run that shares the first `at` tokens of another one and draws the rest by itself. Raises ApiError."""
        if not 0 <= at <= len(run.steps):
            raise ApiError(400, f"at is {at}, expected from 0 to {len(run.steps)}, the tokens there are.", param="at")
        self._make_room()
        seed = secrets.randbits(32) if seed is None else seed
        if run.job is None:
            job = await self._worker.resume(replace(run.saved(), fork_at=at, seed=seed))
        else:
            [request] = run.job.requests
            forked = replace(request, sampling=replace(request.sampling, seed=seed), forked_at=at)
            job = Job(run.job.ask, [forked], source=(run.job, at))
        card, question = self._worker.card, run.info["question"]
        other = Run.of_job(job, card=card, question=question, parent=(run.id, at), group=group)
        other.steps = run.steps[:at]
        self._worker.submit(job)
        return await self._follow(other, job)

    async def vote(self, run: Run, *, n: int, at: int) -> list[Run]:
        """Samples that share the first `at` tokens of a run, in one group: all, or none. Raises ApiError."""
        group, samples = f"vote-{secrets.token_hex(8)}", list[Run]()
        try:
            for _ in range(n):
                samples.append(await self.fork(run, at=at, seed=None, group=group))
        except ApiError:
            for each in samples:
                await self.remove(each.id)
            raise
        return samples

    async def resume(self, run_id: str, *, max_tokens: int | None, context: int | None, answer_now: bool) -> Run:
        """Let a run go on that is over before its end, or ask it for its answer. Raises ApiError.

        From its file where it was saved and has not gone on since, else from what is known of it.
        """
        path = self.path_of(run_id)
        has_file = path is not None and await asyncio.to_thread(path.is_file)
        run = None
        try:
            run = await self.find(run_id)
        except ApiError:
            if not has_file:
                raise
        if run is not None and run.state == "running":
            raise ApiError(409, "The run goes on already.", code="is_running")
        saved = replace(
            SavedRun(id=run_id) if run is None else run.saved(),
            path=path if has_file else None,
            max_tokens=max_tokens,
            context=context,
            answer_now=answer_now,
        )
        self._make_room()
        job = await self._worker.resume(saved)
        if run is not None and run.is_removed:  # since it was asked, as what follows
            raise _missing(run_id)
        if self._runs.get(run_id, run) is not run or (run is not None and run.state == "running"):
            raise ApiError(409, "The run goes on already.", code="is_running")
        if run is None:
            question = job.requests[0].question
            run = Run.of_job(job, card=self._worker.card, question=question, run_id=run_id)
        assert isinstance(job.source, Restored), "it goes on"
        self._worker.submit(job)  # before the run is touched, which stays as it is where the line is full
        run.go_on(job, n_steps=len(job.source.state.steps))
        return await self._follow(run, job)

    def path_of(self, run_id: str) -> Path | None:
        """Where a run is saved; None where none is."""
        is_id = run_id.removeprefix("run-").isalnum() and run_id.isascii() and len(run_id) <= _MAX_ID_CHARS
        return self._folder / f"{run_id}.qwq" if self._folder is not None and is_id else None

    async def stop(self, run: Run) -> None:
        """End a run, unless it is over."""
        if run.state == "running":
            run.stop()
            await self._keep(run)

    async def remove(self, run_id: str) -> None:
        """End a run and forget it, also one that cannot be read. Raises ApiError, with which it is still there."""
        run, is_kept = self._runs.get(run_id), False
        if run is not None:
            run.is_removed = True
            run.stop()
        try:
            if self._history is not None:
                is_kept = await self._history.remove(run_id)
        except ApiError:
            if run is not None:
                run.is_removed = False
            raise
        if self._runs.pop(run_id, None) is None and not is_kept:
            raise _missing(run_id)

    async def lines(self, run: Run, start: int, *, waits: bool = True) -> AsyncIterator[bytes]:
        """The steps from a place on as lines of JSON, as they come; the run itself is the last line.

        waits: for steps to come; False ends with those there are.
        """
        place = start
        while True:
            new = run.steps[place : place + _LINES_AT_ONCE]
            if new:
                place += len(new)
                yield b"".join(new)
            elif run.state != "running" or not waits:
                yield f"{dumped({'run': run.to_json()})}\n".encode()
                return
            elif await in_time(run.news.wait(), self._heartbeat_s) is None:
                yield b"\n"

    def _evict(self) -> None:
        while len(self._runs) >= MAX_RUNS or sum(len(run.steps) for run in self._runs.values()) > MAX_STEPS:
            oldest = next((run for run in self._runs.values() if run.state != "running"), None)
            if oldest is None:
                break
            del self._runs[oldest.id]
        kept = [run for run in self._runs.values() if run.state != "running" and run.is_kept_whole]
        n_kept = sum(len(run.steps) for run in kept)
        for run in kept:
            if n_kept <= MAX_KEPT_STEPS:
                break
            n_kept -= len(run.steps)
            del self._runs[run.id]

    def _make_room(self) -> None:
        self._evict()
        if len(self._runs) >= MAX_RUNS:
            message = f"{len(self._runs)} runs are under way, and no more are remembered. Stop or delete one."
            raise ApiError(429, message, retry_after_s=10)

    async def _follow(self, run: Run, job: Job) -> Run:
        """Take the events of a job that is in the line."""
        self._runs[run.id] = run
        task = asyncio.get_running_loop().create_task(self._take(run, job))
        self._tasks.add(task)  # the loop alone would let go of it
        task.add_done_callback(lambda task: self._taken(run, job, task))
        await self._keep(run)
        return run

    def _taken(self, run: Run, job: Job, task: asyncio.Task[None]) -> None:
        """Nobody takes the job's events any more; where that is for an error, whoever watches the run is told."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and run.job is job:
            job.cancel()
            run.error = f"Internal error: {type(error).__name__}."
            self._warn(f"{run.id}: internal error: {type(error).__name__}")
            run.tell()

    async def _take(self, run: Run, job: Job) -> None:
        """Take a job's events until it is over."""
        while run.state == "running" and run.job is job:
            event = await job.next_event(self._heartbeat_s)
            if run.job is not job:  # it was stopped meanwhile, and resumed
                return
            if isinstance(event, Stepped):
                n_known = len(run.steps) - event.steps[0]["index"]  # of a run that goes on, which tells all its steps
                run.steps += [f"{dumped(step)}\n".encode() for step in event.steps[n_known:]]
                if event.progress is not None:
                    run.progress = event.progress
                    await self._keep(run)
            elif isinstance(event, (Ended, Failed)):
                await self._keep(run, event)
                if run.job is not job:  # and meanwhile here
                    return
                run.end(event)
            run.tell()

    async def _keep(self, run: Run, event: Ended | Failed | None = None) -> None:
        if self._history is not None:
            await self._history.keep(run, event)


def _missing(run_id: str) -> ApiError:
    return ApiError(404, f"There is no run {run_id[:80]!r}.", code="not_found")
