"""What the end of an output comes to where no mark tells: a conclusion under a heading, or only a last paragraph.

`unmarked` reads what stands under "**Final Answer**" without a box. `concluded` reads a last sentence, which gives a
value if it concludes ("So", "Therefore", "In total", ...) and holds one thing to report: something in bold, quoted or
set as a formula, what its last verb equates, or its only number.

Does not: look at a whole thinking, which is full of such sentences, or understand what was asked.
"""

from __future__ import annotations

import json
import re

from qwq_mlx.reasoning.answer.sentences import MAX_LINE, stated, value_of

__all__ = ["concluded", "displayed", "json_answer", "reduced", "said_yes_or_no", "unmarked"]

_SHORT = 200  # characters of a conclusion that can be the answer as a whole
_BLOCK = 600  # characters of a list or table that is the answer as a whole

_CODE = re.compile(r"```[^\n`]*\n(.*?)\n```", re.DOTALL)
_PART = re.compile(r"\(?(?:\d|[a-h]|i{1,3}|iv)[).:]\s|[-*•|]\s?\S")
_MARKED = re.compile(r'\*\*([^*\n]{1,80})\*\*|\$([^$\n]{1,80})\$|\\\(([^\n]{1,80}?)\\\)|["“]([^"“”\n]{1,80})["”]')
_FORMULA = re.compile(r"(?<!\\)\$((?:\\\$|[^$\n]){1,120})(?<!\\)\$|\\\(([^\n]{1,120}?)\\\)")
_QUOTED = re.compile(r'["“]([^"“”\n]{1,80})["”]')
_DISPLAYED = re.compile(
    r"(?:[:\uff1a]|\b(?:is|are|be|equals|of|as|by|get|gives?|have)|[是为])\s*"
    r"(?:\\\[|\$\$)\s*(\S.{0,500}?)\s*(?:\\\]|\$\$)\s*$",
    re.DOTALL | re.IGNORECASE,
)
_CONCLUDES = re.compile(
    r"^[\s*_]*(?:(?:and|okay|ok|yes)\b,?\s*)?(?:(?:so|thus|therefore|hence|consequently|in conclusion"
    r"|in (?:total|all|summary|short)"
    r"|finally|altogether|overall|that means|this means|this gives|that gives|to summarize|in the end)\b"
    r"|所以|因此|因而|故|于是|综上|总之|最终|这样|共|一共|总共)",
    re.IGNORECASE,
)
_EQUATES = re.compile(
    r"\b(?:is|are|was|were|equals?|has to be|must be|will be|would be|can (?:only )?be|could be|becomes)"
    r"\s+(?!\b(?:not|n't)\b)|(?<![<>!=])=\s*|等于|就是|[是为]\s*",
    re.IGNORECASE,
)
_NUMBER = r"[-−]?[$€£¥]?\s?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_QUANTITY = re.compile(
    rf"(?<![\w.^_\\])(?P<value>{_NUMBER}(?:\s?(?:%|°[CF]?)|:\d\d(?:\s?[ap]\.?m\b\.?)?)?"
    r"(?P<unit>(?:\s(?!(?:in|on|at|of|by|for|to|from|and|or|as|is|are|when|if|with|because|since|that|which|who)\b)"
    r"[A-Za-z][\w/²³^]*){0,3}))",
    re.IGNORECASE,
)
_COUNTED = re.compile(r"(?:一共|总共|共|有|需要|得到|剩下)\s*(?P<value>\d[\d,.]*)\s*[\u3400-\u9fff]?")
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
_NAME = re.compile(
    r"(?:(?:the|our|its|his|her|their)\s+[^,;]{1,80}?|today|tomorrow|yesterday|it)"
    r"\s(?:is|was|must be)\s+(?P<value>[A-Z][\w'’-]*(?: [A-Z][\w'’-]*){0,3}"
    r"|(?:all|any|every) [^,;]{1,60}|the(?: [\w'’-]+){1,3}|[\w'’-]+)$"
    r"|[^:]{1,80}\b(?:is|are):\s+(?P<told>.{1,80})|there (?:is|are|exists?)\s+(?P<none>no \w+(?: \w+)?)$"
)
_BARE = re.compile(rf"[=*`$\s]*(?P<value>{_NUMBER}%?)[*`$.\s]*")
_COMPARED = re.compile(
    r"(?P<value>[-−]?[$€£¥]?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[A-Z][\w'’-]+(?: [A-Z][\w'’-]+){0,2})"
    r"\s+(?:is|was|has|weighs)\s+(?:\w+er|more|less)\b.{0,60}\bthan\b.{1,60}"
)
_REVISED = re.compile(
    r"^[\s*_]*(?:wait|hmm|actually|no|but)\b.{0,400}?[,.;] (?=(?:so|thus|hence|therefore|which means)\b)", re.IGNORECASE
)
_INEQUALITY = re.compile(r"[-−+*/^().\d\sA-Za-zπ√∞]{1,30}(?:[<>≤≥]=?[-−+*/^().\d\sA-Za-zπ√∞]{1,30}){1,2}")
_EXCEPT = re.compile(r"\b(?:is|are)\s+((?:all|any|every)\s[^,;]{1,60}\b(?:except|but|with|such that)\b.{1,40})$")
_YES_NO = re.compile(
    r"^[\s*_]*(?:(?:so|thus|therefore|hence|well|in conclusion|finally),?\s+)?"
    r"(?:(?:i|i'd|i would|we)(?: can| would)? (?:say|answer),?\s+)?"
    r"(?:the answer is\s+)?[\"“]?(?P<value>yes|no|是的|不是|是|否)(?=[\s*_]*(?:[,.:;!\"”\uff0c。]|$))",
    re.IGNORECASE,
)


def unmarked(text: str) -> str | None:
    """The value of a conclusion without a box: its code block, the answer it states, or a short first line or list.

    A longer paragraph that stands alone is the answer as a whole. Returns None where the text is longer and states
    nothing.
    """
    text = re.sub(r"\\boxed\s+(?=[^{\s])", "", text)  # a box without braces holds what follows
    formula = re.fullmatch(r"[\s*:]*(?:\\\[|\$\$)\s*(.{1,600}?)\s*(?:\\\]|\$\$)\s*", text, re.DOTALL)
    if formula and "\\]" not in formula[1]:
        return formula[1].rstrip(" .")
    code = _CODE.findall(text)
    if code:
        return json_answer(code[-1]) or str(code[-1]).strip("\n") or None
    lines = [line.strip() for line in text.strip("*_:：# \n").splitlines() if line.strip()]
    if len(lines) > 1 and all(_PART.match(line) for line in lines) and sum(map(len, lines)) <= _BLOCK:
        return "\n".join(lines)
    for line in reversed(lines):
        if (value := stated(line)) is not None:
            return value
    first = lines[0] if lines else ""
    if len(first) > _SHORT:
        return first.strip("*_ ") if len(lines) == 1 and len(first) <= _BLOCK else None
    return _told(first) or first.strip("*_`$").strip().rstrip(".。") or None


def _told(line: str) -> str | None:
    """What a short line under a heading says besides its words: the one thing marked, or what its only "is" equates."""
    marked = [next(part for part in found if part) for found in _MARKED.findall(line)]
    if len(marked) == 1:
        return marked[0].strip().strip(".。") or None
    plain = line.strip("*_`$").strip()
    if plain.startswith(("\\(", "\\[")) and plain.endswith(("\\)", "\\]")):
        return plain[2:-2].strip().rstrip(".。") or None
    if len(marked) > 1:
        found = _EQUATES.search(plain)
        return _formulas(plain[found.end() :], only=True) if found else None
    if (word := said_yes_or_no(plain)) is not None:
        return word
    verbs = list(_EQUATES.finditer(plain))
    if len(verbs) != 1 or verbs[0][0].strip() == "=":
        return None  # "x = 5" is an answer as it stands
    value = value_of(plain[verbs[0].end() :])
    return value if value and re.search(r"\d", value) and len(value) <= 60 else None


def reduced(value: str) -> str:
    """What a stated answer comes to that is a sentence: "the value of x is 9" gives "9"; any other stays."""
    counted = _COUNTED.search(value)
    if counted is not None and len(re.findall(r"\d+", value)) == 1:
        return counted["value"]
    return (_told(value) if re.match(r"[A-Za-z]{2,} ", value) else None) or value


def json_answer(code: str) -> str | None:
    """The value of "answer" or "final_answer" where a code block is a JSON object that has one."""
    try:
        found = json.loads(code) if code.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None
    values = found.items() if isinstance(found, dict) else ()
    answers = [value for key, value in values if key.casefold() in ("answer", "final_answer")]
    if not answers:
        return None
    return answers[-1] if isinstance(answers[-1], str) else json.dumps(answers[-1], ensure_ascii=False)


def displayed(text: str) -> str | None:
    """The formula that a text ends with where a colon or a verb announced it: "so the inverse is:\\n\\n\\[ ... \\]"."""
    found = _DISPLAYED.search(text[-2 * MAX_LINE :])
    return found[1].rstrip(" .") if found and "\\]" not in found[1] and "$$" not in found[1] else None


def said_yes_or_no(text: str) -> str | None:
    """The yes or no that a paragraph begins with."""
    found = _YES_NO.match(text)
    return found["value"] if found else None


def concluded(line: str) -> str | None:
    """What a closing sentence comes to: "Thus, the value of x is 7." gives "7", "So she has 12 marbles." "12 marbles".

    The last line of an output only. None unless the sentence concludes and has one value.
    """
    line = re.sub(r"\s+", " ", line[-MAX_LINE:]).strip()
    sentence = re.split(r"(?<=[.?])\s+|(?<=[^\d\s]!)\s+|。", line.rstrip("。"))[-1].rstrip(" .!").replace("{,}", ",")
    if (bare := _BARE.fullmatch(line)) is not None:
        return bare["value"]
    sentence = _REVISED.sub("", sentence)  # "Wait, the height is 5, so the area should be 30."
    opening = _CONCLUDES.match(sentence)
    if not opening:
        return None
    sentence = sentence[opening.end() :].strip(" ,\uff0c:") if opening[0].isascii() else sentence
    bold = re.findall(r"\*\*([^*\n]{1,80})\*\*", sentence)
    bold = bold or re.findall(r"`([^`\n]{1,80})`", sentence)
    if len(bold) == 1:
        return str(bold[0]).strip(" .:") or None
    if _INEQUALITY.fullmatch(sentence) and not re.search(r"[A-Za-z]{3}", sentence):
        return sentence
    if (compared := _COMPARED.fullmatch(sentence)) is not None:
        return compared["value"]
    if (excepted := _EXCEPT.search(sentence)) is not None:
        return excepted[1]
    value = _equated(sentence) or _formulas(sentence) or _only_quantity(sentence)
    quoted = _QUOTED.findall(sentence)
    if value is None and len(quoted) == 1 and sentence.endswith(('"', "”")):
        return str(quoted[0]).strip(" .")
    return value or _named(sentence)


def _equated(sentence: str) -> str | None:
    """What stands behind the last verb that equates, where that is a number or a formula."""
    words = _FORMULA.sub(lambda found: "$" * len(found[0]), sentence)
    for verb in reversed(list(_EQUATES.finditer(words))):
        if _FORMULA.search(sentence, verb.end()) and "=" not in verb[0] and not words[verb.end() :].startswith("$"):
            continue
        value = _formulas(sentence[verb.end() :], only=True) or value_of(sentence[verb.end() :])
        if value and len(value) <= 80 and re.match(r"[-+−]?[\d$€£¥\\(\[{|]|[a-z](?:\s*[=^+*/-]|$)|pi\b|π", value):
            return value
    return None


def _formulas(sentence: str, *, only: bool = False) -> str | None:
    """Its formulas: one, or several joined by "and" and "or". only: where nothing else stands in it."""
    found = [next(part for part in each if part).strip(" .") for each in _FORMULA.findall(sentence)]
    first, *between = _FORMULA.sub("\0", sentence).split("\0")
    last = between.pop() if between else ""
    if only and (first + last).strip(" ."):
        return None
    if not found or not all(re.fullmatch(r"\s*(?:,|and|or|,\s*and|,\s*or|或者?|和|、)\s*", each) for each in between):
        return None
    return ", ".join(found)


def _only_quantity(sentence: str) -> str | None:
    """Its one date, or its one number with its unit, in digits or else in words."""
    dates = _DATE.findall(sentence)
    if dates:
        return str(dates[0]) if len(dates) == 1 else None
    if (counted := _COUNTED.search(sentence)) is not None:
        return counted["value"]
    plain = re.sub(r'["“][^"“”]*["”]', '""', sentence)
    found = list(_QUANTITY.finditer(plain))
    if len(found) > 1:
        return None
    if found and re.match(r"\s*(?:is|are|was|were)(?:n't| not)\b", plain[found[0].end("value") :]):
        return None  # "91 is not a prime" is about 91, and says something else
    if found:
        return found[0]["value"].strip()
    words = _WORD_NUMBER.findall(plain)
    return str(words[0]) if len(words) == 1 and words[0].lower() != "one" else None


def _named(sentence: str) -> str | None:
    found = _NAME.fullmatch(sentence)
    return found["value"] or found["told"] or found["none"] if found else None
