"""What the last line of a text says that marks no answer.

Each function reads one form of a line, or of the sentence behind "So" or "In total" in it, and returns the value or
None. Which form goes first is written in `rules`.

Does not: look at a whole thinking, which is full of such sentences, or understand what was asked.
"""

from __future__ import annotations

import re

from qwq_mlx.reasoning.answer.cues import CONCLUDES, MAX_LINE, any_of
from qwq_mlx.reasoning.answer.sentences import value_of
from qwq_mlx.reasoning.answer.unmarked import COUNTED, EQUATES, FORMULA, YES_NO, joined_formulas

__all__ = [
    "after_colon",
    "box_without_braces",
    "closing_sentence",
    "compared",
    "displayed",
    "ended_yes_or_no",
    "equated",
    "excepted",
    "formulas",
    "inequality",
    "is_reply",
    "last_clause",
    "named",
    "number_alone",
    "number_in_words",
    "one_code_span",
    "one_in_bold",
    "one_quantity",
    "one_quoted",
    "only_code",
    "said_true_or_false",
    "said_yes_or_no",
    "there_is_no",
]

_QUOTED = re.compile(r'["“]([^"“”\n]{1,80})["”]')
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")
_CODE_SPAN = re.compile(r"`([^`\n]{1,80})`")
_DISPLAYED = re.compile(
    r"(?:[:：]|\b(?:is|are|be|equals|of|as|by|get|gives?|have)|[是为])\s*"
    r"(?:\\\[|\$\$)\s*(\S.{0,500}?)\s*(?:\\\]|\$\$)\s*$",
    re.DOTALL | re.IGNORECASE,
)
_CLOSING_CUE = re.compile(rf"^[\s*_]*(?:(?:and|okay|ok|yes)\b,?\s*)?{any_of(CONCLUDES)}", re.IGNORECASE)
_NUMBER = r"[-−]?[$€£¥]?\s?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_QUANTITY = re.compile(
    rf"(?<![\w.^_\\])(?P<value>{_NUMBER}(?:\s?(?:%|°[CF]?)|:\d\d(?:\s?[ap]\.?m\b\.?)?)?"
    r"(?P<unit>(?:\s(?!(?:in|on|at|of|by|for|to|from|and|or|as|is|are|when|if|with|because|since|that|which|who)\b)"
    r"[A-Za-z][\w/²³^]*){0,3}))",
    re.IGNORECASE,
)
_WORD_NUMBER = re.compile(
    r"\b(zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"
    r"|seventeen|eighteen|nineteen|twenty)\b",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\s+\d{1,2}"
    r"(?:st|nd|rd|th)?(?:,?\s+\d{4})?\b|\b\d{4}-\d\d-\d\d\b|\b\d{1,2}/\d{1,2}/\d{2,4}\b",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"(?:(?:the|our|its|his|her|their)\s+[^,;]{1,80}?|today|tomorrow|yesterday|it)"
    r"\s(?:is|was|must be)\s+([A-Z][\w'’-]*(?: [A-Z][\w'’-]*){0,3}"
    r"|(?:all|any|every) [^,;]{1,60}|the(?: [\w'’-]+){1,3}|[\w'’-]+)"
)
_AFTER_COLON = re.compile(r"[^:]{1,80}\b(?:is|are):\s+(.{1,80})")
_THERE_IS_NO = re.compile(r"there (?:is|are|exists?)\s+(no \w+(?: \w+)?)")
_ENDS_YES_OR_NO = re.compile(r"(?:[.,;:—!?]|\b(?:so|hence|thus|therefore),?)\s+\**(yes|no)[\s.!*]*$", re.IGNORECASE)
_TRUE_OR_FALSE = re.compile(r"\b(not |n't )?(true|false)\b", re.IGNORECASE)
_NO_REPLY = re.compile(r"\W*(?:i|i'm|i'll|let|let's|we|hmm+|wait|okay|ok|hello|hi|thanks?)\b", re.IGNORECASE)
_CLAUSE = re.compile(
    r"[,;]\s+(?:and\s+)?(?:so|thus|hence|therefore|i\.e\.|that is|namely|making|giving|for a total of"
    r"|which (?:is|makes|gives|means))\b"
    r"|\b(?:we|you|i) (?:get|have|obtain)\b|\bthat (?:gives|makes|leaves)\b",
    re.IGNORECASE,
)
_PLACE = re.compile(r"^(\S+(?: [A-Za-z]+){1,2}) (?:in|on|at|by|for|from|altogether|after|before|when|because)\b.*")
_BARE = re.compile(rf"[=*`$\s]*(?P<value>{_NUMBER}%?)[*`$.\s]*")
_COMPARED = re.compile(
    r"(?P<value>[-−]?[$€£¥]?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[A-Z][\w'’-]+(?: [A-Z][\w'’-]+){0,2})"
    r"\s+(?:is|was|has|weighs)\s+(?:\w+er|more|less)\b.{0,60}\bthan\b.{1,60}"
)
_DOUBT_BEFORE_CUE = re.compile(
    r"^[\s*_]*(?:wait|hmm|actually|no|but)\b.{0,400}?[,.;] (?=(?:so|thus|hence|therefore|which means)\b)", re.IGNORECASE
)
_INEQUALITY = re.compile(r"[-−+*/^().\d\sA-Za-zπ√∞]{1,30}(?:[<>≤≥]=?[-−+*/^().\d\sA-Za-zπ√∞]{1,30}){1,2}")
_EXCEPT = re.compile(r"\b(?:is|are)\s+((?:all|any|every)\s[^,;]{1,60}\b(?:except|but|with|such that)\b.{1,40})$")


def said_yes_or_no(text: str) -> str | None:
    """The yes or no that a paragraph begins with."""
    word = YES_NO.match(text)
    return word["value"] if word else None


def ended_yes_or_no(text: str) -> str | None:
    """The yes or no that a line ends with, as a sentence or behind "so"."""
    word = _ENDS_YES_OR_NO.search(text[-MAX_LINE:])
    return word[1] if word else None


def said_true_or_false(text: str) -> str | None:
    """The one of the two words that a line uses, turned round behind "not"."""
    words = list(_TRUE_OR_FALSE.finditer(text))
    if len({word[2].casefold() for word in words}) != 1:
        return None
    word = str(words[-1][2])
    return ("False" if word.casefold() == "true" else "True") if words[-1][1] else word


def number_alone(line: str) -> str | None:
    """A number and nothing else."""
    number = _BARE.fullmatch(re.sub(r"\s+", " ", line[-MAX_LINE:]).strip())
    return number["value"] if number else None


def box_without_braces(line: str) -> str | None:
    """What follows \\boxed without braces: "\\boxed42", "\\boxed[42]"."""
    box = re.search(r"\\boxed\s*(?:\[([^\[\]\n]{1,80})\]|(-?\d[\d.,/]*\d|-?\d|[A-Z]\b))", line)
    return (box[1] or box[2]) if box else None


def number_in_words(line: str) -> str | None:
    """The value of the last equation, or the one number, in a line of two words or more."""
    words = re.findall(r"(?<![\\\w])[A-Za-z]{2,}|[\u3400-\u9fff]", FORMULA.sub("", line))
    sentence = closing_sentence(re.sub(r"\s*\([^()]{1,80}\)(?=\W*$)", "", line), needs_cue=False)
    if len(words) < 2 or not sentence or not re.search(r"\d", sentence):
        return None
    equation = sentence.rpartition("=")[2].strip() if re.search(r"\d\s*=\s*\d", sentence) else ""
    return one_quantity(equation or sentence)


def last_clause(line: str) -> str | None:
    """The number in a last clause that concludes: "48 in April and 24 in May, so 72 altogether"."""
    *_, clause = _CLAUSE.split(closing_sentence(line, needs_cue=False) or "")
    return one_quantity(clause) if clause and _CLAUSE.search(line) else None


def only_code(text: str) -> str | None:
    """The content of a text that is one code block."""
    block = re.fullmatch(r"\s*```[^\n`]*\n((?:(?!```).)+?)\n?```\s*", text, re.DOTALL)
    return block[1].strip("\n") if block else None


def is_reply(line: str) -> bool:
    """Whether a text of one line can be an answer: no question, and nothing said about oneself."""
    return bool(line.strip()) and not line.rstrip().endswith(("?", "？")) and not _NO_REPLY.match(line)


def displayed(text: str) -> str | None:
    """The formula that a text ends with where a colon or a verb announced it: "so the inverse is:\n\n\\[ ... \\]"."""
    formula = _DISPLAYED.search(text[-2 * MAX_LINE :])
    is_one = formula and "\\]" not in formula[1] and "$$" not in formula[1]
    return formula[1].rstrip(" .") if formula and is_one else None


def closing_sentence(line: str, *, needs_cue: bool = True) -> str | None:
    """The last sentence of a line, without the "So" or "In total" that it begins with.

    needs_cue: None where it does not begin so.
    """
    line = re.sub(r"\s+", " ", line[-MAX_LINE:]).strip()
    sentence = re.split(r"(?<=[.?])\s+|(?<=[^\d\s]!)\s+|。", line.rstrip("。"))[-1].rstrip(" .!").replace("{,}", ",")
    sentence = _DOUBT_BEFORE_CUE.sub("", sentence)  # "Wait, the height is 5, so the area should be 30."
    cue = _CLOSING_CUE.match(sentence)
    if not cue:
        return None if needs_cue else sentence
    return sentence[cue.end() :].strip(" ,，:") if cue[0].isascii() else sentence


def one_in_bold(sentence: str) -> str | None:
    """The one thing in bold."""
    bold = _BOLD.findall(sentence)
    return (str(bold[0]).strip(" .:") or None) if len(bold) == 1 else None


def one_code_span(sentence: str) -> str | None:
    """The one thing between backquotes, where nothing is bold."""
    spans = _CODE_SPAN.findall(sentence)
    return (str(spans[0]).strip(" .:") or None) if len(spans) == 1 and not _BOLD.search(sentence) else None


def inequality(sentence: str) -> str | None:
    """An inequality and nothing else."""
    return sentence if _INEQUALITY.fullmatch(sentence) and not re.search(r"[A-Za-z]{3}", sentence) else None


def compared(sentence: str) -> str | None:
    """What is larger, older, more, ... than something else."""
    comparison = _COMPARED.fullmatch(sentence)
    return comparison["value"] if comparison else None


def excepted(sentence: str) -> str | None:
    """All of a kind but some: "all real numbers except x = 2"."""
    exception = _EXCEPT.search(sentence)
    return exception[1] if exception else None


def equated(sentence: str) -> str | None:
    """What stands behind the last verb that equates, where that is a number or a formula."""
    words = FORMULA.sub(lambda formula: "$" * len(formula[0]), sentence)
    for verb in reversed(list(EQUATES.finditer(words))):
        if FORMULA.search(sentence, verb.end()) and "=" not in verb[0] and not words[verb.end() :].startswith("$"):
            continue
        value = joined_formulas(sentence[verb.end() :], only=True) or value_of(sentence[verb.end() :])
        value = value and _PLACE.sub(r"\1", value)
        if value and len(value) <= 80 and re.match(r"[-+−]?[\d$€£¥\\(\[{|]|[a-z](?:\s*[=^+*/-]|$)|pi\b|π", value):
            return value
    return None


def formulas(sentence: str) -> str | None:
    """Its formulas: one, or several joined by "and" and "or"."""
    return joined_formulas(sentence)


def one_quantity(sentence: str) -> str | None:
    """Its one date, or its one number with its unit, in digits or else in words."""
    dates = _DATE.findall(sentence)
    if dates:
        return str(dates[0]) if len(dates) == 1 else None
    if (number := COUNTED.search(sentence)) is not None:
        return number["value"]
    plain = re.sub(r'["“][^"“”]*["”]', '""', sentence)
    quantities = list(_QUANTITY.finditer(plain))
    if len(quantities) > 1:
        return None
    if quantities and re.match(r"\s*(?:is|are|was|were)(?:n't| not)\b", plain[quantities[0].end("value") :]):
        return None  # "91 is not a prime" is about 91, and says something else
    if quantities:
        return quantities[0]["value"].strip()
    words = _WORD_NUMBER.findall(plain)
    return str(words[0]) if len(words) == 1 and words[0].lower() != "one" else None


def one_quoted(sentence: str) -> str | None:
    """The one thing in quotation marks, at the end."""
    quoted = _QUOTED.findall(sentence)
    return str(quoted[0]).strip(" .") if len(quoted) == 1 and sentence.endswith(('"', "”")) else None


def named(sentence: str) -> str | None:
    """The name or word that the sentence ends with: "the capital is Canberra"."""
    return _only_group(_NAMED, sentence)


def after_colon(sentence: str) -> str | None:
    """What follows "is:" or "are:"."""
    return _only_group(_AFTER_COLON, sentence)


def there_is_no(sentence: str) -> str | None:
    """ "no solution" of "there is no solution"."""
    return _only_group(_THERE_IS_NO, sentence)


def _only_group(pattern: re.Pattern[str], sentence: str) -> str | None:
    whole = pattern.fullmatch(sentence)
    return whole[1] if whole else None
