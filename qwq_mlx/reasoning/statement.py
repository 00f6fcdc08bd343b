"""Sentences that state an answer: "So the correct answer is option 2.", "**Answer:** B", "答案是 5".

One line of text goes in, the stated value comes out, or None. Patterns are linear: no nested repetition, and a line is
cut at `MAX_LINE` characters, so a hostile line costs no more than a long one.

Does not: judge whether the statement is final, or understand negation beyond "is not"; `split` weighs what it finds.
"""

from __future__ import annotations

import re

__all__ = ["MAX_LINE", "announces", "asks_for_code", "concluded", "requested_tags", "revises", "stated", "unmarked"]

MAX_LINE = 1024
"""Characters of a line that are looked at, from its end."""

_NOUN = r"(?:answer|option|choice|solution|result|conclusion)"
_IS = r"(?:is|are|was|should be|must be|would be|will be|has to be|seems to be|appears to be|remains|becomes)"
_STATED = re.compile(
    rf"(?:^\W{{0,8}}|\b(?:the|my|our|this)\s+)(?:(?:final|correct|right|best|only|required|desired|overall|same)\s+){{0,2}}{_NOUN}"
    rf"(?:\s+(?:here|then|to (?:the|this) (?:question|problem)|for (?:the|this) (?:question|problem)))?,?\s+"
    rf"(?:(?:indeed|still|clearly|definitely|simply|therefore|thus|probably|likely)\s+)?{_IS}(?![\w-])"
    r"(?:\s+(?:indeed|still|clearly|definitely|simply|that|therefore|thus|probably|likely|just))*"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_LABELLED = re.compile(
    r"^[^\w\n]{0,12}(?:(?:final|correct|the|my)\s+){0,2}(?:answer|solution|result)[\s*_]*[:=][\s*_]*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_JSON = re.compile(r'"(?:final_)?answer"\s*:\s*(?P<rest>"(?:[^"\\]|\\.)*"|[-\w.]+)', re.IGNORECASE)
_CHOSEN = re.compile(
    r"\b(?:option|choice)\s+\(?(?P<rest>[A-J]|\d{1,2})\)?(?:\s+(?:is|seems|must be|should be|would be)\s+(?:\w+\s+)?"
    r"(?:correct|right|the (?:correct|right|best)\s+\w+)|\s*[.!]?\s*$)",
    re.IGNORECASE,
)
_PICKED = re.compile(
    r"\b(?:i|we)(?:'ll|'d| will| would)?\s+(?:choose|pick|select|go with|opt for)\s+(?:option\s+|choice\s+|answer\s+)?"
    r"\(?(?P<rest>[A-J])\)?\s*[.!]?\s*$"
    r"|^(?:so|thus|therefore|hence),?\s+it(?:'s| is| must be)\s+(?:option\s+)?\(?(?P<bare>[A-J])\)?\s*[.!]?\s*$"
    r"|^#{3,4}\s*(?P<number>[-+]?\$?\d[\d,.]*)\s*$",  # as GSM8K writes its answers
    re.IGNORECASE,
)
_CALLED_RIGHT = re.compile(
    r"(?:^|[\s(*])(?:option\s+)?\(?(?P<rest>[A-J])\)?\*{0,2}\s+(?:is|must be|should be)\s+(?:indeed\s+)?"
    r"the\s+(?:correct|right|best)\s+(?:answer|option|choice)|选项\s*[(\uff08]?(?P<chinese>[A-J])[)\uff09]?\s*(?:是|为)?正确",
    re.IGNORECASE,
)
_CHINESE = re.compile(
    r"(?:(?:答案|结果|(?:正确|最佳)选项)(?:应该|应当|应|就)?(?:是|为|等于|选|[:\uff1a])|^答[:\uff1a])\s*(?P<rest>\S.*)",
    re.DOTALL,
)
_CHINESE_CHOSEN = re.compile(
    r"(?<!不)选择?(?:答案|选项)?[:\uff1a]?\s*[(\uff08]?(?P<rest>[A-J])(?![A-Za-z])[)\uff09]?(?!\s*(?:错|不对|不正确|是错))"
)
_CONCLUDES = re.compile(
    r"^[\s*_]*(?:(?:so|thus|therefore|hence|consequently|in conclusion|finally)\b|所以|因此|故|综上所述)"
    r".{0,200}?(?:\b(?:is|are|equals?|has to be|must be)\s+|=\s*|是|为|等于)(?P<rest>\S.{0,80})$",
    re.IGNORECASE | re.DOTALL,
)
_MARKED = re.compile(r"\*\*([^*\n]{1,80})\*\*|\$([^$\n]{1,80})\$|\\\(([^\n]{1,80}?)\\\)")

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
_PART = re.compile(r"\(?(?:\d|[a-h]|i{1,3}|iv)[).:]\s")
_MEASURED = re.compile(
    r"[^\n]{1,120}?\s(?:is|are|equals?|=)\s+(?P<value>-?\$?\d[\d.,/]*(?<=\d)(?:\s?[^\W\d_%°]{1,12}|[%°]){0,2})[.。]?"
)
_ASKS_FOR_CODE = re.compile(
    r"\b(?:code|function|program|script|class|implement\w*|algorithm|python|javascript|java|sql|bash|rust|c\+\+)\b"
    r"|代码|函数|程序|编写",
    re.IGNORECASE,
)
_CODE = re.compile(r"```[^\n`]*\n(.*?)\n```", re.DOTALL)
_NO_VALUE = re.compile(
    r"^(?:not\b|n't\b|correct\b|right\b|wrong\b|incorrect\b|clear\b|in the\b|to be\b|what\b|still\b$)", re.I
)
_ANNOUNCES = re.compile(
    r"(?:\banswers?\b|\bcorrect (?:option|choice)|\b(?:final|correct) (?:result|solution)|答案)[^.!?\n]{0,60}[:：]\W*$"
    r"|\banswer is\s*$",
    re.I,
)
_MAX_OFFER = 8_000  # characters at a prompt's ends in which its instructions stand
_TAG_PAIR = re.compile(r"([<\[])([A-Za-z][\w-]{0,31})[>\]]")


def stated(line: str) -> str | None:
    """The value that the last answer statement in a line gives, or None.

    Markup around the value and the end of its sentence are taken off: "So the answer is **(B)**." gives "B".
    """
    line = line[-MAX_LINE:]
    for pattern in (_JSON, _LABELLED, _STATED, _CHOSEN, _CALLED_RIGHT, _PICKED, _CHINESE, _CHINESE_CHOSEN):
        matches = list(pattern.finditer(line))
        if not matches:
            continue
        found = matches[-1].groupdict()
        rest = next((part for part in found.values() if part), "")
        deeper = stated(rest) if pattern in (_STATED, _LABELLED) and len(rest) < len(line) else None
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
    first = lines[0] if lines else ""
    if len(lines) > 1 and all(_PART.match(line) for line in lines) and sum(map(len, lines)) <= 200:
        return "\n".join(lines)
    marked = [next(part for part in found if part) for found in _MARKED.findall(first)]
    if len(marked) == 1 and len(first) <= 200:
        return marked[0].strip().strip(".。") or None
    first = first.strip("*_`$").strip()
    if (measured := _MEASURED.fullmatch(first)) is not None:
        return measured["value"]
    if first.startswith(("\\(", "\\[")) and first.endswith(("\\)", "\\]")):
        first = first[2:-2].strip()
    return first.rstrip(".。") or None if len(first) <= 200 else None


def asks_for_code(prompt: str) -> bool:
    """Whether a prompt speaks of code, so that a code block can be its answer."""
    return bool(_ASKS_FOR_CODE.search(prompt[:_MAX_OFFER]) or _ASKS_FOR_CODE.search(prompt[-_MAX_OFFER:]))


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


def concluded(line: str) -> str | None:
    """What a closing sentence comes to: "Thus, the value of x is 7." gives "7"; None unless it is a number, a formula
    or marked. The last line of an output only: a thinking is full of such sentences."""
    line = re.sub(r"\s+", " ", line[-MAX_LINE:]).strip()
    sentence = re.split(r"(?<=[.!?])\s+|。", line.rstrip("。"))[-1]
    found = _CONCLUDES.match(sentence)
    value = _value(found["rest"]) if found else None
    return value if value and (re.search(r"\d|\\", value) or "**" in sentence) else None


def _bold(value: str) -> str:
    """The part in bold where a value has one, also where its opening ** was taken off with the label before it."""
    before, mark, after = value.partition("**")
    if not mark:
        return value
    if not re.fullmatch(r"(?:option|choice|answer)?\s*", before, re.IGNORECASE):
        return before if value.count("**") % 2 else value.replace("**", "")
    return after.partition("**")[0] or value


def _value(rest: str) -> str | None:
    """The value at the beginning of what follows "the answer is"."""
    value = rest.strip().lstrip(":：").strip()
    if value.startswith('"') and (end := value.find('"', 1)) > 0:
        return value[1:end].strip() or None
    value = re.split(r"(?<=[^\d\W])[.!?。！](?=\s|$)|(?<=[\d)\]}*$])[.!?。！](?=\s|$)|\n|[。！]", value, maxsplit=1)[0]
    value = _bold(value).strip().strip("*_`").strip()
    value = re.sub(r"^(?:option|choice|number)\s+(?=\(?[A-Ja-j\d]\b)", "", value, flags=re.IGNORECASE)
    choice = re.match(r"^\(?([A-J]|\d{1,2})\)?(?:[:.)\uff0e\uff1a]\s+\S|\s*[,;-]\s+\S|\s*\()", value)
    choice = choice or re.fullmatch(r"[(\uff08]?([A-J])(?:[)\uff09]|[)\uff09\uff0e、].*)", value, re.DOTALL)
    if choice:
        value = choice[1]
    value = value.strip(" .;,:!*_`")
    if value.startswith("\\(") and value.endswith("\\)"):
        value = value[2:-2].strip()
    if len(value) > 1 and value.startswith("$") and value.endswith("$"):
        value = value.strip("$").strip()
    return None if not value or len(value) > 300 or _NO_VALUE.match(value) else value
