"""Find an answer's marks in a text that arrives in pieces: headings, boxes, answer tags, thinking tags, line ends.

The idea: one regular expression whose every alternative is decided by its last character and begins no other one.
Searching again from the last `_REACH` characters then finds the same marks however the text is cut, at a constant cost
per piece. Positions are characters of the whole text.

Does not: keep more than `_KEPT` characters, or decide which mark is the answer; `precedence` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MAX_VALUE", "Mark", "Scanner"]

MAX_VALUE = 2048
"""Characters that the content of a box or an answer tag may have; a longer one is none."""
_REACH = 48
_KEPT = 4096
_HEADING = (
    r"(?:\*\*|#{1,4} ?(?:\*\*)?)(?:step \d{1,2}[:.] ?)?(?:the )?"
    r"(?:final (?:answer|solution|result|code)|answer[*:]|最终答案|答案|最终解答)"
    r"|\\(?:text|math)bf\{final answer"
)
_HEADING_LINE = re.compile(
    r"#{1,4} ?answer\s*|(?:the )?final (?:answer|solution):?\s*|最终答案[:：]?\s*", re.IGNORECASE
)


# Tags around a thinking, where the profile knows none. They count at both ends of a line, behind
# a sentence, and anywhere in a text that begins with one.
_THINKING_END = (
    r"(?:(?:</|\[/|◁/)[a-z_:]{0,10}(?:think|thought|reason|reflect|analysis|scratchpad)[a-z_]{0,12}[>\]▷]"
    r"|<\|end_(?:of_)?(?:think|thought)[a-z]{0,4}\|>)"
)
_THINKING_BEGINS = re.compile(
    r"\s*(?:[<\[◁][a-z_:]{0,10}(?:think|thought|reason|reflect|analysis|scratchpad)|<\|(?:begin|start)_)", re.IGNORECASE
)
_THINKING_ENDS = re.compile(rf"{_THINKING_END}[ \t]*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Mark:
    """One mark.

    kind: "heading", "box", "tag", "open", "close", "sentence" or "line".
    start, end: in characters of the whole text, end not included.
    value: a box's or tag's content, a line's text (its last 4,096 characters).
    """

    kind: str
    start: int
    end: int
    value: str = ""


class Scanner:
    """Feed text in any pieces; `feed` yields each mark as soon as its last character is there.

    open_tag, close_tag: the thinking's tags, or None. answer_tags: names (lower case) of tags asked for by the prompt.
    """

    def __init__(self, *, open_tag: str | None, close_tag: str | None, answer_tags: tuple[str, ...]) -> None:
        names = "|".join(re.escape(name) for name in answer_tags) or r"\b\B"
        opening = re.escape(open_tag) if open_tag else r"\b\B"
        closing = re.escape(close_tag) if close_tag else _THINKING_END
        parts = [
            rf"(?P<open>{opening})",
            rf"(?P<close>{closing})",
            rf"(?P<begin>[<\[]/?)(?P<name>{names})[>\]]",
            rf"(?P<heading>(?<![^\n])[ ]?(?:{_HEADING}))",
            r"(?P<box>(?:\\f?box(?:ed)?|(?<![\\a-z])boxed) ?\{)",
            r"(?P<escape>\\[\\{}])",
            r"(?P<brace>[{}])",
            r"(?P<sentence>[.!?] )",
            r"(?P<line>\n)",
        ]
        self._is_untagged = close_tag is None
        self._marks = re.compile("|".join(parts), re.IGNORECASE)
        self._kept = self._head = ""
        self._base = 0  # characters before `_kept`
        self._next = 0  # where the search goes on, in characters of the whole text
        self._line = 0  # where the current line began
        self._depth = 0  # open braces of the current box; 0: none
        self._box = 0  # where the box and its content began
        self._content = 0
        self._tag: tuple[int, int, str] | None = None  # start, start of content, name
        self.n_chars = 0

    @property
    def line(self) -> str:
        """The current unfinished line, at most its last 4,096 characters."""
        return self._slice(self._line, self.n_chars)

    @property
    def is_inside(self) -> bool:
        """Whether a box or an answer tag is open."""
        return self._depth > 0 or self._tag is not None

    @property
    def open_tag_text(self) -> str:
        """What an unclosed answer tag contains so far, or ""."""
        return self._slice(self._tag[1], self.n_chars) if self._tag else ""

    def tail(self, start: int) -> str:
        """The text from a character on, as far as it is kept."""
        return self._slice(start, self.n_chars)

    def feed(self, text: str) -> Iterator[Mark]:
        """Take the next piece and yield the marks completed by it, in order."""
        self._kept += text
        self._head += text[: _REACH - len(self._head)]
        self.n_chars += len(text)
        while match := self._marks.search(self._kept, self._next - self._base):
            self._next = self._base + match.end()
            yield from self._one(match)
        self._next = max(self._next, self.n_chars - _REACH)
        self._forget(self.n_chars)
        if len(self._kept) > 2 * _KEPT:  # cut rarely: the cost of a cut is spread over `_KEPT` characters
            self._base += len(self._kept) - _KEPT
            self._kept = self._kept[-_KEPT:]

    def _one(self, match: re.Match[str]) -> Iterator[Mark]:
        kind = match.lastgroup or ""
        start, end = self._base + match.start(), self._base + match.end()
        self._forget(end)
        if kind == "line":
            if _HEADING_LINE.fullmatch(self._slice(self._line, start)):
                yield Mark("heading", self._line, start)
            if not self._slice(self._line, start).strip():
                self._depth = 0  # a blank line ends a box that nobody closed
            line, line_start, self._line = self._slice(self._line, start), self._line, end
            yield Mark("line", line_start, end, line)
            if self._is_untagged and (tag := _THINKING_ENDS.search(line[-_REACH:])):
                self._depth, self._tag = 0, None
                yield Mark("close", start - len(tag[0]), end)
        elif kind == "close" and self._is_untagged and not self._closes_thinking(start):
            pass  # a text that only speaks of the tag
        elif kind in ("heading", "open", "close"):
            self._depth, self._tag = 0, None
            yield Mark(kind, start, end)
        elif kind == "name":
            yield from self._answer_tag(match, start, end)
        elif kind == "sentence" and not self._depth:
            yield Mark("sentence", start, end)
        elif kind == "box" and not self._depth:
            self._depth, self._box, self._content = 1, start, end
        elif self._depth and kind in ("box", "brace"):
            self._depth += -1 if match[0] == "}" else 1
            if not self._depth:
                yield Mark("box", self._box, end, self._slice(self._content, end - 1))

    def _closes_thinking(self, start: int) -> bool:
        """Whether a tag that no profile names is meant: behind a sentence, or in a text that began with a tag."""
        before = self._slice(start - 1, start)
        return start == self._line or before in (".", "!", "?", "}", "。") or bool(_THINKING_BEGINS.match(self._head))

    def _answer_tag(self, match: re.Match[str], start: int, end: int) -> Iterator[Mark]:
        name = match["name"].lower()
        if match["begin"] in "<[":
            self._tag = (start, end, name)
        elif self._tag and self._tag[2] == name:
            yield Mark("tag", self._tag[0], end, self._slice(self._tag[1], start))
            self._tag = None

    def _forget(self, end: int) -> None:
        """Give up a box or tag that is too long by the character `end`: the same in one piece as in many."""
        if self._depth and end - self._content > MAX_VALUE:
            self._depth = 0
        if self._tag and end - self._tag[1] > MAX_VALUE:
            self._tag = None

    def _slice(self, start: int, end: int) -> str:
        return self._kept[max(0, start - self._base) : max(0, end - self._base)][-_KEPT:]
