"""A text that is being written, told apart as clients read it: first the thinking, then the answer.

Where the answer begins is known only once its mark is complete (`**Final Answer**`, a box, a tag). A line that may
become such a mark is therefore held back, so that a mark reaches the client in the answer alone. Where the answer
turns out to begin in text that was sent as thinking already (a sentence with a box in it, a last paragraph), that text
is sent again as its beginning, so that the answer is whole. Stop texts are looked for in the answer only.

Does not: know ids, or decide where the answer begins (`reasoning.answer` does).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from qwq_mlx.engine.detokenizer import StopScanner

__all__ = ["Piece", "ReplyText"]

_MAX_HELD = 48  # characters of a line that may become a heading
_HELD = re.compile(r" ?(?:[*#\\最答]|(?:the )?final)", re.IGNORECASE)
_OPEN_TAG = re.compile(r"<[^>\n]{0,12}$")


class Piece(NamedTuple):
    """What may be sent now. reasoning_end, content_span: the same in characters of the whole text."""

    reasoning: str
    content: str
    reasoning_end: int
    content_span: tuple[int, int]


class ReplyText:
    """Feed it what each step writes; `finish` at the end.

    stops: texts that end the answer; `stop_text` is the one that came.
    is_raw: everything is answer.
    close_tag: what the model closes its thinking with, None for a model without tags.
    """

    def __init__(self, stops: tuple[str, ...] = (), *, is_raw: bool = False, close_tag: str | None = None) -> None:
        self.text = ""
        self.content = ""
        self.stop_text: str | None = None
        self._is_raw, self._close_tag = is_raw, close_tag
        self._stops = stops
        self._scanner = StopScanner(stops)
        self._reasoning_end = 0  # characters that were sent as thinking, or left out of it
        self._thought_end = 0  # characters up to the last that were sent as thinking
        self._content_end = 0  # characters that the scanner of stop texts has seen
        self._span = (0, 0)  # characters of the answer that were sent, since it began
        self._is_in_answer = False

    def feed(self, text: str, answer_char: int | None, thinking_char: int = 0) -> Piece:
        """Take more text. answer_char: where the answer begins as far as known, None in the thinking.

        thinking_char: where the thinking begins.
        """
        self.text += text
        self._reasoning_end = max(self._reasoning_end, thinking_char)
        if self._is_raw:
            answer_char = 0
        reasoning = content = ""
        if answer_char is None:
            if self._is_in_answer:
                content = self._leave_answer()
            reasoning = self._think_until(len(self.text) - self._n_held())
        else:
            if not self._is_in_answer:
                reasoning = self._think_until(self._without_tag(answer_char))
                self._begin_answer(answer_char)
            content = self._answer()
        return self._piece(reasoning, content)

    def finish(self, conclusion_char: int | None) -> Piece:
        """The rest, now that the text is whole. conclusion_char: where its answer begins, None where it has none."""
        reasoning = content = ""
        if not self._is_in_answer:
            reasoning = self._think_until(
                len(self.text) if conclusion_char is None else self._without_tag(conclusion_char)
            )
            if conclusion_char is not None and conclusion_char >= self._content_end and self.stop_text is None:
                self._begin_answer(conclusion_char)
                content = self._answer()
        if self._is_in_answer:
            content += self._leave_answer()
        return self._piece(reasoning, content)

    def _piece(self, reasoning: str, content: str) -> Piece:
        self.content += content
        return Piece(reasoning, content, self._thought_end, self._span)

    def _think_until(self, end: int) -> str:
        start, self._reasoning_end = self._reasoning_end, max(self._reasoning_end, end)
        self._thought_end = self._reasoning_end
        return self.text[start:end]

    def _without_tag(self, end: int) -> int:
        """Where the thinking ends that is followed by the answer at `end`."""
        has_tag = bool(self._close_tag) and self.text.endswith(self._close_tag or "", 0, end)
        return end - len(self._close_tag or "") if has_tag else end

    def _begin_answer(self, start: int) -> None:
        self._is_in_answer = True
        self._content_end = max(self._content_end, start)
        self._span = (self._content_end, self._content_end)

    def _answer(self) -> str:
        """What of the new text is sent as answer, its stop text and the blank lines before it left out."""
        if self.stop_text is not None:
            return ""
        start = self._content_end
        if not self._is_raw and self._span == (start, start):
            start += len(self.text) - start - len(self.text[start:].lstrip("\n"))
            self._span = (start, start)
        self._content_end = self._reasoning_end = len(self.text)
        released = self._scanner.feed(self.text[start:])
        self.stop_text = released.hit
        return self._sent(released.text)

    def _leave_answer(self) -> str:
        self._is_in_answer = False
        held = "" if self.stop_text is not None else self._scanner.finish()
        self._scanner = StopScanner(self._stops)
        return self._sent(held)

    def _sent(self, content: str) -> str:
        self._span = (self._span[0], self._span[1] + len(content))
        return content

    def _n_held(self) -> int:
        """Characters at the end that may be the beginning of a mark."""
        line = self.text[max(self.text.rfind("\n") + 1, len(self.text) - _MAX_HELD - 1) :]
        if len(line) <= _MAX_HELD and _HELD.match(line):
            return len(line)
        tag = _OPEN_TAG.search(line) if self._close_tag else None
        return 0 if tag is None else len(tag[0])
