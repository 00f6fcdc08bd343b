"""One generation under way: ids become `Step`s, and at the end a `Trace`.

Every token goes through the same stations in the same order: draw, text, stop texts, limits, loop detector, split. What
ends the run is known before its last Step is handed out, so that Step carries the text held back until then and the
joined texts of all Steps are the Trace's text.

Where the thinking has to end (its budget is spent, it goes round in a loop, or `answer_now` was called), the run waits
for a good place (`cue`) and then puts the profile's answer cue into the output.

Does not: load models or make prompts (`reasoner` does), or print.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx.engine.kv_cache import Layer, filled_cache
from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.generate.budget_forcing import Asking, cue_ids
from qwq_mlx.generate.checkpoint.file import model_digest, write_checkpoint
from qwq_mlx.generate.checkpoint.inspected_steps import seen_state, with_seen
from qwq_mlx.generate.loop_recovery import Nudges
from qwq_mlx.generate.monitors import Noticed
from qwq_mlx.generate.output import Written
from qwq_mlx.generate.request import Progress, Setup, given
from qwq_mlx.generate.source import decoder_of, source_of
from qwq_mlx.generate.stopping import end_after, failure_of, trace_of
from qwq_mlx.model.device import wired
from qwq_mlx.reasoning.loops.detector import Loop
from qwq_mlx.trace.timings import Clock
from qwq_mlx.trace.trace import FinishReason, Injection, Step, Trace

__all__ = ["Run"]


class Run:
    """Iterate over it for Steps; `trace()` then tells all. `stop()` ends it after the token under way.

    After a nudge Steps go on from an earlier index: those from there on were taken back.
    """

    def __init__(self, setup: Setup, *, progress: Progress | None = None, before: Run | None = None) -> None:
        """before: an earlier run of the same model; its cache is taken over as far as the ids agree, and it is over."""
        self.setup = setup
        self._progress = progress
        self._n_most = given(setup.limits.max_tokens)
        cache, self._n_cached = before.hand_over(setup) if before is not None else (None, 0)
        self._decoder = decoder_of(setup, cache)
        self._source = source_of(setup, self._decoder)
        self._noticed = Noticed(question=setup.question, detects_loops=setup.thinking.on_loop != "off")
        self._nudges = Nudges(setup.sampling)
        self._due_nudge: Loop | None = None
        self._written = Written(setup.pieces, setup.profile, prompt_text=setup.prompt_text, stops=setup.limits.stop)
        self._asking = Asking(setup.thinking)
        self._injections: list[Injection] = []
        self._finish: tuple[FinishReason, str] | None = None
        self._is_stopped = False
        self._clock = Clock()
        self._peak_bytes = 0
        self._has_failed = False
        self._needs_refill = False
        self._model_sha256 = ""
        self._n_shown = 0  # steps handed out; an answer cue is written before its first one is
        self._is_due = False  # what follows from the last step is still to be done
        self._iterator = self._guarded()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        step = next(self._iterator)
        self._n_shown = step.index + 1
        return step

    def stop(self) -> None:
        """End after the token under way, with finish_reason "interrupted". Safe to call from a signal handler."""
        self._is_stopped = True

    def answer_now(self) -> None:
        """End the thinking at the next end of a sentence and ask for the answer. Safe to call from a signal handler."""
        self._asking.ask("answered")

    @property
    def is_finished(self) -> bool:
        """Whether the last Step has been handed out."""
        return self._finish is not None

    @property
    def n_cached(self) -> int:
        """Prompt ids whose keys and values were there already, from an earlier run."""
        return self._n_cached

    def hand_over(self, setup: Setup) -> tuple[list[Any] | None, int]:
        """The cache for a run of another prompt, with the number of its leading ids that it holds; this run is over.

        None and 0 where nothing agrees, the cache is of another kind, or it cannot be trusted.
        """
        self._finish = self._finish or ("interrupted", "its cache went to the next run")
        if self._has_failed or setup.plan.workload.kv_bits != self.setup.plan.workload.kv_bits:
            return None, 0
        return self._decoder.give_up(setup.prompt_ids)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint from which `Reasoner.resume` goes on bit for bit, after any Step or at the end.

        After a failure of MLX the cache is not to be trusted and is left out: who resumes works it out again from the
        ids, in larger passes, so there the ids may differ.
        Raises SavingError where the disk does not take it; the run can go on all the same.
        """
        self._nudge()
        steps = self._written.steps
        n_known = len(self.setup.prompt_ids) + len(steps)
        has_cache = bool(self._decoder.ids and steps) and not self._has_failed
        layers = self._decoder.cached(n_known - 1) if has_cache else []
        self._model_sha256 = self._model_sha256 or model_digest(self.setup.model.folder)
        state: dict[str, Any] = {
            "model_sha256": self._model_sha256,
            "compute_type": self.setup.model.compute_type,
            "settings": self.setup.settings,
            "prompt_ids": list(self.setup.prompt_ids),
            "question": self.setup.question,
            "steps": [[step.id, step.logprob, step.entropy, step.is_injected] for step in steps],
            "injections": [asdict(each) for each in self._injections],
            "events": self._noticed.events,
            "asking": self._asking.pending,
            "nudges": self._nudges.state,
            "capacities": [layer.capacity for layer in layers],
            "finish_reason": self._finish[0] if self._finish is not None else None,
            "n_shown": min(self._n_shown, len(steps)),
            "is_due": self._is_due,
        }
        state["seen"], arrays = seen_state(self.setup.inspect, steps, self.setup.model.config.hidden_size)
        arrays |= {
            f"layers.{index}.{name}": array
            for index, layer in enumerate(layers)
            for name, array in layer.arrays.items()
        }
        write_checkpoint(Path(path), state, arrays)

    def restore(
        self,
        state: Mapping[str, Any],
        layers: Sequence[Layer],
        arrays: Mapping[str, mx.array] | None = None,
        *,
        answer_now: bool = False,
    ) -> None:
        """Take over a saved run of the same setup before the first Step.

        layers: its cache (`Decoder.cached`). arrays: of the file, with the hidden states that were seen. answer_now:
        begin with the answer cue. Raises OptionError where the answer has begun.
        """
        self._decoder.sampler = self._nudges.restored(tuple(state["nudges"]), self._decoder.sampler)
        asked_at = min((each["start"] for each in state["injections"]), default=len(state["steps"]))
        for token_id, logprob, entropy, is_injected in state["steps"]:
            text = self._written.release(token_id)
            step = self._written.add(token_id, text, logprob=logprob, entropy=entropy, is_injected=is_injected)
            self._noticed.replay(step, sees_loops=step.index < asked_at)
        if answer_now and self._written.segment == "answer":
            raise OptionError("answer_now: the answer has begun. Resume without it, or start another run if it ended.")
        self._written.steps = with_seen(self._written.steps, state.get("seen", {}), arrays or {})
        self._injections = [Injection(**each) for each in state["injections"]]
        self._noticed.restore(state["events"])
        self._n_shown = min(state["n_shown"], len(self._written.steps))
        self._is_due = state["is_due"] and not answer_now
        drawn = [step.text for step in self._written.steps if not step.is_injected]
        self._asking.rewind(drawn[:-1] if self._is_due else drawn)  # `_follow` takes the last one
        pending = tuple(state["asking"]) if state["asking"] else None
        self._asking.restore(is_over=bool(self._injections), pending=pending, at_once=answer_now)
        self._needs_refill = bool(self._written.steps) and not layers
        if layers:
            cache = filled_cache(self.setup.model.module, layers, self.setup.plan.workload.kv_bits)
            output_ids = [step.id for step in self._written.steps]
            self._source.restore(self.setup.prompt_ids, output_ids, cache)
            if answer_now:  # what the cache holds beyond these ids was taken off
                self._source.rewind(len(output_ids))

    def fork(self, *, at: int, seed: int) -> Run:
        """Another run with the first `at` output tokens of this one and draws of its own from there; no prefill.

        This run is not touched. Raises OptionError for a token that is not there yet.
        """
        steps = self._written.steps
        if not 1 <= at <= len(steps):
            raise OptionError(f"at is {at}, expected from 1 to {len(steps)}, the output tokens there are.")
        other = Run(replace(self.setup, sampling=replace(self.setup.sampling, seed=seed), forked_at=at))
        state = {
            "nudges": (0, 0),
            "steps": [(step.id, step.logprob, step.entropy, step.is_injected) for step in steps[:at]],
            "injections": [asdict(each.until(at, steps)) for each in self._injections if each.start < at],
            "events": self._noticed.until(at),
            "asking": None,
            "n_shown": at,
            "is_due": not steps[at - 1].is_injected,
        }
        other.restore(state, self._decoder.cached(len(self.setup.prompt_ids) + at - 1))
        other._written.steps = steps[:at]  # with what was seen of them
        return other

    def _guarded(self) -> Iterator[Step]:
        """The steps with the planned memory wired, and a failure of MLX as a GenerationError that has the trace."""
        try:
            with wired(self.setup.plan.peak_bytes):
                yield from self._steps()
        except (RuntimeError, MemoryError) as error:
            self._has_failed = True
            self._finish = ("interrupted", f"MLX failed: {error}")
            raise failure_of(error, self.trace(), self.setup) from error

    def _prefill(self) -> Iterator[int]:
        """Feed what the cache does not hold: the prompt, or after a failure everything there is."""
        known = (*self.setup.prompt_ids, *(step.id for step in self._written.steps if self._needs_refill))
        yield from self._decoder.prefill(known, step=self.setup.limits.prefill_step, n_cached=self._n_cached)
        if self._needs_refill:
            self._source.restore(self.setup.prompt_ids, known[len(self.setup.prompt_ids) :], self._decoder.cache)

    def _steps(self) -> Iterator[Step]:
        mx.reset_peak_memory()
        self._clock.start()
        try:
            for n_done in () if self._decoder.ids else self._prefill():
                self._report(n_done)
                if self._is_stopped:
                    self._finish = ("interrupted", "")
                    return
            if self._asking.due_at_once is not None:
                yield from self._inject(self._asking.due_at_once)
            yield from self._written.steps[self._n_shown :]
            yield from self._follow()
            while self._finish is None:
                step = self._step()
                self._is_due = True
                yield step
                yield from self._follow()
        except GenerationError as error:
            self._finish = ("interrupted", str(error))
            error.trace = self.trace()
            raise
        finally:
            self._peak_bytes = mx.get_peak_memory()

    def _follow(self) -> Iterator[Step]:
        """Do what follows from the last step, once: go back for a nudge, count its heat, or ask for the answer."""
        if not self._is_due or self._finish is not None or self._nudge():
            return
        self._is_due = False
        self._nudges.count(self._decoder)
        reason = self._asking.due(self._written.steps[-1].text, self._written.segment)
        if reason is not None:
            yield from self._inject(reason)

    def _step(self) -> Step:
        """Draw one token and take it through all stations."""
        is_last = len(self._written.steps) + 1 >= self._n_most
        token = self._source.next(is_last=is_last)
        if self._clock.drawn() and not self._written.steps:
            self._report(len(self.setup.prompt_ids))
        text = ""
        if token.id in self.setup.model.stop_ids:
            self._finish = ("stop", "")
        else:
            text = self._written.release(token.id)
            n_output = len(self._written.steps) + 1
            self._finish = self._written.stopped or end_after(
                self.setup, n_output, injections=self._injections, is_stopped=self._is_stopped
            )
            self._look_for_loops(token.id, text)
        if self._finish is not None:
            text += self._written.flush()
            self._finish = self._written.stopped or self._finish
        scores = self._noticed.scores if self.setup.inspect.loop_scores else None
        step = self._written.add(
            token.id, text, logprob=token.logprob, entropy=token.entropy, seen=token.seen, loop_scores=scores
        )
        self._noticed.scripts(step.text, is_final=self._finish is not None)
        return step

    def _look_for_loops(self, token_id: int, text: str) -> None:
        """Feed the detector until the answer was asked for, and do what the options say when it reports."""
        loop = self._noticed.loop(token_id, text) if not self._injections else None
        if loop is None or self._finish is not None:
            return
        action = self.setup.thinking.on_loop
        if action == "nudge" and self._nudges.is_spent:
            action = "answer"
        if action == "answer" and self._written.segment == "answer":
            action = "stop"  # there is nothing left to ask for
        self._noticed.add_loop(loop, action=action)
        if action == "stop":
            self._finish = ("loop", loop.evidence)
        elif action == "nudge":
            self._due_nudge = loop
        else:
            self._asking.ask("loop")

    def _nudge(self) -> bool:
        """Where it is due, go back to where a loop began and draw on with a higher temperature for a while."""
        loop = self._due_nudge
        if loop is None or self._finish is not None:
            return False
        self._due_nudge, self._is_due = None, False
        self._source.rewind(loop.start, self._nudges.sampler(self._decoder.sampler))
        self._written.rewind(loop.start)
        self._asking.rewind([step.text for step in self._written.steps])
        self._noticed.rewind(self._written.steps, start=loop.start)
        return True

    def _inject(self, reason: FinishReason) -> Iterator[Step]:
        """Put the answer cue into the output, if there is room for it and for some answer."""
        start = len(self._written.steps)
        ids = cue_ids(
            self.setup.model.tokenizer, self.setup.profile, after=self._written.text[-2:] if start else "\n\n"
        )
        if start + len(ids) >= self._n_most:
            return
        steps = self._written.inject(ids)
        for step in steps:
            self._noticed.scripts(step.text, is_final=False)
        self._finish = self._written.stopped
        self._source.force([step.id for step in steps])
        text = "".join(step.text for step in steps)
        self._injections.append(Injection(start=start, end=start + len(steps), text=text, reason=reason))
        yield from steps

    def _report(self, n_done: int) -> None:
        self._clock.n_prefilled = n_done - self._n_cached
        if self._progress is not None:
            self._progress(n_done, len(self.setup.prompt_ids))

    def trace(self) -> Trace:
        """Everything so far, frozen. Before the end its finish_reason is "interrupted"."""
        return trace_of(
            self.setup,
            self._written,
            self._finish,
            injections=self._injections,
            events=self._noticed.events,
            timings=self._clock.timings(),
            peak_bytes=self._peak_bytes or mx.get_peak_memory(),
        )
