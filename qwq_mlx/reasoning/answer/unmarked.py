"""What a text says under a heading, or behind the thinking, where it holds no box.

Each function reads one form and returns the value, None where the text has another form, or "" where the text is known
to give no answer. Which form goes first is written in `rules`.

Does not: understand what was asked.
"""

from __future__ import annotations

import json
import re

from qwq_mlx.reasoning.answer.sentences import value_of

__all__ = [
    "COUNTED",
    "EQUATES",
    "FORMULA",
    "YES_NO",
    "all_items",
    "code_block",
    "counted",
    "cut_in_brackets",
    "equated_formulas",
    "equated_number",
    "equation_of_numbers",
    "few_words",
    "first_line",
    "in_brackets",
    "in_tags",
    "joined_formulas",
    "json_answer",
    "json_object",
    "labelled",
    "lines_of",
    "one_marked",
    "one_paragraph",
    "open_box",
    "total",
    "whole_formula",
    "whole_line",
    "yes_or_no",
]

_SHORT = 200  # characters of a conclusion that can be the answer as a whole
_BLOCK = 600  # characters of a list or table that is the answer as a whole

_CODE = re.compile(r"```[^\n`]*\n(.*?)\n```", re.DOTALL)
_PART = re.compile(r"\(?(?:\d|[a-h]|i{1,3}|iv)[).:]\s|[-*•|]\s?\S")
_MARKED = re.compile(r'\*\*([^*\n]{1,80})\*\*|\$([^$\n]{1,80})\$|\\[(\[]([^\n]{1,80}?)\\[)\]]|["“]([^"“”\n]{1,80})["”]')
FORMULA = re.compile(r"(?<!\\)\$((?:\\\$|[^$\n]){1,120})(?<!\\)\$|\\\(([^\n]{1,120}?)\\\)")
EQUATES = re.compile(
    r"\b(?:is|are|was|were|equals?|has to be|must be|will be|would be|can (?:only )?be|could be|becomes)"
    r"\s+(?!\b(?:not|n't)\b)|(?<![<>!=])=\s*|等于|就是|[是为]\s*",
    re.IGNORECASE,
)
COUNTED = re.compile(r"(?:一共|总共|共|有|需要|得到|剩下)\s*(?P<value>\d[\d,.]*)\s*[\u3400-\u9fff]?")
_NUMERIC = re.compile(r"[-+−*/×÷·^().,\d\s]+")
_TOTAL = re.compile(
    r"\W*(?:\d{1,2}[.)]\s*)?\W*(?:grand\s+|in\s+)?(?:total|sum|altogether|result|overall)\b[^:：|\d]{0,30}"
    r"[:：|][\s*]*(?P<value>[^\s|*][^|]{0,80}).*",
    re.IGNORECASE,
)
YES_NO = re.compile(
    r"^[\s*_]*(?:(?:so|thus|therefore|hence|well|in conclusion|finally),?\s+)?"
    r"(?:(?:i|i'd|i would|we)(?: can| would)? (?:say|answer),?\s+)?"
    r"(?:the answer is\s+)?[\"“]?(?P<value>yes|no|true|false|是的|不是|是|否)"
    r"(?=[\s*_]*(?:[,.:;!\"”，。–—]|\s-\s|$))",
    re.IGNORECASE,
)


def in_tags(text: str) -> str | None:
    """What stands between answer tags that hold the whole text."""
    tags = re.fullmatch(
        r"[\s*:]*<(answer|final_answer|solution|output)>\s*(.+?)\s*</\1>\s*", text, re.DOTALL | re.IGNORECASE
    )
    return tags[2] if tags else None


def whole_formula(text: str) -> str | None:
    """A displayed formula and nothing else."""
    formula = re.fullmatch(r"[\s*:]*(?:\\\[|\$\$)\s*(.{1,600}?)\s*(?:\\\]|\$\$)\s*", text, re.DOTALL)
    return formula[1].rstrip(" .") if formula and "\\]" not in formula[1] else None


def open_box(text: str) -> str | None:
    """What stands in a box that the text ends in."""
    box = re.search(r"\\?f?boxed ?\{([^\n]{1,200})\s*$", text)
    is_open = box is not None and box[1].count("{") >= box[1].count("}")
    return (re.sub(r"\s*(?:\\[\])]|\$+)\s*$", "", box[1]).strip() or None) if box and is_open else None


def in_brackets(text: str) -> str | None:
    """Several lines in brackets that are closed at the end and not before, such as the rows of a matrix."""
    lines = lines_of(text)
    whole = "\n".join(lines)
    is_open = all(_n_open("\n".join(lines[:at])) > 0 for at in range(1, len(lines)))
    return whole if len(lines) > 1 and is_open and not _n_open(whole) and whole[0] in "([{" else None


def cut_in_brackets(text: str) -> str | None:
    """Lines of which the first ends with an open bracket or a comma and leaves a bracket open: something goes on."""
    lines = lines_of(text)
    goes_on = bool(lines) and lines[0].endswith(("(", "[", "{", ",")) and _n_open(lines[0]) > 0
    return "\n".join(lines)[:_BLOCK] if goes_on else None


def _n_open(text: str) -> int:
    return sum(map(text.count, "([{")) - sum(map(text.count, ")]}"))


def code_block(text: str) -> str | None:
    """The last code block: of JSON its answer, else its text."""
    blocks = _CODE.findall(text)
    return (json_answer(blocks[-1]) or str(blocks[-1]).strip("\n")) if blocks else None


def all_items(text: str) -> str | None:
    """Lines that are all parts, bullets or rows of a table, together."""
    lines = lines_of(text)
    is_list = len(lines) > 1 and all(_PART.match(line) for line in lines) and sum(map(len, lines)) <= _BLOCK
    return "\n".join(lines) if is_list else None


def total(text: str) -> str | None:
    """What the last line calls the total: "3. Total: 48 + 24 = 72 clips", "| **Total** | **72** |"."""
    last = _TOTAL.match(next(iter(reversed(lines_of(text))), "")[:_SHORT])
    return value_of(last["value"].strip(" |*").rpartition("=")[2]) if last else None


def one_paragraph(text: str) -> str | None:
    """A paragraph that stands alone; "" where the first line is too long to be an answer."""
    lines = lines_of(text)
    if not lines or len(lines[0]) <= _SHORT:
        return None
    return lines[0].strip("*_ ") if len(lines) == 1 and len(lines[0]) <= _BLOCK else ""


def first_line(text: str) -> str:
    """The first line that is not blank, "" where there is none."""
    return next(iter(lines_of(text)), "")


def few_words(text: str) -> str | None:
    """The first line where it has at most three words."""
    line = whole_line(text)
    n_words = len(re.findall(r"(?<!\\)[^\W\d_]{2,}", line))
    return line if n_words == 0 or (n_words <= 3 and not re.search(r"[(,;:]", line)) else None


def whole_line(text: str) -> str:
    """The first line without markup and its full stop."""
    return first_line(text).strip("*_`$").strip().rstrip(".。")


def lines_of(text: str) -> list[str]:
    """The lines that are not blank, without the markup around the whole."""
    return [line.strip() for line in text.strip("*_:：# \n").splitlines() if line.strip()]


def json_answer(code: str) -> str | None:
    """The value of "answer" or "final_answer" where a code block is a JSON object that has one.

    >>> json_answer('{"answer": {"value": 42}}')
    '42'
    """
    try:
        parsed = json.loads(code) if code.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None
    values = parsed.items() if isinstance(parsed, dict) else ()
    answers = [value for key, value in values if key.casefold() in ("answer", "final_answer")]
    if not answers and len(values) == 1:
        answers = [value for key, value in values if key.casefold() in ("result", "solution", "value", "output")]
    if not answers:
        return None
    answer = answers[-1]
    while isinstance(answer, dict) and len(answer) == 1:
        [answer] = answer.values()
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def json_object(text: str) -> str | None:
    """A text that is one JSON object, as it stands."""
    try:
        is_object = text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return None
    return text.strip() if is_object else None


# One short line: what it says besides its words.


def labelled(line: str) -> str | None:
    """What follows a label in bold: "**Total:** 72 clips"."""
    label = re.match(r"(?:\*\*)?[^*\n]{1,40}(?:[:：]\*\*|\*\*[:：])\s*(\S.{0,100})$", line)
    return value_of(label[1]) if label else None


def equation_of_numbers(line: str) -> str | None:
    """The right side of an equation without variables: "2 + 3 = 5" gives "5"."""
    sides = _plain(line).strip("\\()[]. ").split("=")
    is_numeric = all(_NUMERIC.fullmatch(side) and re.search(r"\d", side) for side in sides)
    return sides[-1].strip() if is_numeric and len(sides) > 1 else None


def one_marked(line: str) -> str | None:
    """The one thing in bold, in quotation marks or set as a formula."""
    marked = _marked(line)
    return (marked[0].strip().strip(".。") or None) if len(marked) == 1 else None


def equated_formulas(line: str) -> str | None:
    """The formulas behind the first verb, where they alone stand there."""
    plain = _plain(line)
    verb = EQUATES.search(plain)
    return joined_formulas(plain[verb.end() :], only=True) if verb and len(_marked(line)) > 1 else None


def equated_number(line: str) -> str | None:
    """The number behind the only verb. "x = 5" is an answer as it stands."""
    plain = _plain(line)
    verbs = list(EQUATES.finditer(plain))
    if len(_marked(line)) > 1 or len(verbs) != 1 or verbs[0][0].strip() == "=":
        return None
    value = value_of(plain[verbs[0].end() :])
    return value if value and re.search(r"\d", value) and len(value) <= 60 else None


def yes_or_no(line: str) -> str | None:
    """The yes or no that a line begins with."""
    word = None if len(_marked(line)) > 1 else YES_NO.match(_plain(line))
    return word["value"] if word else None


def counted(text: str) -> str | None:
    """The number that a Chinese sentence counts to, where it is the only one."""
    number = COUNTED.search(text)
    return number["value"] if number and len(re.findall(r"\d+", text)) == 1 else None


def _marked(line: str) -> list[str]:
    return [next(part for part in parts if part) for parts in _MARKED.findall(line)]


def _plain(line: str) -> str:
    return line.strip("*_`$").strip()


def joined_formulas(sentence: str, *, only: bool = False) -> str | None:
    """The formulas of a sentence as one list. only: where nothing else stands in it."""
    every = [next(part for part in parts if part).strip(" .") for parts in FORMULA.findall(sentence)]
    first, *between = FORMULA.sub("\0", sentence).split("\0")
    last = between.pop() if between else ""
    if only and (first + last).strip(" ."):
        return None
    if not every or not all(re.fullmatch(r"\s*(?:,|and|or|,\s*and|,\s*or|或者?|和|、)\s*", each) for each in between):
        return None
    return ", ".join(every)
