"""A thinking budget for a model without tags: when to end its thinking, what to put in, and when to end its answer.

A small state machine. From `think_tokens` on it waits for a good place to cut, which is the end of a paragraph, then
of a line or sentence, and after `patience_tokens` any place. Then `generate` puts the profile's cue into the output as
ids, and from there on the answer may take `answer_tokens`. `ask()` starts the same at any time ("answer now").

Does not: encode the cue, know what is thinking (it is told the segment), or stop a run; its caller acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwq_mlx.errors import OptionError
from qwq_mlx.reasoning.profile import Profile
from qwq_mlx.reasoning.split import Segment

__all__ = ["Action", "Budget", "BudgetOptions", "Cut"]

Action = Literal["continue", "inject", "stop"]
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", ":", "：")
_KEPT = 64  # characters of the output's end that decide whether this is a good place


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetOptions:
    """How long thinking and a forced answer may be, in tokens.

    think_tokens: thinking after which the answer is asked for; None: no limit. patience_tokens: how many more to wait
    for the end of a sentence. answer_tokens: room for the answer once it was asked for.
    Raises OptionError for a value that cannot be honoured.
    """

    think_tokens: int | None = None
    patience_tokens: int = 64
    answer_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.think_tokens is not None and self.think_tokens < 0:
            raise OptionError(
                f"think_tokens is {self.think_tokens}, expected 0 or more, or None for no limit. "
                "With 0 the answer is asked for at once."
            )
        if not 0 <= self.patience_tokens <= 4096:
            raise OptionError(f"patience_tokens is {self.patience_tokens}, expected 0 to 4096. The default is 64.")
        if self.answer_tokens < 1:
            raise OptionError(
                f"answer_tokens is {self.answer_tokens}, expected at least 1. An answer needs room; leave it at 1024."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where and why thinking was ended.

    at: output tokens before the cue. place: what ended there. asked: "budget", or the caller's own word ("answer_now").
    """

    at: int
    place: Literal["paragraph", "line", "sentence", "anywhere"]
    asked: str


class Budget:
    """Follows one output. `feed` is called once per generated token and says what to do before the next one.

    After "inject" the caller puts `cue` into the output and reports the cue's tokens with `injected`, not with `feed`.
    """

    def __init__(self, profile: Profile, options: BudgetOptions | None = None) -> None:
        self._options = options or BudgetOptions()
        self._profile = profile
        self._end = ""  # the last characters of the output
        self._n_tokens = 0
        self._n_thinking = 0
        self._waiting: str | None = None  # who asked for the answer
        self._n_waited = 0
        self._n_answer: int | None = None  # tokens since the cue
        self.cut: Cut | None = None
        if self._options.think_tokens == 0:
            self._waiting = "budget"

    @property
    def is_spent(self) -> bool:
        """Whether the answer was asked for."""
        return self.cut is not None

    @property
    def cue(self) -> str:
        """The text to put in: the profile's cue, on a line of its own after a blank one."""
        if not self._end.strip():
            return self._profile.cue
        n_breaks = len(self._end) - len(self._end.rstrip("\n"))
        return "\n" * max(0, 2 - n_breaks) + self._profile.cue

    def start(self) -> Action:
        """What to do before the first token: "inject" with a budget of 0."""
        return self._inject("paragraph") if self._waiting else "continue"

    def ask(self, why: str = "answer_now") -> None:
        """Ask for the answer at the next good place, whatever the budget; without effect once it was asked for."""
        if self.cut is None and self._waiting is None:
            self._waiting = why

    def feed(self, text: str, segment: Segment) -> Action:
        """Take one generated token's text and the segment it belongs to.

        Returns "inject" (put `cue` in now), "stop" (the answer has had its room) or "continue".
        """
        self._n_tokens += 1
        self._end = (self._end + text)[-_KEPT:]
        if self._n_answer is not None:
            self._n_answer += 1
            return "stop" if self._n_answer >= self._options.answer_tokens else "continue"
        if segment == "answer":
            # The model concluded by itself; what it was asked for is under way.
            if self._waiting is not None and self._waiting != "budget":
                self._waiting = None
            return "continue"
        self._n_thinking += 1
        limit = self._options.think_tokens
        if self._waiting is None and limit is not None and self._n_thinking >= limit:
            self._waiting = "budget"
        if self._waiting is None:
            return "continue"
        place = self._place()
        is_good = place == "paragraph" or (place != "anywhere" and 2 * self._n_waited >= self._options.patience_tokens)
        if is_good or self._n_waited >= self._options.patience_tokens:
            return self._inject(place)
        self._n_waited += 1
        return "continue"

    def injected(self, n_tokens: int) -> None:
        """Count the cue's tokens, which stand in the output but were not generated."""
        self._n_tokens += n_tokens

    def _inject(self, place: Literal["paragraph", "line", "sentence", "anywhere"]) -> Action:
        self.cut = Cut(at=self._n_tokens, place=place, asked=self._waiting or "budget")
        self._waiting = None
        self._n_answer = 0
        return "inject"

    def _place(self) -> Literal["paragraph", "line", "sentence", "anywhere"]:
        """What ends where the output ends."""
        end = self._end.rstrip(" \t")
        if end.endswith("\n\n"):
            return "paragraph"
        if end.endswith("\n"):
            return "line"
        return "sentence" if end.endswith(_SENTENCE_ENDS) else "anywhere"
