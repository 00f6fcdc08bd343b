"""Where a text is inside a quotation or a formula, as a state machine fed one character at a time.

Open are: "..." '...' “...” ‘...’ „...“ 「...」 『...』 «...» ‹...› 《...》, `code`, $...$, \\(...\\), \\[...\\], and
where asked for (...) and （...）, in which a text gives a name in its own letters. A mark or the end of the line
ends what is open. A straight mark right behind an ASCII letter, a digit or a backslash opens nothing: 5", f(x), \\$10.

Does not: nest (what was opened first counts until it is closed), or bound the length of a quotation; who uses it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["MARKS", "Quoting", "followed"]

_QUOTATIONS = {
    '"': '"', "'": "'", "“": "”", "‘": "’", "„": "“”", "「": "」", "『": "』", "«": "»", "‹": "›", "《": "》", "`": "`",
    "$": "$",
}  # fmt: skip
_BRACKETS = {"(": ")", "（": "）"}
_IN_BRACKETS: Mapping[str, str] = _QUOTATIONS | _BRACKETS
_FORMULA = "\0"  # closed by \) or \], never by one character

MARKS = frozenset("".join([*_IN_BRACKETS, *_IN_BRACKETS.values(), "\\[]\n"]))
"""Characters that may change more than what stands directly before the next one."""


class Quoting(NamedTuple):
    """Where a text is. closers: characters that end what is open, "" where nothing is. before: the kind of the last
    character where it matters: a backslash, "a" for an ASCII letter or digit, else ""."""

    closers: str = ""
    before: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the next character is quoted, or part of a formula."""
        return bool(self.closers)


def followed(state: Quoting, char: str, *, brackets: bool = False) -> Quoting:
    """The state behind one character more. brackets: round brackets open too.

    >>> state = Quoting()
    >>> for char in 'He said "ye':
    ...     state = followed(state, char)
    >>> state.is_open
    True
    """
    closers, before = state
    if char == "\n":
        return Quoting()
    if closers:
        is_over = char in closers or (before == "\\" and char in ")]")
        return Quoting() if is_over else Quoting(closers, "\\" if char == "\\" else "")
    if before == "\\" and char in "([":
        return Quoting(_FORMULA)
    opened = (_IN_BRACKETS if brackets else _QUOTATIONS).get(char, "")
    if opened and not (before and char.isascii()):
        return Quoting(opened)
    return Quoting("", "\\" if char == "\\" else "a" if char.isascii() and char.isalnum() else "")
