"""Sentences that state an answer: "So the correct answer is option 2.", "**Answer:** B", "答案是 5".

One line of text goes in, the stated value comes out, or None. Patterns are linear: no nested repetition, and a line is
cut at `MAX_LINE` characters, so a hostile line costs no more than a long one.

Does not: judge whether the statement is final, or understand negation beyond "is not"; `split` weighs what it finds.
"""

from __future__ import annotations

import re

__all__ = [
    "MAX_LINE",
    "announces",
    "asks_for_code",
    "asks_yes_or_no",
    "requested_tags",
    "revises",
    "stated",
    "value_of",
]

MAX_LINE = 1024
"""Characters of a line that are looked at, from its end."""

_NOUN = r"(?:answers?|options?|choices?|solutions?|results?|conclusion)"
_IS = (
    r"(?:is|are|was|were|equals|should be|must be|would be|will be|has to be|seems to be|appears to be|remains|becomes"
    r"|(?:come|turn|work)s? out (?:to be|as|at|to)|ends up (?:being|as))"
)
_STATED = re.compile(
    r"(?:^\W{0,8}|\b(?:the|my|our|this)\s+)(?:(?:final|correct|right|best|only|required|desired|overall|same)\s+){0,2}"
    rf"(?:{_NOUN}|(?<=correct )one|(?<=right )one)(?:\s+(?:here|then|(?:to|for) (?:the|this|our) (?:question|problem)"
    r"|(?:that |which )?(?:i|we|you|they)(?:'re|'m| are| am| were)? [\w ]{1,24}))?,?(?:\s+|(?='s\s))"
    rf"(?:(?:indeed|still|clearly|definitely|simply|therefore|thus|probably|likely)\s+)?(?:{_IS}|'s)(?![\w-])"
    r"(?:\s+(?:indeed|still|clearly|definitely|simply|that|therefore|thus|probably|likely|just))*"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_LABELLED = re.compile(
    r"^[^\w\n]{0,12}(?:(?:final|correct|the|my)\s+){0,2}(?:ans|answers?|solution|result)[\s*_]*[:=][\s*_]*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_JSON = re.compile(
    r'"(?:final_)?answer"\s*:\s*(?P<rest>"(?:[^"\\]|\\.)*"|\[[^\[\]{}\n]{0,200}\]|[-\w.]+)', re.IGNORECASE
)
_CHOSEN = re.compile(
    r"\b(?:option|choice)\s+\(?(?P<rest>[A-J]|\d{1,2})\)?(?:\s+(?:is|seems|must be|should be|would be)\s+(?:\w+\s+)?"
    r"(?:correct|right|the (?:correct|right|best)\s+\w+)|\s*[.!]?\s*$)",
    re.IGNORECASE,
)
_PICKED = re.compile(
    r"\b(?:i|we)(?:'ll|'d| will| would)?\s+(?:choose|pick|select|go with|opt for)\s+(?:option\s+|choice\s+|answer\s+)?"
    r"\(?(?P<rest>[A-J])\)?\s*[.!]?\s*$"
    r"|^(?:so|thus|therefore|hence),?\s+it(?:'s| is| must be)\s+(?:option\s+)?\(?(?P<bare>[A-J])\)?\s*(?:[.!]?\s*$|,\s)"
    r"|\bleav(?:es|ing)\s+(?:us with\s+|only\s+|just\s+){0,2}(?:option\s+|choice\s+)?\(?(?P<left>[A-J])\)?\s*[.!]?\s*$"
    r"|^#{3,4}\s*(?P<number>[-+]?\$?\d[\d,.]*)\s*$",  # as GSM8K writes its answers
    re.IGNORECASE,
)
_CALLED_RIGHT = re.compile(
    r"(?:^|[\s(*])(?:option\s+)?\(?(?P<rest>[A-J])\)?\*{0,2}\s+(?:is|must be|should be)\s+(?:indeed\s+)?"
    r"the\s+(?:correct|right|best)\s+(?:answer|option|choice)|选项\s*[(\uff08]?(?P<chinese>[A-J])[)\uff09]?\s*(?:是|为)?正确",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"(?:^|,\s+|\b(?:so|thus|hence|therefore|that makes|which makes|making)\s+)"
    r"(?P<rest>[-+]?[$\\(\[]{0,2}[\w{][^\s,;]{0,60})"
    r"(?:\s+(?:is|must be|should be)(?:\s+indeed)?)?\s+(?:the|my|our)\s+(?:final |correct |right )?answer\W*$"
    r"|\b(?:to )?answer (?:the|this|your|our) question[:,]\s+(?P<told>\S.*)",
    re.IGNORECASE,
)
_CHINESE = re.compile(
    r"(?:(?:答案|结果|(?:正确|最佳)的?(?:选项|答案))(?:应该|应当|应|就)?(?:是|为|等于|选择?|[:\uff1a])|^答[:\uff1a])\s*(?P<rest>\S.*)",
    re.DOTALL,
)
_CHINESE_CHOSEN = re.compile(
    r"(?<!不)选择?(?:答案|选项)?[:\uff1a]?\s*[(\uff08]?(?P<rest>[A-J])(?![A-Za-z])[)\uff09]?(?!\s*(?:错|不对|不正确|是错))"
)

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
_ASKS_FOR_CODE = re.compile(
    r"\b(?:code|function|program|script|class|implement\w*|algorithm|python|javascript|java|sql|bash|rust|c\+\+)\b"
    r"|代码|函数|程序|编写",
    re.IGNORECASE,
)
_NO_VALUE = re.compile(
    r"^(?:not\b|n't\b|correct\b|right\b|wrong\b|incorrect\b|clear\b|in the\b|to be\b|what\b|still\b$)", re.I
)
_HEDGE = re.compile(
    r"^(?:(?:approximately|about|roughly|around|nearly|exactly|at|on|just|only|simply|indeed|equal to|given by)\s+)+"
    r"(?=\S)",
    re.I,
)
# What follows a value and says why: the value ends before it. Only behind a number, a formula or a short word.
_REASON = re.compile(
    r"(?<=[\d\w)$}*%\]]),?\s+(?:because|since|as (?:we|i|it|the|each|shown|found)|which|given that|due to"
    r"|so (?:we|the|i)|where|rather than|instead of"
    r"|or (?:about|approximately|roughly|equivalently|simply))\b"
    r"|(?<=[\d)$}%\]]),\s+(?:not|as|but|and (?:not|we|i|this|that|it)|i (?:believe|think|guess|suppose))\b",
    re.I,
)
_YES_OR_NO = re.compile(
    r"\byes(?: |/| or | and |, )*no\b|\btrue(?: |/| or )+false\b"
    r"|(?:^|[.!?:\n]\s*)(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|must)\b[^.!?\n]{2,200}\?\W*$"
    r"|是否|对吗|吗[?\uff1f]",
    re.I,
)
_ANNOUNCES = re.compile(
    r"(?:\banswers?\b|\bcorrect (?:option|choice)|\b(?:final|correct) (?:result|solution)|答案)[^.!?\n]{0,60}[:：]\W*$"
    r"|\banswer is\s*$",
    re.I,
)
_SEVERAL = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|&|\band\b|\bor\b|、|和)\s*(?:\band\b\s*)?\(?[A-J]\)?)+[\s.]*")
_MAX_OFFER = 8_000  # characters at a prompt's ends in which its instructions stand
_TAG_PAIR = re.compile(r"([<\[])([A-Za-z][\w-]{0,31})[>\]]")


def stated(line: str) -> str | None:
    """The value that the last answer statement in a line gives, or None.

    Markup around the value and the end of its sentence are taken off: "So the answer is **(B)**." gives "B".
    """
    line = line[-MAX_LINE:]
    for pattern in (_JSON, _LABELLED, _STATED, _CHOSEN, _CALLED_RIGHT, _PICKED, _NAMED, _CHINESE, _CHINESE_CHOSEN):
        matches = list(pattern.finditer(line))
        if not matches:
            continue
        found = matches[-1].groupdict()
        rest = next((part for part in found.values() if part), "")
        deeper = stated(rest) if pattern in (_STATED, _LABELLED) and len(rest) < len(line) else None
        value = deeper or value_of(rest)
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


def asks_for_code(prompt: str) -> bool:
    """Whether a prompt speaks of code, so that a code block can be its answer."""
    return bool(_ASKS_FOR_CODE.search(prompt[:_MAX_OFFER]) or _ASKS_FOR_CODE.search(prompt[-_MAX_OFFER:]))


def asks_yes_or_no(prompt: str) -> bool:
    """Whether a prompt can be answered by yes or no: it says so, or ends in a question that begins with its verb."""
    return bool(
        _YES_OR_NO.search(prompt[-1000:].replace("<|im_end|>", "").replace("<|im_start|>assistant", "").rstrip())
    )


def requested_tags(prompt: str) -> tuple[str, ...]:
    """Names of tags (lower case) in which a prompt asks for the answer: "<ANSWER>1</ANSWER>", "in the <answer> tag".

    A name counts when the prompt closes it too, or calls it a tag, and speaks of an answer near it; "[ANSWER]" counts
    only when it is closed.
    """
    names: list[str] = []
    if len(prompt) > 2 * _MAX_OFFER:
        prompt = prompt[:_MAX_OFFER] + "\n" + prompt[-_MAX_OFFER:]
    for found in _TAG_PAIR.finditer(prompt):
        name = found[2].lower()
        around = prompt[max(0, found.start() - 200) : found.end() + 200].lower()
        is_pair = f"[/{name}]" in around if found[1] == "[" else f"</{name}>" in around or "tag" in around
        if name not in names and name != "think" and is_pair and ("answer" in around or "solution" in around):
            names.append(name)
    return tuple(names)


def _bold(value: str) -> str:
    """The part in bold where a value has one, also where its opening ** was taken off with the label before it."""
    before, mark, after = value.partition("**")
    if not mark:
        return value
    if not re.fullmatch(r"(?:option|choice|answer)?\s*", before, re.IGNORECASE):
        return before if value.count("**") % 2 else value.replace("**", "")
    return after.partition("**")[0] or value


def value_of(rest: str) -> str | None:
    """The value at the beginning of what follows "the answer is", without hedges, markup and reasons; None for none."""
    value = rest.strip().lstrip(":：").strip()
    if value.startswith('"') and (end := value.find('"', 1)) > 0:
        return value[1:end].strip() or None
    value = re.sub(r"^not\b[^.;]{1,80}?\bbut(?:\s+rather)?\s+(?=\S)", "", value, flags=re.IGNORECASE)
    value = re.split(r"(?<=[^\d\W])[.!?。！](?=\s|$)|(?<=[\d)\]}*$])[.!?。！](?=\s|$)|\n|[。！]", value, maxsplit=1)[0]
    value = _HEDGE.sub("", _bold(value).strip().strip("*_`").strip())
    value = _REASON.split(value, maxsplit=1)[0]
    value = re.sub(r"^(yes|no),\s.*", r"\1", value, flags=re.IGNORECASE)
    value = re.sub(
        r"^(?:(?:option|choice|number)\s+|选项\s*)(?=[(\uff08]?[A-Ja-j\d](?![A-Za-z]))", "", value, flags=re.IGNORECASE
    )
    if _SEVERAL.fullmatch(value):
        return ", ".join(re.findall(r"[A-J]", value))
    choice = re.match(
        r"^(\()?([A-J]|\d{1,2})(?(1)\)|\)?)(?:[:.)\uff0e\uff1a]\s+\S|\s*[,;-]\s+[A-Za-z]{2}|\s*\()", value
    )
    choice = choice or re.fullmatch(r"([(\uff08])?([A-J])(?:[)\uff09]|[)\uff09\uff0e、].*)", value, re.DOTALL)
    if choice:
        value = choice[2]
    value = value.strip(" .;,:!*_`")
    if value.startswith("\\(") and value.endswith("\\)"):
        value = value[2:-2].strip()
    if len(value) > 1 and value.startswith("$") and value.endswith("$"):
        value = value.strip("$").strip()
    return None if not value or len(value) > 300 or _NO_VALUE.match(value) else value
