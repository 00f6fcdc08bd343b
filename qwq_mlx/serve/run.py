"""One watched run: its steps so far, how it ended, and what it needs to go on.

Does not: take a job's events, or reach the disk (`runs` does).
"""

from __future__ import annotations

import asyncio
import copy
import secrets
import time
from collections.abc import Mapping
from typing import Any

from qwq_mlx.serve.history import KeptRun
from qwq_mlx.serve.jobs import Ended, Failed, Job
from qwq_mlx.serve.model_card import ModelCard
from qwq_mlx.serve.run_state import SavedRun, request_json

__all__ = ["Run"]

_CUT = ("length", "context_full", "interrupted")


class Run:
    """A run, under way or over.

    info: what does not change of what clients read: question, seed, parent, group and so on.
    request: what it starts from (`run_state.request_json`).
    progress: from where it can go on (`run_state.progress_json`); None where it had not begun.
    model: which one writes it.
    job: that writes it; None for one of an earlier process.
    steps: each a line of JSON, which is smaller than what it says.
    n_kept: steps that the history has.
    is_kept: the history has it at all.
    is_kept_whole: the history has its end, too.
    is_removed: nobody wants it any more.
    news: set, and replaced, whenever there are new steps or it is over.
    writing: held while it is written into the history.
    """

    def __init__(self, info: Mapping[str, Any], request: Mapping[str, Any], *, model: str) -> None:
        self.info, self.request, self.model = dict(info), request, model
        self.id = str(info["id"])
        self.progress: Mapping[str, Any] | None = None
        self.job: Job | None = None
        self.steps: list[bytes] = []
        self.n_kept = 0
        self.is_kept = self.is_kept_whole = self.is_removed = False
        self.summary: dict[str, Any] | None = None
        self.error: str | None = None
        self.is_stopped = self.is_interrupted = False
        self.news = asyncio.Event()
        self.writing = asyncio.Lock()

    @classmethod
    def of_job(
        cls,
        job: Job,
        *,
        card: ModelCard,
        question: str,
        parent: tuple[str, int] | None = None,
        group: str = "",
        run_id: str | None = None,
    ) -> Run:
        """One that a job writes.

        parent: the run that it was forked from, and the tokens that it shares. group: of a vote, its id. run_id: None
        makes a new one.
        """
        [request] = job.requests
        info = {
            "id": run_id or f"run-{secrets.token_hex(8)}",
            "created": time.time(),
            "question": question,
            "seed": request.sampling.seed,
            "parent": None if parent is None else {"id": parent[0], "at": parent[1]},
            "group": group or None,
            "model": card.name,
            "prompt_tokens": job.n_prompt,
            "think_tokens": job.ask.thinking.think_tokens,
            "max_tokens": request.limits.max_tokens,
        }
        run = cls(info, request_json(request), model=card.identity)
        run.job = job
        return run

    @classmethod
    def of_history(cls, kept: KeptRun, lines: list[bytes]) -> Run:
        """One that was kept, and that no job writes. Raises KeyError and TypeError for what `kept` never wrote."""
        run = cls(kept.info, kept.request, model=kept.model)
        state = kept.info["state"]
        run.progress, run.steps = kept.progress, lines
        run.summary, run.error = kept.info["summary"], kept.info["error"]
        run.is_stopped = state == "stopped"
        run.is_interrupted = state in ("running", "interrupted")  # running: its end could not be written
        if state != "ended":
            run.cut()
        run.is_kept = run.is_kept_whole = True
        return run

    @property
    def state(self) -> str:
        """ "running", "stopped", "interrupted" (its process ended), "failed" or "ended"."""
        if self.summary is not None:
            return "ended"
        if self.error is not None:
            return "failed"
        if self.is_interrupted:
            return "interrupted"
        return "stopped" if self.is_stopped else "running"  # a job is also cancelled before it tells that it failed

    @property
    def can_resume(self) -> bool:
        """Whether it goes on without being asked for its answer; after a limit it needs a higher one."""
        if self.state == "ended":
            assert self.summary is not None, "it has ended"
            return self.summary["finish_reason"] in _CUT
        return self.state != "running"

    def end(self, event: Ended | Failed) -> None:
        """It came to its end, or cannot go on."""
        if isinstance(event, Ended):
            self.summary, self.progress = event.summary, event.progress
        elif event.error.code == "model_closed":
            self.is_interrupted = True
        else:
            self.error = str(event.error)

    def stop(self) -> None:
        """End it, unless it is over; whoever watches it is told."""
        self.is_stopped = True
        if self.job is not None:
            self.job.cancel()
        self.tell()

    def tell(self) -> None:
        """Wake those who wait for `news`."""
        self.news.set()
        self.news = asyncio.Event()

    def cut(self) -> None:
        """Leave out the steps behind the state from which it can go on; they will be drawn again."""
        n_steps = 0 if self.progress is None else self.progress["n_steps"]
        if len(self.steps) < n_steps:
            raise ValueError(f"there are {len(self.steps)} steps, expected {n_steps}")
        del self.steps[n_steps:]

    def go_on(self, job: Job, *, n_steps: int) -> None:
        """Run again, by a job that begins behind so many steps."""
        del self.steps[n_steps:]
        self.n_kept = 0  # all of it is written again, because the history may have made room meanwhile
        self.job, self.summary, self.error = job, None, None
        self.is_stopped = self.is_interrupted = self.is_kept_whole = False
        self.request = request_json(job.requests[0])
        self.info["max_tokens"] = job.requests[0].limits.max_tokens

    def kept(self, event: Ended | Failed | None = None) -> KeptRun:
        """As the history takes it. event: how it ends, which is not known of the run itself yet."""
        run = copy.copy(self)
        if event is not None:
            run.end(event)
        return KeptRun(info=run.to_json(), model=run.model, request=run.request, progress=run.progress)

    def saved(self) -> SavedRun:
        """As it can be gone on with."""
        return SavedRun(
            id=self.id, model=self.model, request=self.request, progress=self.progress, lines=list(self.steps)
        )

    def to_json(self) -> dict[str, Any]:
        """Without the steps."""
        return {
            **self.info,
            "state": self.state,
            "can_resume": self.can_resume,
            "tokens": len(self.steps),
            "error": self.error,
            "summary": self.summary,
        }
