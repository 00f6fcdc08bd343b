"""Budget forcing (s1's term): ending the thinking of a model that writes no tags: when, and with which ids.

Asked for at some token, the cut waits for the end of a paragraph; after half of CUE_PATIENCE the end of a line or of a
sentence will do, and after all of it the cue comes in any case. A model that has begun its answer meanwhile is left
alone.

Does not: feed the ids (`run` says so, and the engine does), or know why the answer is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwq_mlx.model.tokenizer import LoadedTokenizer
from qwq_mlx.options import CUE_PATIENCE, Thinking
from qwq_mlx.reasoning.answer import Segment
from qwq_mlx.reasoning.profile import Profile
from qwq_mlx.trace.trace import FinishReason, Step

__all__ = ["BudgetForcing", "PendingCue", "box_ids", "cue_ids"]

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*$")
# a full stop behind a digit may be the point of a number
_SENTENCE_END = re.compile(r"(?:(?<!\d)[.!?]['\")\]]*|[.!?]\s|[。！？]['\")\]]*|\n)\s*$")
_TAIL = 64  # characters of the latest text, enough for any end of a sentence

PendingCue = tuple[FinishReason, int]
"""Why the answer was asked for, and after how many drawn tokens."""


class BudgetForcing:
    """Decides when the answer is asked for; at most once in a run.

    due_at_once: why the cue comes before anything is drawn: "budget" where the budget is 0, else None.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._budget = thinking.think_tokens
        self._n_tokens = 0
        self._reason: FinishReason | None = None
        self._asked_at = 0
        self._tail = ""
        self.due_at_once: FinishReason | None = "budget" if thinking.think_tokens == 0 else None
        self._is_over = self.due_at_once is not None

    def ask(self, reason: FinishReason) -> None:
        """Ask for the answer from now on; the first reason given stays. Safe to call from a signal handler."""
        if self._reason is None:
            self._reason, self._asked_at = reason, self._n_tokens

    def ask_at_once(self) -> None:
        """Ask for the answer before anything more is drawn."""
        self._is_over, self.due_at_once = True, "answered"

    def feed(self, step: Step, segment: Segment) -> FinishReason | None:
        """Take a drawn token and the part that follows it; the reason, once, where the cue belongs after it."""
        self._n_tokens += 1
        self._tail = (self._tail + step.text)[-_TAIL:]
        if self._is_over or segment == "answer":
            return None
        if self._budget is not None and self._n_tokens >= self._budget:
            self.ask("budget")
        if self._reason is None:
            return None
        n_waited = self._n_tokens - self._asked_at
        is_sentence = 2 * n_waited >= CUE_PATIENCE and _SENTENCE_END.search(self._tail) is not None
        if is_sentence or n_waited >= CUE_PATIENCE or _PARAGRAPH_END.search(self._tail):
            self._is_over = True
            return self._reason
        return None

    def rewind(self, steps: Sequence[Step]) -> None:
        """Stand where `feed` had taken the drawn ones of these steps, and no more."""
        texts = [step.text for step in steps if not step.is_injected]
        self._n_tokens, self._tail = len(texts), "".join(texts[-_TAIL:])[-_TAIL:]

    def dump(self) -> PendingCue | None:
        """What was asked for and not yet done."""
        return None if self._is_over or self._reason is None else (self._reason, self._asked_at)

    def load(self, pending: PendingCue | None, *, is_over: bool) -> None:
        """Take over what a saved run had asked for, after `rewind` to its steps. is_over: the cue was written."""
        self._reason, self._asked_at = pending or (None, 0)
        if is_over or self._n_tokens:  # else nothing was drawn, and a budget of 0 is due as in a new run
            self._is_over, self.due_at_once = is_over, None


def cue_ids(tokenizer: LoadedTokenizer, profile: Profile, *, after: str) -> list[int]:
    """Ids of the profile's answer cue, on a paragraph of its own. after: the last two characters before it.

    The cue is this package's own text, so its tags become control ids, which a user's text never does.
    """
    return _own_paragraph(tokenizer, profile.cue, after)


def box_ids(tokenizer: LoadedTokenizer, profile: Profile, *, after: str, is_closed: bool) -> list[int]:
    """The same of a cue that opens the answer's box. is_closed: whether a tag has closed the thinking already."""
    return _own_paragraph(tokenizer, profile.request_for_box(is_closed=is_closed), after)


def _own_paragraph(tokenizer: LoadedTokenizer, text: str, after: str) -> list[int]:
    gap = "" if after.endswith("\n\n") else "\n" if after.endswith("\n") else "\n\n"
    ids: list[int] = tokenizer.hf.backend_tokenizer.encode(gap + text, add_special_tokens=False).ids
    return ids
