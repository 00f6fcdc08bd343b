"""What a run has written so far: ids, their text as it may be shown, and the split into thinking and answer.

Does not: draw ids, or decide when to stop; it says when a stop text came.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwq_mlx.engine.activation_taps import Seen
from qwq_mlx.engine.detokenizer import Pieces, StopScanner, TextStream
from qwq_mlx.reasoning.answer.splitter import Segment, Split, Splitter
from qwq_mlx.reasoning.loops.detector import LoopScores
from qwq_mlx.reasoning.profile import Profile
from qwq_mlx.trace.trace import Alternative, FinishReason, Step

__all__ = ["Written"]


class Written:
    """Add tokens in two halves: `release` gives the text that may be shown, `add` makes it a Step."""

    def __init__(self, pieces: Pieces, profile: Profile, *, prompt_text: str, stops: Sequence[str]) -> None:
        self._pieces = pieces
        self._profile = profile
        self._prompt_text = prompt_text
        self._stops = tuple(stops)
        self.steps: list[Step] = []
        self.stop_text: str | None = None
        self._start()

    def _start(self) -> None:
        self._stream = TextStream(self._pieces)
        self._scanner = StopScanner(self._stops)
        self._splitter = Splitter(self._profile, prompt=self._prompt_text)
        self._split: Split | None = None

    @property
    def text(self) -> str:
        """All text that was shown."""
        return "".join(step.text for step in self.steps)

    @property
    def segment(self) -> Segment:
        """The part that the next token belongs to, as far as known."""
        return self._splitter.segment

    @property
    def stopped(self) -> tuple[FinishReason, str] | None:
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

    def add(
        self,
        token_id: int,
        text: str,
        *,
        logprob: float | None,
        entropy: float | None,
        is_injected: bool = False,
        seen: Seen | None = None,
        loop_scores: LoopScores | None = None,
    ) -> Step:
        """Append one token with the text it shows, and what was asked to be seen of its step."""
        top = () if seen is None else seen.top
        step = Step(
            index=len(self.steps),
            id=token_id,
            text=text,
            logprob=logprob,
            entropy=entropy,
            segment=self._splitter.feed(text),
            is_injected=is_injected,
            alternatives=tuple(Alternative(id=each, text=self._alone(each), logprob=value) for each, value in top),
            margin=None if seen is None else seen.margin,
            loop_scores=loop_scores,
            hidden={} if seen is None else seen.hidden,
        )
        self.steps.append(step)
        return step

    def inject(self, token_ids: Sequence[int]) -> list[Step]:
        """Append ids that were not drawn, up to one that completes a stop text; returns their Steps."""
        start = len(self.steps)
        for token_id in token_ids:
            self.add(token_id, self.release(token_id), logprob=None, entropy=None, is_injected=True)
            if self.stop_text is not None:
                break
        return self.steps[start:]

    def _alone(self, token_id: int) -> str:
        """The text of an id by itself; bytes that are no character alone become U+FFFD."""
        return self._pieces[token_id].decode("utf-8", "replace")

    def rewind(self, n_steps: int) -> None:
        """Go back to the first n_steps tokens; everything that follows from them is worked out again."""
        kept = self.steps[:n_steps]
        self.steps = []
        self._start()
        for step in kept:
            self.release(step.id)
            self._splitter.feed(step.text)
            self.steps.append(step)

    def split(self, *, is_final: bool, is_ended: bool) -> Split:
        """Thinking and answer. is_final: nothing is added any more. is_ended: the model ended its text itself."""
        if is_final:
            if self._split is None:
                self._split = self._splitter.finish(is_ended=is_ended)
            return self._split
        splitter = Splitter(self._profile, prompt=self._prompt_text)
        for step in self.steps:
            splitter.feed(step.text)
        return splitter.finish(is_ended=False)
