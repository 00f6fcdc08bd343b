"""What passes between the HTTP side and the thread that owns the model: an `Ask` becomes a `Job`, its events come back.

Does not: know HTTP, a dialect, or MLX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwq_mlx.options import Sampling, Thinking
from qwq_mlx.serve.api_error import ApiError

if TYPE_CHECKING:
    from qwq_mlx.generate.checkpoint.state import RunState
    from qwq_mlx.generate.request import Request
    from qwq_mlx.generate.stream import Stream

__all__ = ["Ask", "Delta", "Ended", "Event", "Failed", "Job", "LogprobEntry", "Restored", "Stepped", "Usage", "in_time"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a client asks for, in no dialect's words.

    messages: of a conversation, with "role" and "content"; empty where there are prompts.
    prompts: texts or ids that are continued as they stand, without template, thinking or answer.
    sampling: None in it is the model's own value.
    max_tokens: of the whole output; None is the room that the context leaves.
    context: positions; None is the server's.
    thinking: budget and loop action.
    stop: texts that end the answer; the thinking may hold them.
    n: choices of each prompt.
    top_logprobs: alternatives of each token; None asks for no log-probabilities.
    shows_steps: events are the tokens themselves (`Stepped`) in place of the parts of the text.
    """

    messages: tuple[dict[str, str], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    context: int | None = None
    thinking: Thinking = field(default_factory=Thinking)
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    shows_steps: bool = False

    @property
    def is_raw(self) -> bool:
        """Whether the output is one text, not thinking and answer."""
        return bool(self.prompts)


LogprobEntry = dict[str, Any]
"""One token: `token`, `bytes`, `logprob`, and `top_logprobs` of the same form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """More text of one choice, with the log-probabilities of its tokens where they were asked for."""

    choice: int
    reasoning: str = ""
    content: str = ""
    reasoning_logprobs: tuple[LogprobEntry, ...] = ()
    logprobs: tuple[LogprobEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Tokens of one choice, as JSON objects (`trace.Step`).

    progress: what else the run needs to go on from here (`run_state.progress_json`); None most of the time.
    """

    choice: int
    steps: tuple[dict[str, Any], ...]
    progress: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens and seconds of one choice.

    n_prompt: prompt ids. n_cached: of them those that a cache held. n_output: ids that were written, the thinking's
    included. n_reasoning: of them those of the thinking. prefill_s, decode_s: as `trace.timings`.
    """

    n_prompt: int
    n_cached: int = 0
    n_output: int = 0
    n_reasoning: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One choice is over.

    finish: "stop", or "length" where it was cut.
    stop_text: the client's text that ended it, None for another end.
    reasoning, content: both parts of the whole, as the finished text splits.
    summary: what the trace says besides, where steps were asked for.
    progress: as in `Stepped`, at the end.
    """

    choice: int
    finish: str
    stop_text: str | None
    reasoning: str
    content: str
    usage: Usage
    reasoning_logprobs: tuple[LogprobEntry, ...] = ()
    logprobs: tuple[LogprobEntry, ...] = ()
    summary: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The whole job is over without an answer."""

    error: ApiError


Event = Delta | Stepped | Ended | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A run to go on with, as `resuming` found it.

    state: with room to go on.
    path: of the file that has its KV cache; None where the cache is worked out again from the ids.
    answer_now: begin with the answer cue.
    """

    state: RunState
    path: Path | None = None
    answer_now: bool = False


class Job:
    """A request under way: its events are read on the loop that made it, and `cancel` ends it from anywhere.

    requests: one for each prompt, ready to run; each makes `ask.n` choices, numbered through.
    source: a job and a number of tokens that this one shares with its first choice, or a saved run that it goes on
      with; None for one of its own.
    streams: of its prompts, once they run; for the model's thread alone.
    """

    def __init__(self, ask: Ask, requests: list[Request], *, source: tuple[Job, int] | Restored | None = None) -> None:
        self.ask = ask
        self.requests = requests
        self.source = source
        self.streams: list[Stream] = []
        self.is_cancelled = False
        self.wants_answer = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def n_choices(self) -> int:
        """How many times it ends."""
        return len(self.requests) * self.ask.n

    @property
    def n_prompt(self) -> int:
        """Prompt ids of all prompts."""
        return sum(len(request.prompt_ids) for request in self.requests)

    def cancel(self) -> None:
        """Nobody reads it any more: it ends after the token under way."""
        self.is_cancelled = True

    def answer_now(self) -> None:
        """The thinking is to end at the next end of a sentence, and the answer to be asked for."""
        self.wants_answer = True

    def emit(self, event: Event) -> None:
        """Hand an event over; called from the model's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed, so nobody reads
            self.is_cancelled = True

    async def next_event(self, timeout_s: float) -> Event | None:
        """The next event; None after so many seconds without one."""
        if not self._events.empty():
            return self._events.get_nowait()
        return await in_time(self._events.get(), timeout_s)


async def in_time(work: Coroutine[Any, Any, _T], timeout_s: float) -> _T | None:
    """What it comes to within so many seconds, else None, and then it is cancelled.

    `asyncio.wait_for` of Python before 3.12 swallows a cancellation that comes in the moment in which the work is done:
    whoever left then would be served to the end.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=timeout_s)
        return task.result() if task.done() else None
    finally:
        task.cancel()
