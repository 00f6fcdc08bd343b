"""Runs that outlive the request that started them: watched token by token, asked for their answer, forked, voted on.

They live in the HTTP loop alone: a task for each takes a job's events, and whoever watches reads what there is.

Does not: outlive the process, or hold more than `MAX_RUNS` or `MAX_STEPS` (the oldest that have ended go first).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import dumped
from qwq_mlx.serve.jobs import Ask, Ended, Failed, Job, Stepped
from qwq_mlx.serve.worker import Worker

__all__ = ["MAX_RUNS", "MAX_STEPS", "Run", "Runs"]

MAX_RUNS = 64
MAX_STEPS = 100_000
"""Tokens of all runs together that are remembered; with alternatives about 2 kB each."""


class Run:
    """One run: its steps so far, and how it ended.

    parent: the run that it was forked from, and the number of tokens that it shares. group: of a vote, its id.
    """

    def __init__(self, job: Job, *, question: str, parent: tuple[str, int] | None = None, group: str = "") -> None:
        self.id = f"run-{secrets.token_hex(8)}"
        self.job, self.question, self.parent, self.group = job, question, parent, group
        self.created_s = time.time()
        self.steps: list[bytes] = []  # each a line of JSON, which is smaller than what it says
        self.ended: Ended | None = None
        self.error: ApiError | None = None
        self.is_stopped = False
        self.news = asyncio.Condition()

    @property
    def state(self) -> str:
        """ "running", "stopped", "failed" or "ended"."""
        if self.ended is not None:
            return "ended"
        if self.error is not None:
            return "failed"
        return "stopped" if self.is_stopped else "running"  # a job is also cancelled before it tells that it failed

    @property
    def seed(self) -> int | None:
        """What its tokens are drawn with."""
        return self.job.requests[0].sampling.seed

    async def stop(self) -> None:
        """End it, unless it is over; whoever watches it is told."""
        self.is_stopped = True
        self.job.cancel()
        async with self.news:
            self.news.notify_all()

    def to_json(self) -> dict[str, Any]:
        """Without the steps."""
        return {
            "id": self.id,
            "state": self.state,
            "created": self.created_s,
            "question": self.question,
            "seed": self.seed,
            "parent": None if self.parent is None else {"id": self.parent[0], "at": self.parent[1]},
            "group": self.group or None,
            "prompt_tokens": self.job.n_prompt,
            "tokens": len(self.steps),
            "think_tokens": self.job.ask.thinking.think_tokens,
            "error": None if self.error is None else str(self.error),
            "summary": None if self.ended is None else self.ended.summary,
        }


class Runs:
    """Starts runs, and finds them by id."""

    def __init__(self, worker: Worker, *, heartbeat_s: float) -> None:
        self._worker, self._heartbeat_s = worker, heartbeat_s
        self._runs: dict[str, Run] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Any:
        return reversed(list(self._runs.values()))

    def find(self, run_id: str) -> Run:
        """The run of that id. Raises ApiError."""
        if run_id not in self._runs:
            raise ApiError(404, f"There is no run {run_id[:80]!r}.", code="not_found")
        return self._runs[run_id]

    async def start(self, ask: Ask, *, question: str) -> Run:
        """A new run, in the line. Raises ApiError."""
        self._make_room()
        return self._follow(Run(await self._worker.prepare(ask), question=question))

    def fork(self, run: Run, *, at: int, seed: int | None, group: str = "") -> Run:
        """A run that shares the first `at` tokens of another one and draws the rest by itself. Raises ApiError."""
        if not 0 <= at <= len(run.steps):
            raise ApiError(400, f"at is {at}, expected from 0 to {len(run.steps)}, the tokens there are.", param="at")
        self._make_room()
        [request] = run.job.requests
        seed = secrets.randbits(32) if seed is None else seed
        forked = replace(request, sampling=replace(request.sampling, seed=seed))
        job = Job(run.job.ask, [forked], source=(run.job, at))
        other = Run(job, question=run.question, parent=(run.id, at), group=group)
        other.steps = run.steps[:at]
        return self._follow(other)

    async def vote(self, run: Run, *, n: int, at: int) -> list[Run]:
        """Samples that share the first `at` tokens of a run, in one group: all, or none. Raises ApiError."""
        group, samples = f"vote-{secrets.token_hex(8)}", list[Run]()
        try:
            for _ in range(n):
                samples.append(self.fork(run, at=at, seed=None, group=group))
        except ApiError:
            for each in samples:
                await each.stop()
                self.remove(each)
            raise
        return samples

    def remove(self, run: Run) -> None:
        """Forget a run that is over."""
        self._runs.pop(run.id, None)

    async def lines(self, run: Run, start: int) -> AsyncIterator[bytes]:
        """The steps from a place on as lines of JSON, as they come; the run itself is the last line."""
        place = start
        while True:
            new = run.steps[place:]
            if new:
                place += len(new)
                yield b"".join(new)
            elif run.state != "running":
                yield f"{dumped({'run': run.to_json()})}\n".encode()
                return
            else:
                async with run.news:
                    if len(run.steps) > place or run.state != "running":
                        continue
                    try:
                        await asyncio.wait_for(run.news.wait(), self._heartbeat_s)
                        continue
                    except asyncio.TimeoutError:
                        pass
                yield b"\n"

    def _make_room(self) -> None:
        while len(self._runs) >= MAX_RUNS or sum(len(run.steps) for run in self._runs.values()) > MAX_STEPS:
            oldest = next((run for run in self._runs.values() if run.state != "running"), None)
            if oldest is None:
                message = f"{len(self._runs)} runs are under way, and no more are remembered. Stop or delete one."
                raise ApiError(429, message, retry_after_s=10)
            self.remove(oldest)

    def _follow(self, run: Run) -> Run:
        self._worker.submit(run.job)
        self._runs[run.id] = run
        task = asyncio.get_running_loop().create_task(self._take(run))
        self._tasks.add(task)  # the loop alone would let go of it
        task.add_done_callback(self._tasks.discard)
        return run

    async def _take(self, run: Run) -> None:
        """Take a job's events until it is over."""
        while run.state == "running":
            event = await run.job.next_event(self._heartbeat_s)
            if isinstance(event, Stepped):
                del run.steps[event.steps[0]["index"] :]
                run.steps += [f"{dumped(step)}\n".encode() for step in event.steps]
            elif isinstance(event, Ended):
                run.ended = event
            elif isinstance(event, Failed):
                run.error = event.error
            async with run.news:
                run.news.notify_all()
