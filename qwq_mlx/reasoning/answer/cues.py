"""Phrases that a text uses to doubt, announce, conclude and explain, by language, and the lines that they mark.

A phrase is one string in a tuple. It stands for itself at a word's end; one that ends in "…" for a word's beginning.
Regular expression syntax is allowed in it ("hmm+", "that(?:'s| is) wrong").

Does not: say what a line with such a phrase means for the answer; `rules` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "CONCLUDES",
    "MAX_LINE",
    "announces",
    "any_of",
    "begins_explanation",
    "corrects",
    "doubts",
    "is_bullet",
    "is_courtesy",
    "is_example",
    "is_remark",
    "is_separator",
    "part_of",
    "rejects",
]

MAX_LINE = 1024
"""Characters of a line that are read, from its end."""

Phrases = Mapping[str, tuple[str, ...]]
"""Phrases by language code."""

DOUBTS_STRICTLY: Phrases = {
    "en": ("wait", "hold on", "hmm+"),
    "zh": ("等等", "等一下", "不对"),
}
DOUBTS: Phrases = {
    "en": (
        *DOUBTS_STRICTLY["en"],
        *("actually", "but", "however", "alternatively", "no,…"),
        *("let me (?:re|double|check|verify|try)…", "let's (?:re|double|check|verify|try)…"),
        *("i (?:made|think i made) a mistake…", "that(?:'s| is) (?:not right|wrong|incorrect)…"),
    ),
    "zh": (*DOUBTS_STRICTLY["zh"], "不,", "但是", "让我"),
}
BEFORE_A_DOUBT: Phrases = {"en": ("oh", "ah", "hmm+", "no", "but", "and", "so", "well", "okay", "ok")}
CORRECTS: Phrases = {
    "en": (
        *DOUBTS_STRICTLY["en"],
        *("actually", "no", "correction", "corrected", "rather", "instead", "sorry", "oops", "i mean", "make that"),
        *("scratch that", "strike that", "on second thought", "in fact", "should be", "mistake", "wrong", "edit"),
        *("let me…", "let's…"),
    ),
    "zh": ("不对", "更正", "应该是", "应为"),
    "signs": ("[→⇒⟶➔➜]…", "[-=]+>…", r"\\(?:[lL]ong)?[rR]ightarrow", r"\\to"),
}
REJECTS: Phrases = {"en": ("not", "isn't", "instead of", "rather than"), "zh": ("不是", "而非")}
CONCLUDES: Phrases = {
    "en": (
        *("so", "thus", "therefore", "hence", "consequently", "in conclusion", "in (?:total|all|summary|short)"),
        *("finally", "altogether", "overall", "that means", "this means", "this gives", "that gives"),
        *("to summarize", "in the end"),
    ),
    "de": ("also", "daher", "somit", "folglich", "insgesamt"),
    "es": ("por lo tanto", "por tanto", "entonces", "así que", "en total"),
    "fr": ("donc", "ainsi", "par conséquent", "finalement", "au total"),
    "it": ("quindi", "dunque", "pertanto", "in totale"),
    "ja": ("したがって", "よって", "ゆえに", "だから"),
    "ko": ("따라서", "그러므로"),
    "pt": ("portanto", "logo", "então", "no total"),
    "ru": ("итак", "таким образом", "следовательно", "значит", "всего"),
    "vi": ("vậy", "do đó", "vì vậy"),
    "zh": (
        *("解得", "可得", "得到", "所以", "因此", "因而", "故", "于是", "综上", "总之", "最终"),
        *("这样", "共", "一共", "总共"),
    ),
}
EXPLAINS: Phrases = {
    "en": (
        *("explanation", "verification", "justification", "reasoning", "proof", "notes?", "remarks?", "checks?"),
        *("derivation", "steps?", r"step-by-step(?: \w+)?"),
    ),
    "zh": ("说明", "解释", "验证", "解析", "备注"),
}
SHOWS_USE: Phrases = {
    "en": (
        *("for example", "examples?", "usage", "sample", "output", "tests?", "calling it"),
        "(?:run|test|try|use|call) (?:it|this|the (?:code|function|class|program))",
    ),
    "zh": ("例如", "示例", "用法"),
}


def any_of(phrases: Phrases) -> str:
    """A regular expression that matches any of the phrases, in any of the languages.

    >>> any_of({"en": ("so", "no,…"), "zh": ("所以",)})
    '(?:so\\\\b|no,|所以)'
    """
    every = [phrase for each in phrases.values() for phrase in each]
    return f"(?:{'|'.join(_ended(phrase) for phrase in every)})"


def _ended(phrase: str) -> str:
    if phrase.endswith("…"):
        return phrase[:-1]
    return phrase + (r"\b" if phrase[-1].isascii() and phrase[-1] != "," else "")


def _doubt(phrases: Phrases) -> re.Pattern[str]:
    return re.compile(rf"^[\s>*_-]*(?:{any_of(BEFORE_A_DOUBT)},?\s+)?{any_of(phrases)}", re.IGNORECASE)


_DOUBTS, _DOUBTS_STRICTLY = _doubt(DOUBTS), _doubt(DOUBTS_STRICTLY)
_CORRECTS = re.compile(rf"(?<![A-Za-z]){any_of(CORRECTS)}", re.IGNORECASE)
_REJECTS = re.compile(rf"(?<![A-Za-z]){any_of(REJECTS)}[\s$\\(:\"“]*$", re.IGNORECASE)
_ANNOUNCES = re.compile(
    r"(?:\banswers?\b|\bcorrect (?:option|choice)|\b(?:final|correct) (?:result|solution)|答案)[^.!?\n]{0,60}[:：]\W*$"
    r"|\banswer is\s*$",
    re.IGNORECASE,
)
_EXPLAINS = re.compile(rf"[\s>*_#-]{{0,8}}{any_of(EXPLAINS)}[\s*_]*(?:[:：].*)?$", re.IGNORECASE | re.DOTALL)
_SHOWS_USE = re.compile(
    rf"\b{any_of({'en': SHOWS_USE['en']})}[^.]{{0,40}}[:：]\W*$|{any_of({'zh': SHOWS_USE['zh']})}", re.IGNORECASE
)
_REMARK = re.compile(
    r"[\s*_]*(?:so,? |and |yes,? |okay,? |alright,? )?"
    r"(?:i'm|i am|i think|i believe|i hope|i've|that|this|it|everything|yes|done)\b"
    r"[^\d$\\\"“`\n]{0,60}\b(?:confident|correct|right|sense|should be (?:it|all)|that's it|helps|double-checked"
    r"|checks? out|is it|done|sure)\b[^\d$\\\"“`\n]{0,30}[.!]\s*",
    re.IGNORECASE,
)
_COURTESY = re.compile(r"\W*(?:let me know|feel free|i hope|hope (?:this|that)|happy to help|please)\b", re.IGNORECASE)
_LABEL = re.compile(
    r"[\s>*_-]{0,8}(?:part|question|problem|item)?\s*[(（]?(?:(?P<letter>[a-h])|(?P<roman>i{1,3}|iv|vi{0,3})|(?P<number>\d))"
    r"[)）.:：][\s*_:]",
    re.IGNORECASE,
)
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")


def doubts(line: str, *, strictly: bool = False) -> bool:
    """Whether a line takes back or doubts what came before it.

    strictly: only by phrases that no explanation of a finished answer uses ("Wait", "Hold on", "Hmm").

    >>> doubts("But 7 is odd."), doubts("But 7 is odd.", strictly=True)
    (True, False)
    """
    return bool((_DOUBTS_STRICTLY if strictly else _DOUBTS).match(line[:200]))


def announces(line: str) -> bool:
    """Whether a line says that the answer follows on the next one: "Therefore, the correct answer is:"."""
    return bool(_ANNOUNCES.search(line[-MAX_LINE:]))


def begins_explanation(line: str) -> bool:
    """Whether a line is a heading such as "**Explanation**" or "Note: ...", after which an answer is only explained."""
    return bool(_EXPLAINS.match(line[:400]))


def corrects(between: str) -> bool:
    """Whether the text between two answers takes the first back: ". Wait, actually ", " → "."""
    return bool(_CORRECTS.search(between))


def rejects(between: str) -> bool:
    """Whether the text between two answers says that the second is none: ", not ", " instead of "."""
    return bool(_REJECTS.search(between))


def is_separator(between: str) -> bool:
    """Whether the text between two answers only joins them: ", ", " and ", " cm, y = "."""
    words = re.sub(r"\\[a-zA-Z]+", " ", between).casefold()
    return not re.search(r"[^\W\d_]{3,}", re.sub(r"\b(?:and|und|y|et|the|is|are)\b", " ", words))


def is_example(line: str) -> bool:
    """Whether a line says that code after it only shows how other code is used: "For example:", "Usage:"."""
    return bool(_SHOWS_USE.search(line[-200:]))


def is_remark(line: str) -> bool:
    """Whether a line says only that what came before it is right: "I'm confident in this answer."."""
    return len(line) <= 120 and bool(_REMARK.fullmatch(line)) and not re.search(r"\b[A-HJ]\b", line)


def is_courtesy(line: str) -> bool:
    """Whether a line only offers more help: "Let me know if ..."."""
    return bool(_COURTESY.match(line))


def is_bullet(line: str) -> bool:
    """Whether a line is an item of a list with bullets."""
    return line.lstrip().startswith(("- ", "* ", "• "))


def part_of(line: str) -> int | None:
    """The number of the part that a line begins, None for any other line.

    >>> part_of("(b) y = 2"), part_of("2. y = 2"), part_of("(ii) y = 2"), part_of("y = 2")
    (2, 2, 2, None)
    """
    label = _LABEL.match(line[:40])
    if label is None:
        return None
    if label["number"]:
        return int(label["number"]) or None
    if label["roman"]:
        return _ROMAN.index(label["roman"].lower()) + 1
    return ord(label["letter"].lower()) - ord("a") + 1
