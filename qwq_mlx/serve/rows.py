"""The rows of the model's thread: jobs become streams of a `Scheduler`, and every step's text becomes events.

Does not: wait, or know why a job was cancelled.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import mlx.core as mx

from qwq_mlx.engine.kv_cache import take_layers
from qwq_mlx.engine.ranks.whole_cache import cache_of_whole
from qwq_mlx.errors import DamagedModelError, FitError, OptionError, QwqError, SourceError
from qwq_mlx.generate.batch import plan_rows, question_seed, shared_bytes
from qwq_mlx.generate.checkpoint.resume import read_saved
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.request import Request, resolved
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.shared_prefix import MIN_SHARED
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.choice import Choice
from qwq_mlx.serve.jobs import Failed, Job, Restored, Usage
from qwq_mlx.serve.metrics import Counters, Memory
from qwq_mlx.serve.prefix_cache import PrefixCache

__all__ = ["Rows"]


class Rows:
    """`with rows: start(job); step()`. One that failed may be entered again.

    width: at most.
    n_prefixes: caches of ended requests that are kept for later ones, in `prefixes`.
    counters: what ended is counted there.
    n_failed: steps in a row in which a stream failed and none wrote a token.
    """

    def __init__(
        self, reasoner: Reasoner, *, width: int, n_prefixes: int, planned_bytes: int, counters: Counters
    ) -> None:
        self._reasoner, self._width, self._planned_bytes = reasoner, width, planned_bytes
        self._choices: list[Choice] = []
        self._to_fork: list[tuple[Job, int, Stream]] = []  # of which the prompt is shared
        self.prefixes = PrefixCache(n_prefixes)
        self.n_failed = 0
        self.counters = counters
        self._scheduler: Scheduler | None = None
        self._n_planned = self._busy_bytes = 0  # of so many rows

    def __enter__(self) -> Rows:
        self._scheduler = Scheduler(
            self._reasoner.model,
            width=self._width,
            planned_bytes=self._planned_bytes,
            releases=False,
            drafts=self._reasoner.drafts,
        )
        self._scheduler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._scheduler is not None, "it was entered"
        self._scheduler.__exit__(kind, error, trace)

    @property
    def n_busy(self) -> int:
        """Rows that are taken, or will be by choices of a job that has begun."""
        return len(self._choices) + len(self._to_fork)

    def memory(self) -> Memory:
        """What is used now, and what is planned for the rows that are taken, one at least, and the caches that are
        kept."""
        if self._n_planned != self.n_busy:
            requests = self._running()
            plan = plan_rows(requests, len(requests), limit_bytes=None) if requests else None
            self._n_planned = self.n_busy
            self._busy_bytes = 0 if plan is None else plan.peak_bytes - self._shared_bytes(requests)
        planned = max(self._busy_bytes, self._planned_bytes) + self.prefixes.n_bytes
        return Memory(used=mx.get_active_memory(), planned=planned, limit=self._reasoner.limit_bytes)

    def _running(self) -> list[Request]:
        return [choice.stream.request for choice in self._choices] + [each[2].request for each in self._to_fork]

    def has_room(self, job: Job) -> bool:
        """Whether all its choices can run now beside what runs already, in rows and in memory."""
        if self.n_busy + job.n_choices > self._width:
            return False
        return self.fits([*self._running(), *_requests_of(job)], fork=job)

    def fits(self, requests: list[Request], *, fork: Job | None = None) -> bool:
        """Whether the memory holds these side by side; the oldest caches that are kept make room for them.

        fork: the job of the last of them, which may share positions with runs that there are.
        """
        while not self._fits(requests, fork):
            if not len(self.prefixes):
                return False
            self.prefixes.drop_oldest()
        return True

    def _fits(self, requests: list[Request], fork: Job | None) -> bool:
        limit, n_shared, saved = self._reasoner.limit_bytes, 0, self._shared_bytes(requests)
        if fork is not None and (n_rows := self._n_sharing(fork)):
            n_begun, request = _n_begun(fork), requests[-1]
            if n_rows == len(requests) - 1:  # one vote, as `Voting` plans it
                n_shared, saved = n_begun, 0
            else:
                saved += shared_bytes(request, n_rows=n_rows + 1, n_shared=n_begun)
                saved -= shared_bytes(request, n_rows=n_rows, n_shared=n_begun)
        left = None if limit is None else limit - self.prefixes.n_bytes + saved
        try:
            return plan_rows(requests, len(requests), limit_bytes=left, n_shared=n_shared).fits
        except FitError:
            return False

    def _n_sharing(self, job: Job) -> int:
        """Rows that hold the arrays to which a fork of a run will refer: forks of it before, and the run itself."""
        if not isinstance(job.source, tuple) or not job.source[0].streams:
            return 0
        source, n_begun = job.source[0].streams[0], _n_begun(job)
        lender = source.running.row.cache[0] if source.running.row.cache else None
        if lender is None or n_begun < MIN_SHARED:
            return 0
        streams = [choice.stream for choice in self._choices]
        lent = lender.lent(n_begun)
        if lent is None:
            return 1 if source in streams and lender.would_refer(n_begun) else 0
        caches = [stream.running.row.cache for stream in streams]
        return sum(bool(cache) and cache[0].prefix is lent for cache in caches)

    def _shared_bytes(self, requests: list[Request]) -> int:
        """What these hold less than planned: choices of one prompt, and rows that began as forks of one run.

        requests: one that is there several times is of several choices.
        """
        total = 0
        for request in {id(each): each for each in requests}.values():
            n_rows = sum(each is request for each in requests)
            total += shared_bytes(request, n_rows=n_rows, n_shared=len(request.prompt_ids) - 1)
        forks: dict[int, list[Choice]] = {}
        for choice in self._choices:
            cache = choice.stream.running.row.cache
            if cache and cache[0].prefix is not None:
                forks.setdefault(id(cache[0].prefix), []).append(choice)
        for rows in forks.values():
            stream = rows[0].stream
            n_shared = stream.running.row.cache[0].n_shared
            total += shared_bytes(stream.request, n_rows=len(rows), n_shared=n_shared)
        return total

    def start(self, job: Job) -> None:
        """Let a job begin: its prompts are fed with the next steps, and its further choices share them.

        One that can never run is told so.
        """
        assert self._scheduler is not None, "it was entered"
        self._scheduler.stop_all()  # a Ctrl-C at another process while nothing ran is none of this job's
        if not self.fits(_requests_of(job)):
            self._fail(job, _too_large(job))
            return
        for place, request in enumerate(job.requests):
            try:
                stream = self._new_stream(job, request)
            except (QwqError, RuntimeError, MemoryError) as error:
                self._fail(job, error)
                return
            job.streams.append(stream)
            self._scheduler.add(stream)
            self._choices.append(Choice(job, place * job.ask.n, stream))
            self._to_fork += [(job, place * job.ask.n + i, stream) for i in range(1, job.ask.n)]

    def _new_stream(self, job: Job, request: Request) -> Stream:
        if job.source is None:
            return Stream(request, before=self.prefixes.take(request))
        if isinstance(job.source, Restored):
            return self._restored(request, job.source)
        source, at = job.source
        if not source.streams:
            raise OptionError("The run to fork has not begun.")
        return source.streams[0].fork(at=at, seed=resolved(request.sampling.seed))

    def _restored(self, request: Request, source: Restored) -> Stream:
        """The stream of a run that goes on, its cache from its file, else to be worked out again from the ids."""
        model, state = request.model, source.state
        if source.path is None:
            stream = Stream(request, before=self.prefixes.take(request))
            stream.restore(state, None, answer_now=source.answer_now)
            return stream
        _, arrays = read_saved(source.path, model, has_processors=False, answer_now=source.answer_now)
        stream = Stream(request)
        layers, kv_bits = take_layers(arrays, state.capacities), request.plan.workload.kv_bits
        stream.restore(state, cache_of_whole(model, layers, kv_bits), arrays, answer_now=source.answer_now)
        return stream

    def save(self, job: Job, path: Path) -> None:
        """Write a job's first run where it stands. Raises ApiError where it has not begun; SavingError."""
        if not job.streams or not job.streams[0].run.steps:
            raise ApiError(409, "The run has not begun, so there is nothing to save.")
        job.streams[0].save(path)

    def step(self) -> None:
        """One step of the scheduler, its events sent. Raises DamagedModelError."""
        assert self._scheduler is not None, "it was entered"
        for choice in self._choices:
            if choice.job.is_cancelled:
                choice.stream.stop()
            elif choice.job.wants_answer:
                choice.job.wants_answer = False
                choice.stream.answer_now()
        ended = self._scheduler.step()
        self._scheduler.stop_all()
        self._fork()
        has_written = False
        for choice in [each for each in self._choices if not each.job.is_cancelled]:
            has_written |= choice.forward()
        if has_written:
            self.n_failed = 0
        for choice in [each for each in self._choices if each.stream in ended]:
            self._choices.remove(choice)
            self.prefixes.keep(choice.stream)
            failure = choice.stream.failure
            if failure is not None:
                self.n_failed += 1
                self.counters.failed += 1
                self._fail(choice.job, failure)
            elif choice.job.is_cancelled:
                self.counters.left += 1
            else:
                self._count(choice.end())

    def _count(self, usage: Usage) -> None:
        self.counters.ended += 1
        self.counters.prompt_tokens += usage.n_prompt
        self.counters.cached_tokens += usage.n_cached
        self.counters.output_tokens += usage.n_output
        self.counters.reasoning_tokens += usage.n_reasoning

    def fail_all(self, error: Exception) -> None:
        """End every job by what the scheduler raised, and forget its streams."""
        for job in {id(each.job): each.job for each in self._choices}.values():
            self._fail(job, error)
        for choice in self._choices:
            choice.stream.release_cache()
        self._choices.clear()
        self._to_fork.clear()
        while len(self.prefixes):  # they may be what takes the memory
            self.prefixes.drop_oldest()
        self.n_failed += 1

    def _fork(self) -> None:
        """Let the further choices of a prompt begin once it is in a cache."""
        assert self._scheduler is not None, "it was entered"
        waiting, self._to_fork = self._to_fork, []
        for job, index, first in waiting:
            if job.is_cancelled or first.failure is not None:
                continue
            if not first.running.row.ids:
                self._to_fork.append((job, index, first))
                continue
            seed = question_seed(resolved(first.request.sampling.seed), index % job.ask.n)
            stream = first.fork(at=0, seed=seed)
            self._scheduler.add(stream)
            self._choices.append(Choice(job, index, stream))

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.is_cancelled:
            job.emit(Failed(error=_told(error)))
            job.cancel()


def _told(error: Exception) -> ApiError:
    """What a client may read of a failure: the sentence, not a traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OptionError):
        return ApiError(400, str(error))
    if isinstance(error, SourceError):  # of a saved run
        return ApiError(409, str(error), code="not_resumable")
    code = "model_damaged" if isinstance(error, DamagedModelError) else "generation_failed"
    return ApiError(500, f"The request failed: {error}", code=code)


def _requests_of(job: Job) -> list[Request]:
    """One for each choice."""
    return [request for request in job.requests for _ in range(job.ask.n)]


def _n_begun(job: Job) -> int:
    """Positions that a fork of a run takes over from it."""
    assert isinstance(job.source, tuple), "it is a fork"
    return len(job.requests[0].prompt_ids) + job.source[1] - 1


def _too_large(job: Job) -> ApiError:
    most = max(min(each.context, len(each.prompt_ids) + each.max_tokens) for each in job.requests)
    return ApiError(
        400,
        f"{job.n_choices:,} choices of up to {most:,} positions do not fit the memory side by side. One needs:\n"
        f"{job.requests[0].plan.arithmetic()}\nAsk for fewer choices or tokens.",
        param="n",
        code="context_length_exceeded",
    )
