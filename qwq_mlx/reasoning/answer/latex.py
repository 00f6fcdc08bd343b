"""The tokens of a formula, in LaTeX or plain text: numbers, letters, commands and signs.

One spelling for what means the same: \\dfrac is \\frac, "π" is \\pi, "1,000" is 1000, 0.\\overline{3} is (1/3). Degrees
and percent signs are left out.

Does not: know what a formula means (`expression` does), or accept words: "east" would be a product of letters.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

__all__ = ["MAX_CHARS", "NotAFormula", "tokens_of"]

MAX_CHARS = 600
"""Characters of a formula; a longer text is none."""

_TOKEN = re.compile(
    r"\s+|(?P<based>\d+_(?:\{\d+\}|\d))|(?P<number>\d+(?:\.\d+)?[eE][-+]?\d{1,3}(?![\d.])|\d+\.?\d*|\.\d+)|(?P<command>\\[a-zA-Z]+)|(?P<letter>[a-zA-Z])"
    r"|(?P<sign>[-+*/^!(){}\[\]|_=,:']|\*\*)"
)
_WORDS = re.compile(
    r"\\?\b(sqrt|pi|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|frac|infty|infinity)(?![a-z])"
)


class NotAFormula(ValueError):  # noqa: N818 - it is an answer to a question, seldom an error
    """The text is no formula that this module understands."""


def tokens_of(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token. Raises NotAFormula where something else stands in it, or nothing does."""
    text = re.sub(r"\\(?:left|right|big|Big|displaystyle|,|!|;|:|quad|qquad| )(?![a-z])", " ", text)
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"(?<=\d),(?:\s*)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\d{1,20})\.(\d{0,20})\\(?:overline|dot|bar)\s*\{(\d{1,20})\}", _recurring, text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\circ|\\degree|°|(?<!%)\\?%(?!\\?%)", " ", text)
    text = text.replace("π", "\\pi ").replace("√", "\\sqrt ").replace("−", "-").replace("×", "*").replace("·", "*")
    text = re.sub(r"[¼-¾⅐-⅞]", _vulgar, text)
    text = text.replace("∞", "\\infty ").replace("²", "^2").replace("³", "^3").replace("**", "^")
    text = _WORDS.sub(lambda match: "\\" + ("infty" if match[1] == "infinity" else match[1]) + " ", text)
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotAFormula(f"{text[at]!r} at character {at}")
        if match.lastgroup:
            tokens.append((match.lastgroup, match[0]))
        at = match.end()
    # A word ("east", "even") would otherwise be a product of letters.
    run = "".join(token if kind == "letter" else " " for kind, token in tokens)
    if re.search(r"[a-zA-Z]{3}", run) or not tokens:
        raise NotAFormula("words")
    return tokens


def _vulgar(char: re.Match[str]) -> str:
    """½ as \\frac{1}{2}: behind a number it makes a mixed one."""
    value = Fraction(unicodedata.numeric(char[0])).limit_denominator(10)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _recurring(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, repeated = match.groups()
    value = Fraction(int(whole + fixed + repeated) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    return f"({value.numerator}/{value.denominator})"
