"""What a caller iterates over for one run: it drives the engine, hands out the Steps, and saves, forks and tells all.

Does not: load models or make prompts (`reasoner` does), or print.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.decoder import Decoder
from qwq_mlx.engine.kv_cache import fork_cache, take_out_of_batch
from qwq_mlx.engine.ranks.whole_cache import whole_cache
from qwq_mlx.errors import GenerationError, OptionError, SavingError
from qwq_mlx.files.output_file import lies_in
from qwq_mlx.generate.asked_answer import ask
from qwq_mlx.generate.checkpoint.file import model_digest, write_checkpoint
from qwq_mlx.generate.checkpoint.inspected_steps import inspected_steps, with_inspected
from qwq_mlx.generate.checkpoint.state import RunState, state_json
from qwq_mlx.generate.finish import failure_of, trace_of
from qwq_mlx.generate.request import PrefillProgress, Request
from qwq_mlx.generate.running import Running, advance
from qwq_mlx.model.device import wired
from qwq_mlx.reasoning.answer import SURE
from qwq_mlx.trace.trace import Asked, Step, Trace

__all__ = ["Stream"]


class Stream:
    """Iterate over it for Steps; `trace()` then tells all. `stop()` ends it after the token under way.

    After a nudge Steps go on from an earlier index: those from there on were taken back.

    >>> run = reasoner.stream("What is 3 + 4?", sampling=qwq_mlx.Sampling(temperature=0))
    >>> for step in run:
    ...     if step.index == 4:
    ...         run.stop()
    >>> run.trace().finish_reason, len(run.trace().ids)
    ('interrupted', 6)
    """

    def __init__(
        self, request: Request, *, progress: PrefillProgress | None = None, before: Stream | None = None
    ) -> None:
        """before: an earlier run of the same model; its cache is taken over as far as the ids agree, and it is over."""
        self.request = request
        self._progress = progress
        cache, n_cached = before.hand_over(request) if before is not None else (None, 0)
        model = request.model
        self._decoder = Decoder(
            model.module, n_ids=model.tokenizer.n_ids, reproducible=model.reproducible, drafts=request.drafts
        )
        self.running = Running(request, self._decoder, cache=cache, n_cached=n_cached)
        self.run = self.running.run
        self._peak_bytes = 0
        self._has_failed = False
        self._model_sha256 = ""
        self._asked: Asked | None = None
        self._iterator = self._guarded()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._iterator)

    def stop(self) -> None:
        """End after the token under way, with finish_reason "interrupted". Safe to call from a signal handler."""
        self.run.is_stopped = True

    def answer_now(self) -> None:
        """End the thinking at the next end of a sentence and ask for the answer. Safe to call from a signal handler."""
        self.run.budget.ask("answered")

    @property
    def failure(self) -> Exception | None:
        """Why the run could not go on, with the trace until there if it is a GenerationError; None where it did."""
        failure = self.running.failure
        if isinstance(failure, GenerationError) and failure.trace is None:
            failure.trace = self.trace()
        return failure

    def fail(self, error: Exception) -> None:
        """End the run by what was raised while it went on; what MLX raised becomes a GenerationError with the trace."""
        if isinstance(error, GenerationError):
            self.running.fail(error)
            return
        self._has_failed = True
        self.run.finish = ("interrupted", f"MLX failed: {error}")
        self.running.failure = failure_of(error, self.trace(), self.request)

    @property
    def is_finished(self) -> bool:
        """Whether the last Step has been drawn."""
        return self.run.finish is not None

    @property
    def n_cached(self) -> int:
        """Prompt ids whose keys and values were there already, from an earlier run."""
        return self.running.n_cached

    def hand_over(self, request: Request) -> tuple[list[Any] | None, int]:
        """The cache for a run of another prompt, with the number of its leading ids that it holds; this run is over.

        None and 0 where nothing agrees, the cache is of another kind, or it cannot be trusted.
        """
        self.run.finish = self.run.finish or ("interrupted", "its cache went to the next run")
        if self._has_failed or request.plan.workload.kv_bits != self.request.plan.workload.kv_bits:
            return None, 0
        return self.running.row.release_cache(request.prompt_ids)

    def release_cache(self) -> None:
        """Give the memory of the KV cache back; the run is over, and its trace stays."""
        self.run.finish = self.run.finish or ("interrupted", "its cache was released")
        self.running.row.cache = []

    def keep_cache(self) -> None:
        """Keep the KV cache of a run that is over for the next prompt, without those of the runs beside it."""
        self.running.row.may_draft = False
        try:
            if not self._has_failed:
                take_out_of_batch(self.running.row.cache)
                return
        except (RuntimeError, MemoryError):
            pass  # no room for the copy: the next run feeds its prompt again
        self.release_cache()

    def save(self, path: str | Path) -> None:
        """Write a checkpoint from which `Reasoner.resume` goes on bit for bit, after any Step or at the end.

        A cache that was released, or after a failure of MLX is not to be trusted, is left out: who resumes works it out
        again from the ids, in larger passes, so there the ids may differ.
        Raises SavingError where the disk does not take it; the run can go on all the same.
        """
        request, row = self.request, self.running.row
        if lies_in(Path(path), request.model.folder):
            raise SavingError(
                f"{path}: lies in the model's folder, where no run is saved. Give a place outside of it.",
                OSError(errno.EINVAL, "a model's folder"),
            )
        self.running.apply(self.run.go_back())
        has_cache = bool(row.ids and row.cache and self.run.steps) and not self._has_failed
        n_ids = len(request.prompt_ids) + len(self.run.steps) - 1
        cache = whole_cache(request.model, row.cache if has_cache else [], n_ids)
        self._model_sha256 = self._model_sha256 or model_digest(request.model.folder)
        seen, arrays = inspected_steps(request.inspect, self.run.steps, request.model.config.hidden_size)
        state = replace(
            self.run.dump(),
            model_sha256=self._model_sha256,
            capacities=cache.capacities,
            seen=seen,
        )
        write_checkpoint(Path(path), state_json(state), arrays, cache)

    def restore(
        self,
        state: RunState,
        cache: list[Any] | None,
        arrays: Mapping[str, mx.array] | None = None,
        *,
        answer_now: bool = False,
    ) -> None:
        """Take over a saved run of the same request before the first Step.

        cache: of its ids, None where there is none.
        arrays: of the file, with the hidden states that were seen.
        answer_now: begin with the answer cue.
        Raises OptionError where the answer has begun.
        """
        self.run.load(state)
        self.run.output.steps = with_inspected(self.run.steps, state.seen, arrays or {})
        if answer_now:
            if self.run.output.segment == "answer":
                raise OptionError(
                    "answer_now: the answer has begun. Resume without it, or start another run if it ended."
                )
            self.run.budget.ask_at_once()
        self.running.apply(None)
        if cache is not None:
            self.running.restore(cache)
            if answer_now:  # what the cache holds beyond these ids is taken off
                self.running.row.rewind(len(self.run.steps))

    def fork(self, *, at: int, seed: int) -> Stream:
        """Another run with the first `at` output tokens of this one and draws of its own from there; no prefill.

        at: 0 shares the prompt alone, so the ids are those of a run with that seed.
        What both have in common is in memory once, from 256 positions on. This run is not touched. Raises OptionError
        for a token that is not there yet.
        """
        steps = self.run.steps
        if not 0 <= at <= len(steps):
            raise OptionError(f"at is {at}, expected from 0 to {len(steps)}, the output tokens there are.")
        request = replace(self.request, sampling=replace(self.request.sampling, seed=seed), forked_at=at)
        other = Stream(request)
        row = self.running.row
        has_cache = bool(row.ids and row.cache) and not self._has_failed  # else the fork feeds all there is itself
        cache = None
        if has_cache:
            module, kv_bits = request.model.module, request.plan.workload.kv_bits
            cache = fork_cache(module, row.cache, len(request.prompt_ids) + at - 1, kv_bits)
        other.restore(self.run.dump().until(at, texts=[step.text for step in steps]), cache)
        other.run.output.steps = steps[:at]  # with what was seen of them
        return other

    def trace(self) -> Trace:
        """Everything so far, frozen. Before the end its finish_reason is "interrupted"."""
        return trace_of(
            self.run,
            timings=self.running.timings(),
            peak_bytes=self._peak_bytes or mx.get_peak_memory(),
            asked=self._asked,
        )

    def ask_answer(self) -> Asked | None:
        """Ask the model for its answer behind the finished text, where the text gives none of `SURE` confidence (0.85).

        It happens in a fork: ids, text, receipt and saved run stay as they are. The trace has what came of it as
        `asked`, and as its answer where that is the more probable one. Costs the cue's ids and at most 64 more.
        Returns None, and does nothing, where the answer is sure or the run was interrupted.
        Raises OptionError before the end of the run; GenerationError, whose `.trace` has the run.

        >>> cut = qwq_mlx.Limits(max_tokens=60)
        >>> run = reasoner.stream("How many r in strawberry.", sampling=qwq_mlx.Sampling(temperature=0), limits=cut)
        >>> for _ in run:
        ...     pass
        >>> asked = run.ask_answer()
        >>> run.trace().answer == asked.answer, run.trace().answer_kind, len(run.trace().ids), asked.n_tokens
        (True, 'asked', 60, 11)
        """
        run, cache = self.run, self.running.row.cache
        if run.finish is None:
            raise OptionError("ask_answer: the run is not over. Iterate to its end first, or use `answer_now`.")
        trace = self.trace()
        is_sure = trace.answer is not None and trace.confidence >= SURE
        if is_sure or trace.finish_reason == "interrupted" or not cache or self._has_failed or not run.steps:
            return None
        try:
            with wired(self.request.plan.peak_bytes):
                self._asked = ask(
                    self.request,
                    self._decoder,
                    cache,
                    trace.ids,
                    after=trace.text[-2:],
                    is_closed=run.output.segment == "answer",
                    is_stopped=lambda: run.is_stopped,
                )
        except GenerationError as error:
            error.trace = trace
            raise
        except (RuntimeError, MemoryError) as error:
            raise failure_of(error, trace, self.request) from error
        return self._asked

    def _guarded(self) -> Iterator[Step]:
        """The steps with the planned memory wired, and a failure of MLX as a GenerationError that has the trace."""
        try:
            with wired(self.request.plan.peak_bytes):
                yield from self._steps()
        except (RuntimeError, MemoryError) as error:
            self.fail(error)
            assert self.failure is not None, "it has just failed"
            raise self.failure from error

    def _steps(self) -> Iterator[Step]:
        mx.reset_peak_memory()
        self.running.clock.start()
        try:
            for _ in self._prefill():
                pass
            while True:
                while (step := self.run.take()) is not None:
                    yield step
                if self.request.check_model is not None:
                    self.request.check_model()
                if self.run.finish is not None:
                    return
                self.running.schedule()
                if self.run.has_untaken:  # an answer cue is handed out before anything is drawn behind it
                    continue
                is_first = not self.run.steps and not self.running.clock.has_drawn
                advance(self._decoder, [self.running])
                if self.running.failure is not None:
                    raise self.running.failure
                if is_first and self.running.clock.has_drawn:
                    self._report(len(self.request.prompt_ids))
        except GenerationError as error:
            self.run.finish = ("interrupted", str(error))
            error.trace = self.trace()
            raise
        finally:
            self._peak_bytes = mx.get_peak_memory()

    def prefill(self) -> Iterator[None]:
        """Feed the prompt in chunks, for who drives the run from outside (`Scheduler`). Exhaust it."""
        self.running.clock.start()
        yield from self._prefill()

    def _prefill(self) -> Iterator[None]:
        """Feed what the cache does not hold: the prompt, or after a failure everything there is."""
        if self.running.row.ids:
            return
        for n_done in self.running.prefill((*self.request.prompt_ids, *(step.id for step in self.run.steps))):
            self._report(n_done)
            if self.run.is_stopped:
                self.run.finish = ("interrupted", "")
                return
            yield

    def _report(self, n_done: int) -> None:
        self.running.clock.n_prefilled = n_done - self.running.n_cached
        if self._progress is not None:
            self._progress(n_done, len(self.request.prompt_ids))
