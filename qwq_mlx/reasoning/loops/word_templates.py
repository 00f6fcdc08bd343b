"""Words of a text that arrives in pieces, and their templates: numbers become "0", names "A", the rest lower case.

Two steps of a reasoning that differ in their numbers and names only have the same template. Code between fences and
table rows have none, because they repeat for good reasons.

What is in code, a table row or an open bracket is structured: it may repeat for as long as the structure asks.

Does not: know grammar. A name is a capitalised word inside a sentence, or one that was a name there before.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

__all__ = ["TemplateReader"]

_WORD = re.compile(r"[A-Za-z]{1,32}(?:'[a-z]{1,8})?|\d{1,24}(?:\.\d{1,24})?|```|\n|[^\W_]|[^\sA-Za-z\d]")
_OPEN = string.ascii_letters + string.digits + "'.`"  # what may go on at the end of a text
_REACH = 50  # no word above reads further than this, so what begins earlier is decided
_SENTENCE_ENDS = frozenset('.?!:;\n*"-([{$')
_BULLETS = frozenset("-*•#>")
_OPENING = frozenset("([{")
_CLOSING = frozenset(")]}")
_MAX_NAMES = 512


class TemplateReader:
    """Feed text; `feed` yields each completed word's template: "0", "A", a lower-case word, or a mark.

    word: the last word as written.
    is_label: whether it may number its line: only bullets and at most one word stand before it ("3.", "- Step 3:").
    n_lines: line ends so far.
    """

    def __init__(self) -> None:
        self._open = ""  # the beginning of a word that may go on
        self._previous = "\n"
        self.word = ""
        self.is_label = False
        self.n_lines = 0
        self._n_before = 0  # words of the line so far; a mark that is no bullet counts as two
        self._n_open = 0  # brackets open since the last blank line
        self._is_code = False
        self._is_table = False
        self._names: dict[str, None] = {}

    @property
    def is_code(self) -> bool:
        """Whether the last word stands between code fences."""
        return self._is_code

    @property
    def is_structured(self) -> bool:
        """Whether the last word stands in code, a table row or an open bracket."""
        return self._is_code or self._is_table or self._n_open > 0

    def feed(self, text: str) -> Iterator[str]:
        """Take the next piece."""
        text = self._open + text
        tail = text[-_REACH:]
        end = len(text) - len(tail) + len(tail.rstrip(_OPEN))
        at = 0
        for word_match in _WORD.finditer(text):
            if word_match.end() > end and word_match.start() > len(text) - _REACH:
                break
            at = word_match.end()
            template = self._template(word_match[0])
            if template:
                yield template
        self._open = text[max(at, end) :]

    def _template(self, word: str) -> str | None:
        previous, self._previous = self._previous, word
        self.word, self.is_label = word, self._n_before < 2
        if word == "```":
            self._is_code = not self._is_code
            return None
        if word == "\n":
            self.n_lines += 1
            self._n_before = 0
            self._is_table = False
            if previous == "\n":
                self._n_open = 0
            return None
        if word not in _BULLETS:
            self._n_before += 1 if word[0].isalnum() else 2
        if word in _OPENING:
            self._n_open += 1
        elif word in _CLOSING:
            self._n_open = max(0, self._n_open - 1)
        if word == "|" and previous == "\n":
            self._is_table = True
        if self._is_code or self._is_table:
            return None
        if word[0].isdecimal():
            return "0"
        if word[0].isupper() and word != "I" and not word.startswith("I'"):
            if word in self._names:
                return "A"
            if previous not in _SENTENCE_ENDS and previous != "```":
                if len(self._names) >= _MAX_NAMES:
                    del self._names[next(iter(self._names))]
                self._names[word] = None
                return "A"
        return word.lower()
