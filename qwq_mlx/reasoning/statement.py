"""Sentences that state an answer: "So the correct answer is option 2.", "**Answer:** B", "答案是 5".

One line of text goes in, the stated value comes out, or None. Patterns are linear: no nested repetition, and a line is
cut at `MAX_LINE` characters, so a hostile line costs no more than a long one.

Does not: judge whether the statement is final, or understand negation beyond "is not"; `split` weighs what it finds.
"""

from __future__ import annotations

import re

__all__ = ["MAX_LINE", "announces", "choose", "offered", "requested_tags", "revises", "stated", "unmarked"]

MAX_LINE = 1024
"""Characters of a line that are looked at, from its end."""

_NOUN = r"(?:answer|option|choice|solution|result|conclusion)"
_IS = r"(?:is|are|was|should be|must be|would be|will be|has to be|seems to be|appears to be|remains|becomes)"
_STATED = re.compile(
    rf"\b(?:the|my|our|this)\s+(?:(?:final|correct|right|best|only|required|desired|overall|same)\s+){{0,2}}{_NOUN}"
    rf"(?:\s+(?:here|then|to (?:the|this) (?:question|problem)|for (?:the|this) (?:question|problem)))?,?\s+"
    rf"(?:(?:indeed|still|clearly|definitely|simply|therefore|thus|probably|likely)\s+)?{_IS}(?![\w-])"
    r"(?:\s+(?:indeed|still|clearly|definitely|simply|that|therefore|thus|probably|likely|just))*"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_LABELLED = re.compile(
    r"^[\s>#*_-]*(?:(?:final|correct|the|my)\s+){0,2}(?:answer|solution|result)[\s*_]*[:=][\s*_]*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_JSON = re.compile(r'"(?:final_)?answer"\s*:\s*(?P<rest>"(?:[^"\\]|\\.)*"|[-\w.]+)', re.IGNORECASE)
_CHOSEN = re.compile(
    r"\b(?:option|choice)\s+\(?(?P<rest>[A-J]|\d{1,2})\)?(?:\s+(?:is|seems|must be|should be|would be)\s+(?:\w+\s+)?"
    r"(?:correct|right|the (?:correct|right|best)\s+\w+)|\s*[.!]?\s*$)",
    re.IGNORECASE,
)
_CHINESE = re.compile(r"(?:最终|正确)?(?:答案|结果)(?:应该|应当|就)?(?:是|为|:|:)\s*(?P<rest>\S.*)", re.DOTALL)

_REVISES = re.compile(
    r"^[\s>*_-]*(?:(?:oh|ah|hmm+|no|but|and|so|well|okay|ok),?\s+)?"
    r"(?:wait\b|hold on\b|hmm+\b|actually\b|but\b|however\b|alternatively\b|no,|let me (?:re|double|check|verify|try)"
    r"|let's (?:re|double|check|verify|try)|i (?:made|think i made) a mistake"
    r"|that(?:'s| is) (?:not right|wrong|incorrect)"
    r"|等等|等一下|不对|不,|但是|让我)",
    re.IGNORECASE,
)
_REVISES_STRICTLY = re.compile(
    r"^[\s>*_-]*(?:(?:oh|ah|hmm+|no|but|and|so|well|okay|ok),?\s+)?(?:wait\b|hold on\b|hmm+\b|等等|等一下|不对)",
    re.IGNORECASE,
)
_CODE = re.compile(r"```[^\n`]*\n(.*?)\n```", re.DOTALL)
_NO_VALUE = re.compile(
    r"^(?:not\b|n't\b|correct\b|right\b|wrong\b|incorrect\b|clear\b|in the\b|to be\b|what\b|still\b$)", re.I
)
_ANNOUNCES = re.compile(
    r"(?:\banswers?\b|\bcorrect (?:option|choice)|\b(?:final|correct) (?:result|solution)|答案)[^.!?\n]{0,60}[:：]\W*$",
    re.I,
)
_OFFERED = re.compile(r"^[ \t>*-]*\(?([A-J]|\d{1,2})[.):][ \t]+(\S[^\n]{0,300})$", re.MULTILINE)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_ORDINAL = re.compile(
    rf"(?:the )?({'|'.join(_ORDINALS)})(?: (?:option|choice|answer|statement|one)\b.*)?", re.I | re.DOTALL
)
_MAX_OFFER = 8_000  # characters at a prompt's ends in which its instructions and choices stand
_TAG_PAIR = re.compile(r"<([A-Za-z][\w-]{0,31})>")


def stated(line: str) -> str | None:
    """The value that the last answer statement in a line gives, or None.

    Markup around the value and the end of its sentence are taken off: "So the answer is **(B)**." gives "(B)".
    """
    line = line[-MAX_LINE:]
    for pattern in (_JSON, _LABELLED, _STATED, _CHOSEN, _CHINESE):
        matches = list(pattern.finditer(line))
        if not matches:
            continue
        rest = matches[-1]["rest"]
        deeper = stated(rest) if pattern is _STATED and len(rest) < len(line) else None
        value = deeper or _value(rest)
        if value is not None:
            return value
    return None


def announces(line: str) -> bool:
    """Whether a line says that the answer follows on the next one: "Therefore, the correct answer is:"."""
    return bool(_ANNOUNCES.search(line[-MAX_LINE:]))


def revises(line: str, *, strictly: bool = False) -> bool:
    """Whether a line takes back or doubts what stands before it: "Wait, ...", "But ...", "Actually, ...".

    strictly: only words that no explanation of a finished answer uses ("Wait", "Hold on", "Hmm").
    """
    return bool((_REVISES_STRICTLY if strictly else _REVISES).match(line[:200]))


def unmarked(text: str) -> str | None:
    """The value of a conclusion without a box: its code block, the answer it states, or a short first line.

    Returns None where the text is longer and states nothing.
    """
    code = _CODE.findall(text)
    if code:
        return str(code[-1]).strip("\n") or None
    lines = [line.strip() for line in text.strip("*_:# \n").splitlines() if line.strip()]
    for line in reversed(lines):
        if (value := stated(line)) is not None:
            return value
    first = lines[0].strip().strip("*_`$").strip() if lines else ""
    if first.startswith(("\\(", "\\[")) and first.endswith(("\\)", "\\]")):
        first = first[2:-2].strip()
    return first.rstrip(".。") or None if len(first) <= 200 else None


def requested_tags(prompt: str) -> tuple[str, ...]:
    """Names of tags (lower case) in which a prompt asks for the answer: "<ANSWER>1</ANSWER>", "in the <answer> tag".

    A name counts when the prompt closes it too, or calls it a tag, and speaks of an answer near it.
    """
    names: list[str] = []
    if len(prompt) > 2 * _MAX_OFFER:
        prompt = prompt[:_MAX_OFFER] + "\n" + prompt[-_MAX_OFFER:]
    for found in _TAG_PAIR.finditer(prompt):
        name = found[1].lower()
        around = prompt[max(0, found.start() - 200) : found.end() + 200].lower()
        is_pair = f"</{name}>" in around or "tag" in around
        if name not in names and name != "think" and is_pair and ("answer" in around or "solution" in around):
            names.append(name)
    return tuple(names)


def offered(prompt: str) -> tuple[tuple[str, str], ...]:
    """The choices that a prompt lists one a line, as (label, plain text): "2. Anna is Carl's child." is ("2", ...).

    Labels must run on from 1 or A without a gap; the last such list counts. Empty where there is none.
    """
    found: list[tuple[str, str]] = []
    for label, text in _OFFERED.findall(prompt[-_MAX_OFFER:]):
        if label in ("1", "A"):
            found = []
        expected = chr(ord("A") + len(found)) if label.isalpha() else str(len(found) + 1)
        if label == expected and (not found or found[0][0].isalpha() == label.isalpha()):
            found.append((label, _plain(text)))
    return tuple(found) if len(found) > 1 else ()


def choose(value: str, choices: tuple[tuple[str, str], ...], *, is_part: bool = False) -> str | None:
    """The label of the one choice whose text a value repeats, or that it names ("the first option"); None where no
    choice or more than one fits. is_part: the choice may stand anywhere in the value."""
    if not choices:
        return None
    ordinal = _ORDINAL.fullmatch(value.strip())
    if ordinal and _ORDINALS.index(ordinal[1].lower()) < len(choices):
        return choices[_ORDINALS.index(ordinal[1].lower())][0]
    plain = f" {_plain(re.sub(r'^[(]?(?:[A-J]|[0-9]{1,2})[.):] +', '', value.strip()))} "
    fitting = [label for label, text in choices if plain == f" {text} " or (is_part and f" {text} " in plain)]
    return fitting[0] if len(fitting) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold().replace("'s", "").replace("’s", "")))


def _value(rest: str) -> str | None:
    """The value at the beginning of what follows "the answer is"."""
    value = rest.strip().lstrip(":：").strip()
    if value.startswith('"') and (end := value.find('"', 1)) > 0:
        return value[1:end].strip() or None
    value = re.split(r"(?<=[^\d\W])[.!?。！](?=\s|$)|(?<=[\d)\]}*$])[.!?。！](?=\s|$)|\n|[。！]", value, maxsplit=1)[0]
    value = value.strip().strip("*_`").strip()
    value = re.sub(r"^(?:option|choice|number)\s+(?=\(?[A-Ja-j\d]\b)", "", value, flags=re.IGNORECASE)
    choice = re.match(r"^\(?([A-J]|\d{1,2})\)?(?:[:.)]\s+\S|\s*[,;-]\s+\S|\s*\()", value)
    if choice:
        value = choice[1]
    value = value.strip(" .;,:!*_`")
    if value.startswith("\\(") and value.endswith("\\)"):
        value = value[2:-2].strip()
    if len(value) > 1 and value.startswith("$") and value.endswith("$"):
        value = value.strip("$").strip()
    return None if not value or len(value) > 300 or _NO_VALUE.match(value) else value
