"""The rows of the model's thread: jobs become streams of a `Scheduler`, and every step's text becomes events.

Does not: wait, or know why a job was cancelled.
"""

from __future__ import annotations

from bisect import bisect_right
from types import TracebackType
from typing import Any

from qwq_mlx.errors import DamagedModelError, QwqError
from qwq_mlx.generate.batch import plan_rows, question_seed
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.request import Request, resolved
from qwq_mlx.generate.scheduler import Scheduler
from qwq_mlx.generate.stream import Stream
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.jobs import Delta, Ended, Failed, Job, LogprobEntry, Usage
from qwq_mlx.serve.reply import Piece, ReplyText
from qwq_mlx.trace.trace import Step

__all__ = ["Rows"]

_CUT = ("length", "context_full", "interrupted")


class _Choice:
    """One stream of a job, and how much of it the client has."""

    def __init__(self, job: Job, index: int, stream: Stream) -> None:
        self.job, self.index, self.stream = job, index, stream
        self._n_steps = 0
        profile = stream.request.profile
        stops = () if job.ask.is_raw else job.ask.stop
        self._reply = ReplyText(stops, is_raw=job.ask.is_raw, close_tag=profile.close_tag)
        self._logprobs = _Logprobs(stream.request)

    def forward(self) -> bool:
        """Send what was written since. Returns whether there was anything."""
        run = self.stream.run
        steps = run.steps[self._n_steps :]
        if not steps or self._is_stopped():
            return False
        self._n_steps += len(steps)
        if self.job.ask.top_logprobs is not None:
            self._logprobs.add(steps, len(self._reply.text))
        text = "".join(step.text for step in steps)
        self._send(self._reply.feed(text, run.output.answer_char, run.output.thinking_char))
        if self._is_stopped():
            self.stream.stop()
        return True

    def _is_stopped(self) -> bool:
        """Whether a stop text came; the token under way is then the last, and nobody sees it."""
        return self._reply.stop_text is not None

    def end(self) -> None:
        """Send the rest, and that it is over."""
        trace, reply = self.stream.trace(), self._reply
        start = len(trace.text) - len(trace.conclusion) if trace.conclusion else None
        if self.job.ask.is_raw or (start is None and trace.finish_reason == "stop" and not reply.content):
            start = 0  # a model that ended its text has answered, however it did
        self._send(reply.finish(start))
        reasoning, content = trace.thinking if start != 0 else "", reply.content
        if reply.stop_text is None and start is not None:
            content = trace.text[start:] if self.job.ask.is_raw else trace.text[start:].lstrip("\n")
            start = len(trace.text) - len(content)
        raw_reason = (self.stream.run.finish or ("interrupted", ""))[0]
        is_cut = reply.stop_text is None and raw_reason in _CUT
        n_reasoning = trace.thinking_span[1] - trace.thinking_span[0]
        end = None if start is None else start + len(content)
        self.job.emit(
            Ended(
                choice=self.index,
                finish="length" if is_cut else "stop",
                stop_text=reply.stop_text,
                reasoning=reasoning,
                content=content,
                usage=Usage(
                    n_prompt=len(trace.prompt_ids),
                    n_cached=self.stream.n_cached,
                    n_output=self._n_steps if reply.stop_text is not None else len(trace.ids),
                    n_reasoning=n_reasoning if start != 0 else 0,
                    prefill_s=trace.timings.prefill_s,
                    decode_s=trace.timings.decode_s,
                ),
                reasoning_logprobs=tuple(self._logprobs.between(0, start)),
                logprobs=tuple(self._logprobs.between(start, end)) if start is not None else (),
            )
        )

    def _send(self, piece: Piece) -> None:
        if not (piece.reasoning or piece.content):
            return
        reasoning = self._logprobs.of_reasoning(piece.reasoning_end) if piece.reasoning else ()
        content = self._logprobs.of_content(*piece.content_span) if piece.content else ()
        self.job.emit(
            Delta(
                choice=self.index,
                reasoning=piece.reasoning,
                content=piece.content,
                reasoning_logprobs=tuple(reasoning),
                logprobs=tuple(content),
            )
        )


class _Logprobs:
    """The entries of a choice's tokens by where their text ends, and which of them were sent."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._entries: list[LogprobEntry] = []
        self._ends: list[int] = []
        self._n_sent = 0  # as thinking or answer
        self._span_start = -1
        self._n_content = 0  # place of the next entry of the answer

    def add(self, steps: list[Step], start: int) -> None:
        """Take tokens. start: where their text begins."""
        pieces, end = self._request.pieces, start
        for step in steps:
            end += len(step.text)
            if step.id not in self._request.model.stop_ids:
                entry = _entry(pieces[step.id], step.logprob)
                entry["top_logprobs"] = [_entry(pieces[each.id], each.logprob) for each in step.alternatives]
                self._entries.append(entry)
                self._ends.append(end)

    def of_reasoning(self, end: int) -> list[LogprobEntry]:
        """What was not sent yet, up to this character."""
        first, self._n_sent = self._n_sent, max(self._n_sent, bisect_right(self._ends, end))
        return self._entries[first : self._n_sent]

    def of_content(self, start: int, end: int) -> list[LogprobEntry]:
        """What was not sent as answer yet, within these characters; a new start begins anew."""
        if start != self._span_start:
            self._span_start, self._n_content = start, bisect_right(self._ends, start)
        first, self._n_content = self._n_content, max(self._n_content, bisect_right(self._ends, end))
        self._n_sent = max(self._n_sent, self._n_content)
        return self._entries[first : self._n_content]

    def between(self, start: int, end: int | None) -> list[LogprobEntry]:
        """All within these characters; end: None is the last."""
        last = len(self._ends) if end is None else bisect_right(self._ends, end)
        return self._entries[bisect_right(self._ends, start) if start else 0 : last]


def _entry(token: bytes, logprob: float | None) -> dict[str, Any]:
    """One token as OpenAI writes it; an injected one has the probability 1, nobody drew it."""
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob or 0.0, "bytes": list(token)}


class Rows:
    """`with rows: start(job); step()`. One that failed may be entered again.

    n_failed: steps in a row in which a stream failed and none wrote a token.
    """

    def __init__(self, reasoner: Reasoner, *, width: int, planned_bytes: int) -> None:
        self._reasoner, self._width, self._planned_bytes = reasoner, width, planned_bytes
        self._choices: list[_Choice] = []
        self._to_fork: list[tuple[Job, int, Stream]] = []  # of which the prompt is shared
        self.n_failed = 0
        self._scheduler: Scheduler | None = None

    def __enter__(self) -> Rows:
        self._scheduler = Scheduler(self._reasoner.model, width=self._width, planned_bytes=self._planned_bytes)
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

    def has_room(self, job: Job) -> bool:
        """Whether all its choices can run now beside what runs already, in rows and in memory."""
        if self.n_busy + job.n_choices > self._width:
            return False
        running = [choice.stream.request for choice in self._choices] + [each[2].request for each in self._to_fork]
        return self.fits([*running, *(request for request in job.requests for _ in range(job.ask.n))])

    def fits(self, requests: list[Request]) -> bool:
        """Whether the memory holds them side by side."""
        limit = self._reasoner.limit_bytes
        return plan_rows(requests, None, limit_bytes=limit).workload.n_sequences == len(requests)

    def start(self, job: Job) -> None:
        """Let a job begin: its prompts are fed with the next steps, and its further choices share them.

        One that can never run is told so.
        """
        assert self._scheduler is not None, "it was entered"
        if not self.fits([request for request in job.requests for _ in range(job.ask.n)]):
            self._fail(job, _too_large(job))
            return
        for place, request in enumerate(job.requests):
            try:
                stream = Stream(request)
            except (QwqError, RuntimeError, MemoryError) as error:
                self._fail(job, error)
                return
            self._scheduler.add(stream)
            self._choices.append(_Choice(job, place * job.ask.n, stream))
            self._to_fork += [(job, place * job.ask.n + i, stream) for i in range(1, job.ask.n)]

    def step(self) -> None:
        """One step of the scheduler, its events sent. Raises DamagedModelError."""
        assert self._scheduler is not None, "it was entered"
        for choice in self._choices:
            if choice.job.is_cancelled:
                choice.stream.stop()
        ended = self._scheduler.step()
        self._fork()
        has_written = False
        for choice in [each for each in self._choices if not each.job.is_cancelled]:
            has_written |= choice.forward()
        if has_written:
            self.n_failed = 0
        for choice in [each for each in self._choices if each.stream in ended]:
            self._choices.remove(choice)
            failure = choice.stream.failure
            if failure is not None:
                self.n_failed += 1
                self._fail(choice.job, failure)
            elif not choice.job.is_cancelled:
                choice.end()

    def fail_all(self, error: Exception) -> None:
        """End every job by what the scheduler raised, and forget its streams."""
        for job in {id(each.job): each.job for each in self._choices}.values():
            self._fail(job, error)
        for choice in self._choices:
            choice.stream.release_cache()
        self._choices.clear()
        self._to_fork.clear()
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
            self._choices.append(_Choice(job, index, stream))

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.is_cancelled:
            job.emit(Failed(error=_told(error)))
            job.cancel()


def _told(error: Exception) -> ApiError:
    """What a client may read of a failure: the sentence, not a traceback."""
    if isinstance(error, ApiError):
        return error
    code = "model_damaged" if isinstance(error, DamagedModelError) else "generation_failed"
    return ApiError(500, f"The request failed: {error}", code=code)


def _too_large(job: Job) -> ApiError:
    most = max(min(each.context, len(each.prompt_ids) + each.max_tokens) for each in job.requests)
    return ApiError(
        400,
        f"{job.n_choices:,} choices of up to {most:,} positions do not fit the memory side by side. One needs:\n"
        f"{job.requests[0].plan.arithmetic()}\nAsk for fewer choices or tokens.",
        param="n",
        code="context_length_exceeded",
    )
