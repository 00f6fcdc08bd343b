"""Parts of an answer: lines that begin one ("(a) ...", "2. ..."), boxes side by side, and the line that begins an
explanation of an answer given before.

Does not: know how many parts a question has.
"""

from __future__ import annotations

import re

__all__ = ["begins_explanation", "is_example", "is_item", "is_remark", "joined", "part_of"]

_LABEL = re.compile(
    r"[\s>*_-]{0,8}(?:part|question|problem|item)?\s*[(\uff08]?(?:(?P<letter>[a-h])|(?P<roman>i{1,3}|iv|vi{0,3})|(?P<number>\d))"
    r"[)\uff09.:\uff1a][\s*_:]",
    re.IGNORECASE,
)
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")
_EXAMPLE = re.compile(
    r"\b(?:for example|examples?|usage|sample|(?:run|test|try|use|call) (?:it|this|the (?:code|function|class|program))"
    r"|output|tests?|calling it)\b[^.]{0,40}[:\uff1a]\W*$|例如|示例|用法",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"[\s*_]*(?:so,? |and |yes,? |okay,? |alright,? )?"
    r"(?:i'm|i am|i think|i believe|i hope|i've|that|this|it|everything|yes|done)\b"
    r"[^\d$\\\"“`\n]{0,60}\b(?:confident|correct|right|sense|should be (?:it|all)|that's it|helps|double-checked"
    r"|checks? out|is it|done|sure)\b[^\d$\\\"“`\n]{0,30}[.!]\s*",
    re.IGNORECASE,
)
_EXPLAINS = re.compile(
    r"[\s>*_#-]{0,8}(?:explanation|verification|justification|reasoning|proof|notes?|remarks?|checks?|derivation"
    r"|steps?|step-by-step(?: \w+)?|说明|解释|验证|解析|备注)[\s*_]*(?:[:\uff1a].*)?$",
    re.IGNORECASE | re.DOTALL,
)


def part_of(line: str) -> int | None:
    """The number of the part that a line begins: 2 for "(b) ...", "2. ..." and "(ii) ...". None for any other line."""
    found = _LABEL.match(line[:40])
    if found is None:
        return None
    if found["number"]:
        return int(found["number"]) or None
    if found["roman"]:
        return _ROMAN.index(found["roman"].lower()) + 1
    return ord(found["letter"].lower()) - ord("a") + 1


def is_item(line: str) -> bool:
    """Whether a line is an item of a list with bullets."""
    return line.lstrip().startswith(("- ", "* ", "• "))


def joined(first: str, between: str, second: str) -> str:
    """Two boxes side by side as one answer; only the second where it says the first again: "=", "or"."""
    between = between.strip(" $")
    is_again = between.startswith(("=", "\\approx")) or (between.startswith("or") and "=" not in between)
    return second if first == second or is_again else f"{first}, {second}"


def is_remark(line: str) -> bool:
    """Whether a line says only that what stands before it is right (I'm confident in this answer)."""
    return len(line) <= 120 and bool(_REMARK.fullmatch(line)) and not re.search(r"\b[A-HJ]\b", line)


def is_example(line: str) -> bool:
    """Whether a line says that code after it only shows how other code is used: "For example:", "Usage:"."""
    return bool(_EXAMPLE.search(line[-200:]))


def begins_explanation(line: str) -> bool:
    """Whether a line is a heading such as "**Explanation**" or "Note: ...", after which an answer is only explained."""
    return bool(_EXPLAINS.match(line[:400]))
