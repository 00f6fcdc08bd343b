"""The engine's step over any number of runs of one model: schedule -> forward -> accept.

A running pair is a `Run` (what was written, and what to do next) and a `Row` (ids, cache, the draw).

Does not: hand out Steps (`stream` does), or decide which runs share a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.row import Token
from qwq_mlx.errors import GenerationError, error_text
from qwq_mlx.generate.request import Request, new_row
from qwq_mlx.generate.run import Inject, Rewind, Run
from qwq_mlx.trace.timings import Clock, Timings

__all__ = ["Running", "advance"]


class Running:
    """A run and the row that draws its tokens.

    cache: KV cache to go on from, None for an empty one. n_cached: leading prompt ids that it holds.
    """

    def __init__(
        self, request: Request, decoder: Decoder, *, cache: list[Any] | None = None, n_cached: int = 0
    ) -> None:
        self.run = Run(request)
        self.row, self._bad_words = new_row(request, cache)
        self.n_cached = n_cached
        self.clock = Clock()
        self.failure: Exception | None = None
        self._decoder = decoder

    def timings(self) -> Timings:
        """Where the time went so far, and what came of drafts."""
        return replace(self.clock.timings(), drafted=dict(self.row.drafted), accepted=dict(self.row.accepted))

    @property
    def needs_forward(self) -> bool:
        """Whether the next token has still to be drawn."""
        return self.run.finish is None and not (self._bad_words is not None and self._bad_words.has_settled)

    @property
    def has_ready(self) -> bool:
        """Whether it goes on with a token that was drawn already."""
        return self.run.finish is None and bool(self.row.ready)

    def prefill(self, ids: Sequence[int]) -> Iterator[int]:
        """Feed these ids in chunks; yields how many are in the cache after each. Output ids may be among them."""
        request = self.run.request
        yield from self._decoder.prefill(self.row, ids, chunk=request.limits.prefill_step, n_cached=self.n_cached)
        if self.run.steps:
            self.restore(self.row.cache)

    def restore(self, cache: list[Any]) -> None:
        """Go on from a cache that holds a beginning of prompt and output; their rest is fed with the next step."""
        self.row.cache = cache
        self.row.start(self.run.request.prompt_ids, [step.id for step in self.run.steps])
        if self._bad_words is not None:
            self._bad_words.watch_from(self.row.n_output)

    def schedule(self) -> None:
        """Do to the row what the run wants before the next forward."""
        self.apply(self.run.schedule())

    def apply(self, instruction: Inject | Rewind | None) -> None:
        """Do one thing to the row, and draw from now on as the run says."""
        if instruction is not None and self._bad_words is not None:
            self._bad_words.drop()
        if isinstance(instruction, Inject):
            self._decoder.force(self.row, instruction.ids)
        elif isinstance(instruction, Rewind):
            self.row.rewind(instruction.n_output)
        if instruction is not None and self._bad_words is not None:
            self._bad_words.watch_from(self.row.n_output)
        sampling, salt = self.run.sampling
        if (sampling, salt) != (self.row.sampler.sampling, self.row.sampler.salt):
            self.row.sampler = self.row.sampler.other(sampling, salt=salt)
            if self._bad_words is not None:
                self._bad_words.drop()
                self._bad_words.watch_from(self.row.n_output)
            self.row.draw_again()

    def fail(self, error: Exception) -> None:
        """End the run here; what was written until now is in its trace."""
        self.failure = error
        self.run.finish = ("interrupted", error_text(error))

    def accept(self, token: Token | None) -> None:
        """Hand the run its next token, if one is settled. token: the one just drawn, None where none was."""
        if self._bad_words is not None:
            if token is not None:
                self._bad_words.feed(token)
            token = self._bad_words.next() if self._bad_words.has_settled else None
        if token is not None:
            self.clock.drawn()
            self.run.accept(token)


def advance(decoder: Decoder, running: Sequence[Running]) -> None:
    """One step of the engine: at most one token for each, with one pass over the weights for all.

    A run that cannot go on ends with its `failure`, and the others are not held up; a run that has ended is left alone.
    Raises what MLX raises in the pass.
    """
    for each in running:
        each.schedule()
    drawing = [each for each in running if each.needs_forward]
    drawn = iter(decoder.step([each.row for each in drawing]) if drawing else ())
    if decoder.is_stopped:
        for each in running:
            each.run.is_stopped = True
    for each in running:
        token = next(drawn) if each in drawing else None
        if token is None and each.row.failure is not None:
            each.fail(each.row.failure)
        elif each.run.finish is None:
            try:
                each.accept(token)
            except GenerationError as error:  # every id is banned
                each.fail(error)
