"""Code blocks between ``` fences, by the lines of a text: whether one is open, and what the last one held.

Does not: know languages, or read indented code. A fence that nobody closes keeps its block open until `close`.
"""

from __future__ import annotations

__all__ = ["MAX_CODE", "Fences"]

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
