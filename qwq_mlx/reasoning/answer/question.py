"""What a prompt says about the answer's form: the choices it lists, yes or no, code, tags.

Does not: understand a question, know whether a choice is right, or understand paraphrases: a choice's own words must
come back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Choices", "Question", "choose", "every_letter", "named_letter", "offered", "several_letters"]

Choices = tuple[tuple[str, str], ...]
"""(label, plain text) of each choice, in order: ("C", "jupiter")."""

_MAX_OFFER = 8_000  # characters at a prompt's ends in which its instructions and choices stand
_ASKS_FOR_CODE = re.compile(
    r"\b(?:code|function|program|script|class|implement\w*|algorithm|python|javascript|java|sql|bash|rust|c\+\+)\b"
    r"|代码|函数|程序|编写",
    re.IGNORECASE,
)
_ASKS_YES_OR_NO = re.compile(
    r"\byes(?: |/| or | and |, )*no\b|\btrue(?: |/| or )+false\b|判断(?:对错|正误)|对还是错"
    r"|(?:^|[.!?:\n]\s*)(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|must)\b[^.!?\n]{2,200}\?\W*$"
    r"|是否|对吗|吗[?？]",
    re.IGNORECASE,
)
_TRUE_OR_FALSE = re.compile(r"\btrue(?: |/| or )+false\b|判断(?:对错|正误)|对还是错", re.IGNORECASE)
_JSON = re.compile(r"\bjson\b", re.IGNORECASE)
_SELECT_ALL = re.compile(r"\b(?:select|choose|mark|check) all\b|\ball that apply\b|\bone or more\b|多选", re.IGNORECASE)
_JOINS = re.compile(r"[,;\n]|\band\b|\\\\")
_TEMPLATE = re.compile(r"<\|[a-z_]+\|>(?:assistant)?|<think>")
_TAG_PAIR = re.compile(r"([<\[])([A-Za-z][\w-]{0,31})[>\]]")
# Parentheses, full stop and colon also as Chinese writes them.
_LISTED = re.compile(r"^[ \t>*-]*[(（]?([A-J]|\d{1,2})(?:[.):][ \t]+|[)）、．：][ \t]*)(\S[^\n]{0,300})$", re.MULTILINE)
_LETTER = r"(?<![\w(（])(?:[(（][A-J][)）]|[A-J][.)）、．])"
_IN_LINE = re.compile(rf"(?={_LETTER})[(（]?([A-J])[.)）、．][ \t]*(\S(?:(?!{_LETTER})[^\n]){{0,300}})")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_ORDINAL = re.compile(
    rf"(?:the )?({'|'.join(_ORDINALS)})(?: (?:option|choice|answer|statement|one)\b.*)?", re.I | re.DOTALL
)
_LETTERED = re.compile(r"(?:\(|\b[Oo]ption |\b[Cc]hoice |选项?)\s*([A-J])(?![A-Za-z'’])")
_BARE = re.compile(r"(?<![A-Za-z'’-])([B-HJ])(?![A-Za-z'’-])")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf)\s*\{([^{}]*)\}")
_SEVERAL = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:both\s+|(?:the\s+)?(?:options?|choices?|answers?|statements?|items?)\s+|选项?\s*)?"
    r"(\(?[A-J]\)?(?:\s*(?:,|;|/|&|\+|、|和)?\s*(?:and\s+)?\(?[A-J]\)?)+)"
    r"(?:\s+(?:are|is)\s+(?:all\s+|both\s+)?(?:correct|right|true))?",
    re.IGNORECASE,
)
_MAX_NAMES = 120  # characters of a text that names several choices and says no more
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")  # each Han character is a word


@dataclass(frozen=True, slots=True)
class Question:
    """What a prompt asks for.

    choices: of a multiple choice, () for none.
    tags: names of answer tags asked for, in lower case.
    is_yes_or_no: it can be answered by yes or no, or by true or false.
    is_true_or_false: it asks for one of these two words.
    is_json: it speaks of JSON.
    is_select_all: several choices may be right.
    is_code: a code block can be its answer.

    >>> question = Question.of("Is 7 prime? Put the answer in <answer></answer>.")
    >>> question.tags, question.is_code
    (('answer',), False)
    """

    choices: Choices
    tags: tuple[str, ...]
    is_yes_or_no: bool
    is_true_or_false: bool
    is_json: bool
    is_select_all: bool
    is_code: bool

    @classmethod
    def of(cls, prompt: str | None) -> Question:
        """What a prompt asks for; one that is not known may ask for code."""
        text = prompt or ""
        return cls(
            choices=offered(text),
            tags=_requested_tags(text),
            is_yes_or_no=_asks_yes_or_no(text),
            is_true_or_false=_finds(_TRUE_OR_FALSE, text),
            is_json=_finds(_JSON, text),
            is_select_all=_finds(_SELECT_ALL, text),
            is_code=prompt is None or _finds(_ASKS_FOR_CODE, text),
        )

    def labelled(self, value: str | None) -> str | None:
        """An answer in words that repeats one of the choices, as its label, and "BC" as "B, C"; any other as it is."""
        if not value or not self.choices:
            return value
        return choose(value, self.choices) or several_letters(value, self.choices) or self._several(value) or value

    def _several(self, value: str) -> str | None:
        """The labels of a list of choices in words, where several may be chosen."""
        parts = [
            part for part in re.split(r"\s*(?:,|;|\n|\band\b|\\\\)\s*", _TEXT.sub(r"\1", value)) if part.strip(" -*•")
        ]
        labels = [choose(part.strip(" -*•"), self.choices) for part in parts] if self.is_select_all else []
        return ", ".join(label for label in labels if label) if len(labels) > 1 and all(labels) else None


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
    value = _TEXT.sub(r"\1", value)
    plain = f" {_plain(re.sub(r'^[(]?(?:[A-J]|[0-9]{1,2})[.):] +', '', value.strip()))} "
    named = re.fullmatch(r"(.+?)\s*[(（]([A-J])[)）]", value.strip(), re.DOTALL)
    if named and f" {_plain(named[1])} " in {f" {text} " for label, text in choices if label == named[2]}:
        return named[2]
    fitting = [label for label, text in choices if plain == f" {text} " or (is_part and f" {text} " in plain)]
    return fitting[0] if len(fitting) == 1 else None


def named_letter(text: str, choices: Choices, *, is_bare: bool) -> str | None:
    """The one label among a prompt's choices that a sentence names by its letter: "(B)", "option B".

    is_bare: a letter alone counts too, but for "A" and "I", which are words.
    """
    labels = {label for label, _ in choices if label.isalpha()}
    named = {letter[1] for letter in _LETTERED.finditer(text)} & labels
    if is_bare:
        named |= set(_BARE.findall(text)) & labels
    return named.pop() if len(named) == 1 else None


def several_letters(text: str, choices: Choices) -> str | None:
    """The labels where a text names several and says no more: "BC", "Both B and C."; "B, C"."""
    labels = [label for label, _ in choices if label.isalpha()]
    if len(text) > _MAX_NAMES:
        return None
    named = _SEVERAL.fullmatch(_TEXT.sub(r"\1", text).strip(" *_$.\\()[]{}"))
    letters = re.findall("[A-J]", named[1]) if named else []
    return ", ".join(letters) if len(letters) > 1 and sorted(set(letters) & set(labels)) == letters else None


def every_letter(text: str, question: Question) -> str | None:
    """The labels that a text names, two or more, where several may be chosen."""
    labels = [label for label, _ in question.choices if label.isalpha()] if question.is_select_all else []
    named = [label for label in labels if label in {*_BARE.findall(text), *_LETTERED.findall(text)}]
    return ", ".join(named) if len(named) > 1 else None


def _run(lines: list[tuple[str, str]]) -> Choices:
    """The last run of labels from 1 or A on."""
    run: list[tuple[str, str]] = []
    for label, text in lines:
        if label in ("1", "A"):
            run = []
        expected = chr(ord("A") + len(run)) if label.isalpha() else str(len(run) + 1)
        if label == expected and (not run or run[0][0].isalpha() == label.isalpha()):
            run.append((label, _plain(text)))
    return tuple(run) if len(run) > 1 else ()


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold().replace("'s", "").replace("’s", "")))


def _finds(pattern: re.Pattern[str], prompt: str) -> bool:
    """Whether a prompt says so at one of its ends."""
    return bool(pattern.search(prompt[:_MAX_OFFER]) or pattern.search(prompt[-_MAX_OFFER:]))


def _asks_yes_or_no(prompt: str) -> bool:
    """Whether a prompt says "yes or no", or ends in a question that begins with its verb."""
    end = _TEMPLATE.sub("", prompt[-1000:]).rstrip()
    return bool(_ASKS_YES_OR_NO.search(end))


def _requested_tags(prompt: str) -> tuple[str, ...]:
    """Names of tags (lower case) in which a prompt asks for the answer: "<ANSWER>1</ANSWER>", "in the <answer> tag".

    A name counts when the prompt closes it too, or calls it a tag, and speaks of an answer near it; "[ANSWER]" counts
    only when it is closed.
    """
    names: list[str] = []
    if len(prompt) > 2 * _MAX_OFFER:
        prompt = prompt[:_MAX_OFFER] + "\n" + prompt[-_MAX_OFFER:]
    for opening in _TAG_PAIR.finditer(prompt):
        name = opening[2].lower()
        around = prompt[max(0, opening.start() - 200) : opening.end() + 200].lower()
        is_pair = f"[/{name}]" in around if opening[1] == "[" else f"</{name}>" in around or "tag" in around
        if name not in names and name != "think" and is_pair and ("answer" in around or "solution" in around):
            names.append(name)
    return tuple(names)
