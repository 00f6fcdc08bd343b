"""One generation under way: ids become `Step`s, and at the end a `Trace`.

Every token goes through the same stations in the same order: draw, text, stop texts, split (thinking | answer), limits.
What ends the run is known before its last Step is handed out, so that Step carries the text held back until then and
the joined texts of all Steps are the Trace's text.

Does not: load models or make prompts (`reasoner` does), or print.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from qwq_mlx.errors import GenerationError
from qwq_mlx.generate.decode import Decoder
from qwq_mlx.generate.options import Limits, Sampling
from qwq_mlx.generate.sample import Sampler
from qwq_mlx.generate.text import Pieces, StopScanner, TextStream
from qwq_mlx.generate.trace import FinishReason, Injection, Step, Timings, Trace
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.reasoning.profile import Profile
from qwq_mlx.reasoning.split import Split, Splitter

__all__ = ["Progress", "Run"]

Progress = Callable[[int, int], None]
"""Called in prefill with the prompt ids done and their number."""


class Run:
    """Iterate over it for Steps; `trace()` then tells all. `stop()` ends it after the token under way.

    sampling: resolved, with a seed. limits: with max_tokens and context filled in (`reasoner` does both). Both can be
    read from the run.
    """

    def __init__(
        self,
        model: LoadedModel,
        pieces: Pieces,
        profile: Profile,
        prompt_ids: Sequence[int],
        *,
        prompt_text: str,
        sampling: Sampling,
        limits: Limits,
        progress: Progress | None = None,
    ) -> None:
        self._model = model
        self.sampling = sampling
        self.limits = limits
        self._progress = progress
        self._prompt_ids = tuple(prompt_ids)
        n_ids = model.tokenizer.n_ids
        breakers = pieces.holding(sampling.dry_breakers) if sampling.dry_multiplier else ()
        seed = sampling.seed if sampling.seed is not None else 0
        sampler = Sampler(sampling, seed=seed, n_ids=n_ids, breaker_ids=breakers)
        self._decoder = Decoder(model.module, sampler, n_ids=n_ids)
        self._stream = TextStream(pieces)
        self._scanner = StopScanner(limits.stop)
        self._profile = profile
        self._prompt_text = prompt_text
        self._splitter = Splitter(profile, prompt=prompt_text)
        self._texts: list[str] = []
        self._logprobs: list[float | None] = []
        self._entropies: list[float | None] = []
        self._injections: list[Injection] = []
        self._last_split: Split | None = None
        self._finish: tuple[FinishReason, str] | None = None
        self._is_stopped = False
        self._n_prefilled = 0
        self._times: list[float] = []  # start, first id, latest id
        self._n_drawn = 0
        self._peak_bytes = 0
        self._iterator = self._steps()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._iterator)

    def stop(self) -> None:
        """End after the token under way, with finish_reason "interrupted". Safe to call from a signal handler."""
        self._is_stopped = True

    @property
    def model_name(self) -> str:
        """The model folder's name."""
        return self._model.folder.resolve().name

    @property
    def weights(self) -> str:
        """Weights and compute type in words."""
        return f"{self._model.weights}, computed in {self._model.compute_type}"

    @property
    def is_finished(self) -> bool:
        """Whether the last Step has been handed out."""
        return self._finish is not None

    def _steps(self) -> Iterator[Step]:
        mx.reset_peak_memory()
        self._times = [time.perf_counter()]
        try:
            for n_done in self._decoder.prefill(self._prompt_ids, step=self.limits.prefill_step):
                self._n_prefilled = n_done
                if self._progress is not None:
                    self._progress(n_done, len(self._prompt_ids))
                if self._is_stopped:
                    self._finish = ("interrupted", "")
                    return
            while self._finish is None:
                yield self._step()
        except GenerationError as error:
            self._finish = ("interrupted", str(error))
            error.trace = self.trace()
            raise
        finally:
            self._peak_bytes = mx.get_peak_memory()

    def _step(self) -> Step:
        """Draw one token and take it through all stations."""
        index = self._decoder.n_output
        is_last = index + 1 >= _given(self.limits.max_tokens)
        token = self._decoder.next(is_last=is_last)
        self._count_time()
        self._logprobs.append(token.logprob)
        self._entropies.append(token.entropy)
        text = self._text_of(token.id, is_last=is_last)
        segment = self._splitter.feed(text)
        self._texts.append(text)
        return Step(index=index, id=token.id, text=text, logprob=token.logprob, entropy=token.entropy, segment=segment)

    def _text_of(self, token_id: int, *, is_last: bool) -> str:
        """The text that may be shown with this id; finds out whether the run ends here."""
        if token_id in self._model.stop_ids:
            self._finish = ("stop", "")
            return self._scanned("", is_end=True)
        text = self._scanned(self._stream.feed(token_id), is_end=False)
        if self._finish is None and (is_last or self._is_stopped):
            self._finish = ("interrupted", "") if self._is_stopped else self._limit_reached()
            text += self._scanned("", is_end=True)
        return text

    def _scanned(self, text: str, *, is_end: bool) -> str:
        released = self._scanner.feed(text + self._stream.finish() if is_end else text)
        if released.hit is not None:
            self._finish = ("stop", f"the text {released.hit!r} came")
            return released.text
        return released.text + (self._scanner.finish() if is_end else "")

    def _limit_reached(self) -> tuple[FinishReason, str]:
        n_used, context = len(self._decoder.ids), _given(self.limits.context)
        if n_used >= context:
            return "context_full", f"{n_used:,} of {context:,} positions"
        return "length", f"{self._decoder.n_output:,} tokens"

    def _count_time(self) -> None:
        now = time.perf_counter()
        if self._n_drawn == 0:
            self._n_prefilled = len(self._prompt_ids)
            self._times = [self._times[0], now, now]
            if self._progress is not None:
                self._progress(self._n_prefilled, self._n_prefilled)
        self._times[2] = now
        self._n_drawn += 1

    def trace(self) -> Trace:
        """Everything so far, frozen. Before the end its finish_reason is "interrupted"."""
        reason, detail = self._finish or ("interrupted", "the run is not over")
        split = self._split(is_ended=reason == "stop")
        text = "".join(self._texts)
        start, first, latest = self._times if len(self._times) == 3 else (0.0, 0.0, 0.0)
        output = self._decoder.ids[self._decoder.n_prompt :]
        return Trace(
            prompt_ids=self._prompt_ids,
            ids=tuple(output),
            text=text,
            thinking=text[slice(*split.thinking_chars)],
            conclusion=text[slice(*split.conclusion_chars)] if split.conclusion_chars else "",
            answer=split.answer,
            answer_kind=split.kind,
            is_revised=split.is_revised,
            confidence=split.confidence,
            thinking_span=split.thinking,
            conclusion_span=split.conclusion,
            finish_reason=reason,
            detail=detail,
            logprobs=tuple(self._logprobs),
            entropies=tuple(self._entropies),
            injections=tuple(self._injections),
            timings=Timings(
                n_prefilled=self._n_prefilled,
                prefill_s=first - start,
                n_intervals=max(0, self._n_drawn - 1),
                decode_s=latest - first,
            ),
            peak_bytes=self._peak_bytes or mx.get_peak_memory(),
            settings={"sampling": _plain(self.sampling), "limits": _plain(self.limits)},
            model={
                "name": self.model_name,
                "weights": self._model.weights,
                "compute_type": self._model.compute_type,
            },
        )

    def _split(self, *, is_ended: bool) -> Split:
        """The split of the text so far; of an unfinished run by a splitter of its own, which costs a pass."""
        if self._finish is not None and self._last_split is None:
            self._last_split = self._splitter.finish(is_ended=is_ended)
        if self._last_split is not None:
            return self._last_split
        splitter = Splitter(self._profile, prompt=self._prompt_text)
        for text in self._texts:
            splitter.feed(text)
        return splitter.finish(is_ended=False)


def _plain(options: Sampling | Limits) -> dict[str, Any]:
    """Options as JSON values, which know no tuples, no integer keys and no infinity."""
    values = asdict(options)
    if isinstance(options, Sampling):
        values["logit_bias"] = {str(token_id): str(value) for token_id, value in options.logit_bias.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _given(value: int | None) -> int:
    if value is None:
        raise GenerationError("A limit is None where the run needs its number; start runs through Reasoner.stream.")
    return value
