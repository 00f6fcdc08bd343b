"""What a run has written so far: ids, their text as it may be shown, and the split into thinking and answer.

Does not: draw ids, or decide when to stop; it says when a stop text came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qwq_mlx.engine.detokenizer import StopScanner, TextStream
from qwq_mlx.engine.row import Token
from qwq_mlx.generate.request import Request
from qwq_mlx.reasoning.answer import Segment, Split, Splitter
from qwq_mlx.reasoning.loops import LoopScores
from qwq_mlx.trace.trace import Alternative, FinishReason, Step

__all__ = ["Output", "SavedStep"]

SavedStep = tuple[int, float | None, float | None, bool]
"""A step in a saved run: id, log-probability, entropy, is_injected."""


class Output:
    """Tokens come in two halves: `release` gives the text that may be shown, `feed` makes it a Step."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.steps: list[Step] = []
        self.stop_text: str | None = None
        self._start()

    def _start(self) -> None:
        self._stream = TextStream(self._request.pieces)
        self._scanner = StopScanner(self._request.limits.stop)
        self._splitter = self._new_splitter()
        self._split: Split | None = None

    def _new_splitter(self) -> Splitter:
        request = self._request
        return Splitter(request.profile, prompt=request.written, is_open=request.prompt_opens_thinking)

    @property
    def text(self) -> str:
        """All text that was shown."""
        return "".join(step.text for step in self.steps)

    @property
    def segment(self) -> Segment:
        """The part that the next token belongs to, as far as known."""
        return self._splitter.segment

    @property
    def answer_char(self) -> int | None:
        """The character of the text at which the answer begins, as far as known; None in the thinking."""
        return self._splitter.answer_char

    @property
    def thinking_char(self) -> int:
        """The character of the text at which the thinking begins: behind the tag that opens it."""
        return self._splitter.thinking_char

    @property
    def finish(self) -> tuple[FinishReason, str] | None:
        """How the run ends, with the detail for people, where a stop text came; else None."""
        return None if self.stop_text is None else ("stop", f"the text {self.stop_text!r} came")

    def release(self, token_id: int) -> str:
        """The text that this id lets out; sets `stop_text` where a stop text is complete with it."""
        released = self._scanner.feed(self._stream.feed(token_id))
        self.stop_text = released.hit
        return released.text

    def flush(self) -> str:
        """At the end: the text that was held back because a character or a stop text might have been coming."""
        if self.stop_text is not None:
            return ""
        released = self._scanner.feed(self._stream.finish())
        self.stop_text = released.hit
        return released.text + ("" if released.hit else self._scanner.finish())

    def feed(self, token: Token, text: str, *, loop_scores: LoopScores | None = None) -> Step:
        """Append a token that was drawn, with the text it shows and what was asked to be seen of its step."""
        step = Step(
            index=len(self.steps),
            id=token.id,
            text=text,
            logprob=token.logprob,
            entropy=token.entropy,
            segment=self._splitter.feed(text),
            alternatives=tuple(
                Alternative(id=token_id, text=self._alone(token_id), logprob=logprob)
                for token_id, logprob in (token.seen.top if token.seen is not None else ())
            ),
            margin=None if token.seen is None else token.seen.margin,
            loop_scores=loop_scores,
            hidden={} if token.seen is None else token.seen.hidden,
        )
        self.steps.append(step)
        return step

    def inject(self, token_ids: Sequence[int]) -> list[Step]:
        """Append ids that were not drawn, up to one that completes a stop text; returns their Steps."""
        start = len(self.steps)
        for token_id in token_ids:
            self._append((token_id, None, None, True))
            if self.stop_text is not None:
                break
        return self.steps[start:]

    def rewind(self, steps: Sequence[Step]) -> None:
        """Go back to the first of the steps there are; everything that follows from them is worked out again."""
        self.steps = []
        self._start()
        for step in steps:
            self.release(step.id)
            self._splitter.feed(step.text)
            self.steps.append(step)

    def dump(self) -> tuple[SavedStep, ...]:
        """The steps as a saved run has them."""
        return tuple((step.id, step.logprob, step.entropy, step.is_injected) for step in self.steps)

    def load(self, saved: Iterable[SavedStep]) -> None:
        """Append a saved run's steps."""
        for each in saved:
            self._append(each)

    def _append(self, saved: SavedStep) -> None:
        token_id, logprob, entropy, is_injected = saved
        text = self.release(token_id)
        step = Step(
            index=len(self.steps),
            id=token_id,
            text=text,
            logprob=logprob,
            entropy=entropy,
            segment=self._splitter.feed(text),
            is_injected=is_injected,
        )
        self.steps.append(step)

    def split(self, *, is_final: bool, is_ended: bool) -> Split:
        """Thinking and answer. is_final: nothing is added any more. is_ended: the model ended its text itself."""
        if is_final:
            if self._split is None:
                self._split = self._splitter.finish(is_ended=is_ended)
            return self._split
        splitter = self._new_splitter()
        for step in self.steps:
            splitter.feed(step.text)
        return splitter.finish(is_ended=False)

    def _alone(self, token_id: int) -> str:
        """The text of an id by itself; bytes that are no character alone become U+FFFD."""
        return self._request.pieces[token_id].decode("utf-8", "replace")
