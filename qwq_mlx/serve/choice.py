"""One stream of a job as its client has it: text that was sent, log-probabilities of its tokens, and its end.

Does not: draw tokens (`rows` does), or decide where the answer begins.
"""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_right
from typing import Any

from qwq_mlx.generate.request import Request
from qwq_mlx.generate.stream import Stream
from qwq_mlx.serve.jobs import Delta, Ended, Job, LogprobEntry, Stepped, Usage
from qwq_mlx.serve.reply import Piece, ReplyText
from qwq_mlx.serve.run_state import progress_json
from qwq_mlx.trace.trace import Step, Trace

__all__ = ["Choice"]

_PROGRESS_S = 1.0
"""Between two states of a run from which it could go on; so much is drawn again after a crash."""
_CUT = ("length", "context_full", "interrupted")


class Choice:
    """One stream of a job, and how much of it the client has."""

    def __init__(self, job: Job, index: int, stream: Stream) -> None:
        self.job, self.index, self.stream = job, index, stream
        self._n_steps = 0
        self._n_events = len(stream.run.monitors.events)  # of a run that goes on
        self._progress_due = time.monotonic()
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
        if self.job.ask.shows_steps:
            self.job.emit(self._stepped(steps))
        text = "".join(step.text for step in steps)
        self._send(self._reply.feed(text, run.output.answer_char, run.output.thinking_char))
        if self._is_stopped():
            self.stream.stop()
        return True

    def _stepped(self, steps: list[Step]) -> Stepped:
        values, run, progress = [_step_json(step) for step in steps], self.stream.run, None
        events, self._n_events = run.monitors.events[self._n_events :], len(run.monitors.events)
        if events:
            values[-1]["events"] = [dict(each) for each in events]
        if time.monotonic() >= self._progress_due:
            progress = progress_json(run)
            self._progress_due = time.monotonic() + _PROGRESS_S
        return Stepped(choice=self.index, steps=tuple(values), progress=progress)

    def _is_stopped(self) -> bool:
        """Whether a stop text came; the token under way is then the last, and nobody sees it."""
        return self._reply.stop_text is not None

    def end(self) -> Usage:
        """Send the rest, and that it is over; returns what it took."""
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
        usage = Usage(
            n_prompt=len(trace.prompt_ids),
            n_cached=self.stream.n_cached,
            n_output=self._n_steps if reply.stop_text is not None else len(trace.ids),
            n_reasoning=n_reasoning if start != 0 else 0,
            prefill_s=trace.timings.prefill_s,
            decode_s=trace.timings.decode_s,
        )
        self.job.emit(
            Ended(
                choice=self.index,
                finish="length" if is_cut else "stop",
                stop_text=reply.stop_text,
                reasoning=reasoning,
                content=content,
                usage=usage,
                reasoning_logprobs=tuple(self._logprobs.between(0, start)),
                logprobs=tuple(self._logprobs.between(start, end)) if start is not None else (),
                summary=_summary(trace) if self.job.ask.shows_steps else None,
                progress=progress_json(self.stream.run) if self.job.ask.shows_steps else None,
            )
        )
        return usage

    def _send(self, piece: Piece) -> None:
        if self.job.ask.shows_steps or not (piece.reasoning or piece.content):
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


def _step_json(step: Step) -> dict[str, Any]:
    """A step for who watches a run; the hidden states, which nobody asked for, are left out."""
    return {
        "index": step.index,
        "id": step.id,
        "text": step.text,
        "segment": step.segment,
        "logprob": step.logprob,
        "entropy": step.entropy,
        "margin": step.margin,
        "is_injected": step.is_injected,
        "alternatives": [dataclasses.asdict(each) for each in step.alternatives],
        "loop_scores": None if step.loop_scores is None else dataclasses.asdict(step.loop_scores),
    }


def _summary(trace: Trace) -> dict[str, Any]:
    """A trace without its tokens."""
    return {
        "answer": trace.answer,
        "answer_kind": trace.answer_kind,
        "confidence": trace.confidence,
        "is_revised": trace.is_revised,
        "finish_reason": trace.finish_reason,
        "detail": trace.detail,
        "description": trace.describe(is_saved=True),
        "thinking_span": list(trace.thinking_span),
        "conclusion_span": None if trace.conclusion_span is None else list(trace.conclusion_span),
        "injections": [dataclasses.asdict(each) for each in trace.injections],
        "events": [dict(each) for each in trace.events],
        "settings": dict(trace.settings),
    }


def _entry(token: bytes, logprob: float | None) -> dict[str, Any]:
    """One token as OpenAI writes it; an injected one has the probability 1, nobody drew it."""
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob or 0.0, "bytes": list(token)}
