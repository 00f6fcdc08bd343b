"""The choices that a prompt lists, and which of them an answer in words repeats.

Does not: know whether a choice is right, or understand paraphrases: a choice's own words must come back.
"""

from __future__ import annotations

import re

__all__ = ["Choices", "choose", "named_letter", "offered"]

Choices = tuple[tuple[str, str], ...]
"""(label, plain text) of each choice, in order: ("C", "jupiter")."""

# \uff08 \uff09 \uff0e \uff1a: parentheses, full stop and colon as Chinese writes them
_LISTED = re.compile(
    r"^[ \t>*-]*[(\uff08]?([A-J]|\d{1,2})(?:[.):][ \t]+|[)\uff09、\uff0e\uff1a][ \t]*)(\S[^\n]{0,300})$", re.MULTILINE
)
_LETTER = r"(?<![\w(\uff08])(?:[(\uff08][A-J][)\uff09]|[A-J][.)\uff09、\uff0e])"
_IN_LINE = re.compile(rf"(?={_LETTER})[(\uff08]?([A-J])[.)\uff09、\uff0e][ \t]*(\S(?:(?!{_LETTER})[^\n]){{0,300}})")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_ORDINAL = re.compile(
    rf"(?:the )?({'|'.join(_ORDINALS)})(?: (?:option|choice|answer|statement|one)\b.*)?", re.I | re.DOTALL
)
_LETTERED = re.compile(r"(?:\(|\b[Oo]ption |\b[Cc]hoice |选项?)\s*([A-J])(?![A-Za-z'’])")
_BARE = re.compile(r"(?<![A-Za-z'’-])([B-HJ])(?![A-Za-z'’-])")
_MAX_OFFER = 8_000  # characters at a prompt's end in which its choices stand
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")  # each Han character is a word


def offered(prompt: str) -> Choices:
    """The choices that a prompt lists, one a line or (lettered ones) within a line: "2. Anna is Carl's child." gives
    ("2", "anna is carl child").

    Labels must run on from 1 or A without a gap; the last such list counts. Empty where there is none.
    """
    prompt = prompt[-_MAX_OFFER:]
    listed = _run(_LISTED.findall(prompt))
    return listed or _run(_IN_LINE.findall(prompt))


def choose(value: str, choices: Choices, *, is_part: bool = False) -> str | None:
    """The label of the one choice whose text a value repeats, or that it names ("the first option"); None where no
    choice or more than one fits. is_part: the choice may stand anywhere in the value."""
    if not choices:
        return None
    ordinal = _ORDINAL.fullmatch(value.strip())
    if ordinal and _ORDINALS.index(ordinal[1].lower()) < len(choices):
        return choices[_ORDINALS.index(ordinal[1].lower())][0]
    plain = f" {_plain(re.sub(r'^[(]?(?:[A-J]|[0-9]{1,2})[.):] +', '', value.strip()))} "
    named = re.fullmatch(r"(.+?)\s*[(\uff08]([A-J])[)\uff09]", value.strip(), re.DOTALL)
    if named and f" {_plain(named[1])} " in {f" {text} " for label, text in choices if label == named[2]}:
        return named[2]
    fitting = [label for label, text in choices if plain == f" {text} " or (is_part and f" {text} " in plain)]
    return fitting[0] if len(fitting) == 1 else None


def named_letter(text: str, choices: Choices, *, is_bare: bool) -> str | None:
    """The one label among a prompt's choices that a sentence names by its letter: "(B)", "option B".

    is_bare: a letter alone counts too, but for "A" and "I", which are words.
    """
    labels = {label for label, _ in choices if label.isalpha()}
    named = {found[1] for found in _LETTERED.finditer(text)} & labels
    if is_bare:
        named |= set(_BARE.findall(text)) & labels
    return named.pop() if len(named) == 1 else None


def _run(found: list[tuple[str, str]]) -> Choices:
    """The last run of labels from 1 or A on."""
    run: list[tuple[str, str]] = []
    for label, text in found:
        if label in ("1", "A"):
            run = []
        expected = chr(ord("A") + len(run)) if label.isalpha() else str(len(run) + 1)
        if label == expected and (not run or run[0][0].isalpha() == label.isalpha()):
            run.append((label, _plain(text)))
    return tuple(run) if len(run) > 1 else ()


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold().replace("'s", "").replace("’s", "")))
