"""Continuous batching: several runs of one model share each pass over its weights, and enter and leave at any step.

Between two decode steps at most one chunk of a newcomer's prompt is fed (`Limits.prefill_step` ids), which is all that
the others wait for. Each run has its own sampling, limits, detectors and hooks; one that fails ends alone.

Does not: share what is common in prompts, or decide how many runs fit (`Reasoner.width` does).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import TracebackType

import mlx.core as mx

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.speculative import Drafts
from qwq_mlx.errors import GenerationError
from qwq_mlx.generate.running import advance
from qwq_mlx.generate.stream import Stream
from qwq_mlx.model.device import wired
from qwq_mlx.model.load import LoadedModel

__all__ = ["Scheduler"]


class Scheduler:
    """`with Scheduler(model, width=8, planned_bytes=...) as scheduler:`, then `add` streams and `step`.

    width: runs side by side, at most.
    planned_bytes: what they need together; kept wired on Metal meanwhile.
    ask_answer: ask the model behind each text that gives no sure answer (`Stream.ask_answer`).
    releases: give the cache of a run back when it ends; False leaves it to the caller, for the next prompt.
    drafts: guesses ids for all of them; None decodes without.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        width: int,
        planned_bytes: int,
        ask_answer: bool = False,
        releases: bool = True,
        drafts: Drafts | None = None,
    ) -> None:
        self.width = width
        self._asks, self._releases = ask_answer, releases
        self._decoder = Decoder(
            model.module, n_ids=model.tokenizer.n_ids, reproducible=model.reproducible, drafts=drafts
        )
        self._waiting: deque[tuple[Stream, Iterator[None]]] = deque()
        self._active: list[Stream] = []
        self._wired = wired(planned_bytes)

    def __enter__(self) -> Scheduler:
        self._wired.__enter__()
        mx.reset_peak_memory()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wired.__exit__(kind, error, trace)

    @property
    def is_stopped(self) -> bool:
        """Whether another of the processes that hold the model was stopped, and all runs with it."""
        return self._decoder.is_stopped

    def stop_all(self) -> None:
        """Where another of the processes was stopped, stop the runs there are, and let those that come later go on."""
        if self._decoder.take_stop():
            for stream in self.streams:
                stream.stop()

    @property
    def streams(self) -> list[Stream]:
        """The runs that have not ended."""
        return [*self._active, *(stream for stream, _ in self._waiting)]

    @property
    def has_room(self) -> bool:
        """Whether another run may be added."""
        return len(self._active) + len(self._waiting) < self.width

    def add(self, stream: Stream) -> None:
        """Let a run that has not begun enter: its prompt is fed with the next steps."""
        self._waiting.append((stream, stream.prefill()))

    def step(self) -> list[Stream]:
        """One chunk of a newcomer's prompt and a token of each run, or more where drafts were right.

        Returns the runs that ended with it, their caches gone.

        A run that cannot go on is among them, with its `failure`; a failure of MLX in the shared pass is that of all.
        Raises DamagedModelError as soon as it is known.
        """
        for stream in self.streams[:1]:  # they share the model
            if stream.request.check_model is not None:
                stream.request.check_model()
        ended = self._feed()
        if self._active:
            try:
                advance(self._decoder, [stream.running for stream in self._active])
                # what a pass drew is taken before the next one, so that all runs share that
                while ready := [stream.running for stream in self._active if stream.running.has_ready]:
                    advance(self._decoder, ready)
            except (RuntimeError, MemoryError) as error:
                for stream in self._active:
                    stream.fail(error)
        ended += [stream for stream in self._active if stream.is_finished]
        self._active = [stream for stream in self._active if not stream.is_finished]
        for stream in ended:
            self._end(stream)
        return ended

    def _end(self, stream: Stream) -> None:
        if self._asks and stream.failure is None and not stream.run.is_stopped:
            try:
                stream.ask_answer()
            except GenerationError as error:
                stream.fail(error)
        if self._releases:
            stream.release_cache()
        else:
            stream.keep_cache()

    def _feed(self) -> list[Stream]:
        """Feed one chunk of the first prompt that waits; runs that have nothing to feed, as forks have, begin at once.

        Returns the runs that could not begin.
        """
        failed = []
        while self._waiting:
            stream, chunks = self._waiting[0]
            try:
                next(chunks)
                break
            except StopIteration:
                self._active.append(stream)
            except (GenerationError, RuntimeError, MemoryError) as error:
                stream.fail(error)
                failed.append(stream)
            self._waiting.popleft()
        return failed
