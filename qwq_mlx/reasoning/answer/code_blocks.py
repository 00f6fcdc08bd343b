"""Code blocks between ``` fences, by the lines of a text: whether one is open, what the last one held, and which is
the answer where code was asked for.

Does not: know languages, or read indented code. A fence that nobody closes keeps its block open until `close`.
"""

from __future__ import annotations

from qwq_mlx.reasoning.answer.cues import is_example
from qwq_mlx.reasoning.answer.rules import MARK
from qwq_mlx.reasoning.answer.split import Candidate, Place

__all__ = ["MAX_CODE", "CodeAnswer", "Fences"]

MAX_CODE = 16_384
"""Characters of a block that are kept."""


class Fences:
    """`take` for each whole line."""

    def __init__(self) -> None:
        self.is_open = False
        self._lines: list[str] = []
        self._n_chars = 0

    def take(self, line: str) -> str | None:
        """The next line, without its end; the block's text where this line closes one that is not blank."""
        if line.lstrip().startswith("```"):
            self.is_open = not self.is_open
            code = "\n".join(self._lines)[:MAX_CODE].strip("\n")
            self._lines, self._n_chars = [], 0
            return code if not self.is_open and code.strip() else None
        if self.is_open and self._n_chars <= MAX_CODE:
            self._lines.append(line)
            self._n_chars += len(line) + 1
        return None

    def close(self) -> None:
        """The block is over without a fence: a heading stands where code cannot."""
        self.is_open = False
        self._lines, self._n_chars = [], 0


class CodeAnswer:
    """The last code block that does not only show how the one before is used: `last`, None so far.

    is_asked_for: whether code can be the answer at all; without it only fences are followed.
    """

    def __init__(self, start: Place, *, is_asked_for: bool) -> None:
        self.fences = Fences()
        self.last: Candidate | None = None
        self._is_asked_for = is_asked_for
        self._block = start  # where the open block's conclusion began
        self._is_example = False

    def take(self, text: str, end: int, *, line: Place, before: tuple[str, Place]) -> None:
        """The next whole line, which begins at `line` and ends at the character `end`. before: the last line that was
        not blank, and where it began."""
        was_open = self.fences.is_open
        code = self.fences.take(text.removesuffix("\n"))
        if self.fences.is_open and not was_open:
            is_introduced = before[0].rstrip().endswith((":", "\uff1a"))
            self._block = before[1] if is_introduced else line
            self._is_example = is_example(before[0])
        if code is not None and self._is_asked_for and not (self._is_example and self.last is not None):
            self.last = Candidate("code", self._block, end)
            self.last.take(MARK["code"].read(code))
