"""Answers as values: bring one to one spelling, and tell whether two say the same.

`compare` knows numbers, formulas, lists, sets, tuples, intervals and their unions, matrices, equations, numbers with
units, multiple choice and plain text. Formulas are compared by value (see `expression`): numbers exactly, anything with
a variable or a root in floats. What that cannot read (sums, integrals, limits) is left to math-verify where it is
installed (see `math_verify`), because its algebra takes much longer.

Does not: know the question, so "52" and "52_8" are equal (the base is often left out) and a unit that only one side
names is ignored; judge prose beyond case, articles and punctuation; or run anything.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

from qwq_mlx.reasoning.answer.expression import MAX_CHARS, Formula, NotAFormula, is_same_value
from qwq_mlx.reasoning.answer.math_verify import is_mathematical, is_same_by_algebra

__all__ = ["compare", "normalise"]

_MAX_PARTS = 64
_MAX_DEPTH = 4  # collections in collections
_OPEN, _CLOSE = "([{", ")]}"
_UNIT = re.compile(
    r"(?P<number>[-+]?(?:\\?\$\s*)?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?|.*?[\d})])"
    r"(?:\s*\\(?:text|mbox|mathrm|textrm|textbf)\{(?P<unit>[^{}]*)\}(?:\^\{?\d\}?)?"
    r"|\s+(?P<words>[A-Za-z][A-Za-z /²³^]*\d?)|\s*(?P<han>[\u3400-\u9fff]{1,6}))\s*$",
    re.DOTALL,
)
_MONEY = re.compile(
    r"(?P<sign>\\?\$)?\s*(?P<number>\d[\d,]*(?:\.\d+)?)\s*(?:(?P<dollars>dollars?|USD)|(?P<cents>cents?|¢))?",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"[(\[<]?\s*([A-J])\s*[)\]>]?(?:[.:]\s*.*|\)\s+.*)?$", re.DOTALL)


def normalise(answer: str) -> str:
    r"""One spelling for an answer: without markup, spacing commands, thousands separators and a final full stop.

    "\text{ No. }" and "**no**" both give "no", "$1{,}000$" gives "1000". Equal spellings mean equal answers; different
    ones may still be equal (see `compare`).
    """
    text = _bare(answer)
    text = re.sub(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\s+", " ", text).strip(" .。,;:!")
    choice = _CHOICE.match(text)
    if choice and len(text) <= 4:
        return choice[1]
    text = re.sub(r"\s*([-+*/^=(){}\[\],_<>|])\s*", r"\1", text)
    return re.sub(r"\b(?:the|an?) ", "", text.casefold()) if re.search(r"[a-z]{3}|^no$", text, re.I) else text


def compare(left: str, right: str) -> bool:
    """Whether two answers say the same; symmetric, bounded time, and never an error whatever the texts.

    >>> compare("1/2", "0.5"), compare("$5", "500 cents"), compare("x = 2 or x = -2", "-2, 2")
    (True, True, True)
    """
    if normalise(left) == normalise(right):
        return True
    cents = [_cents(each) for each in (left, right)]
    if None not in cents:
        return cents[0] == cents[1]
    left, right = _bare(left), _bare(right)
    if len(left) > MAX_CHARS or len(right) > MAX_CHARS:
        return False
    return _same(left, right)


def _same(left: str, right: str, depth: int = 0) -> bool:
    if depth > _MAX_DEPTH:
        return normalise(left) == normalise(right)
    choices = [_choice(each) for each in (left, right)]
    if all(choices):
        return choices[0] == choices[1]
    if any(choices) and not all(len(normalise(each)) == 1 for each in (left, right)):
        letter, other = (left, right) if choices[0] else (right, left)
        return normalise(letter) == normalise(other)
    sides = [_sides(each) for each in (left, right)]
    if all(sides):
        return _same_equation(sides[0], sides[1], depth + 1)  # type: ignore[arg-type]
    if any(sides):
        left, right = (_value_side(each) for each in (left, right))
    parts = [_parts(each) for each in (left, right)]
    if any(kind != "one" for kind, _ in parts):
        return _same_parts(parts[0], parts[1], depth + 1)
    return _same_formula(left, right)


def _same_formula(left: str, right: str) -> bool:
    """One formula each, with or without a unit; else plain text."""
    whole = left, right
    if _is_same_read(left, right):  # "2 k" is a product as well as two kilos
        return True
    (left, left_unit), (right, right_unit) = _unit(left), _unit(right)
    if left_unit and right_unit and normalise(left_unit).rstrip("s") != normalise(right_unit).rstrip("s"):
        return False
    if any("_" in each for each in (left, right)) and not all("_" in each for each in (left, right)):
        left, right = (re.sub(r"^(\d+)_\{?\d+\}?$", r"\1", each) for each in (left, right))
    try:
        return is_same_value(Formula(left), Formula(right))
    except (NotAFormula, ArithmeticError):
        return _same_unread(left, right, *whole)


def _is_same_read(left: str, right: str) -> bool:
    try:
        return is_same_value(Formula(left), Formula(right))
    except (NotAFormula, ArithmeticError):
        return False


def _same_unread(left: str, right: str, whole_left: str, whole_right: str) -> bool:
    """Two texts of which `expression` cannot read one: words, or formulas for math-verify."""
    if is_mathematical(whole_left) or is_mathematical(whole_right):
        return is_same_by_algebra(*sorted((whole_left, whole_right)))
    return _words(left) == _words(right) != ""


def _same_parts(left: tuple[str, list[str]], right: tuple[str, list[str]], depth: int) -> bool:
    (left_kind, left_parts), (right_kind, right_parts) = left, right
    loose = {"list", "set", "one"}
    if left_kind != right_kind and not {left_kind, right_kind} <= loose:
        return False
    left_parts, right_parts = (
        list(itertools.chain.from_iterable(_both_signs(part) for part in parts)) for parts in (left_parts, right_parts)
    )
    if len(left_parts) != len(right_parts) or len(left_parts) > _MAX_PARTS:
        return False
    if left_kind in loose or left_kind == "union":
        return _same_unordered(left_parts, right_parts, depth)
    return all(_same(a, b, depth) for a, b in zip(left_parts, right_parts, strict=True))


def _same_unordered(left: Sequence[str], right: Sequence[str], depth: int) -> bool:
    remaining = list(right)
    for part in left:
        hit = next((at for at, other in enumerate(remaining) if _same(part, other, depth)), None)
        if hit is None:
            return False
        del remaining[hit]
    return True


def _same_equation(left: tuple[str, str], right: tuple[str, str], depth: int) -> bool:
    """Two equations: equal sides (in either order), or the same equation after moving and scaling."""
    if _is_name(left[0]) and _is_name(right[0]):
        return left[0].strip() == right[0].strip() and _same(left[1], right[1], depth)
    try:
        moved = [Formula(f"({a})-({b})") for a, b in (left, right)]
        return is_same_value(moved[0], moved[1], up_to_factor=True)
    except (NotAFormula, ArithmeticError):
        return _same_unread("=".join(left), "=".join(right), "=".join(left), "=".join(right))


def _bare(text: str) -> str:
    """Without the markup around a value: \\( \\), $, **, \\boxed, \\left, spacing, and one \\text around all of it."""
    text = text.strip().strip("*`").strip()
    if len(text) > MAX_CHARS:
        return text  # no value that is compared; its markup is not worth searching
    for _ in range(4):
        before = text
        text = re.sub(r"^\\[(\[]\s*(.*?)\s*\\[)\]]$", r"\1", text, flags=re.DOTALL)
        text = re.sub(r"^\$+\s*([^$]*?)\s*\$+$", r"\1", text)
        match = re.match(r"^\\(?:text|mbox|mathrm|textrm|textbf|mathbf|boxed|fbox)\s*\{(.*)\}$", text, re.DOTALL)
        if match and _is_balanced(match[1]):
            text = match[1]
        text = text.strip().rstrip(".。").strip()
        if text == before:
            break
    text = re.sub(
        r"^(?:\\text\s*\{\s*)?(?:the )?(?:final )?answer(?: is:?|:)\s*(?:\}\s*(?=\S)|(?=[^{}]+$))", "", text, flags=re.I
    )
    text = re.sub(r"^(?:\\approx|≈|(?:approximately|about|roughly)\b)\s*(?=[-\d\\$])", "", text)
    text = re.sub(r"(?<=\d)(?:\\[,;:! ]|~)(?=\d{3}(?!\d))", "", text)  # 1\,234 is a number
    text = re.sub(r"\\varnothing(?![a-z])|∅|^\\\{\s*\\\}$", r"\\emptyset", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[,!;: ]|\\q?quad(?![a-z])|~", " ", text)
    text = re.sub(r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|bold)(?![a-zA-Z])", " ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("{,}", ",")
    text = (
        re.sub(r"(?<=\d),\s*(?=\d{3}(?!\d))(?=\d{3}(?:,\s*\d{3})*(?!\d|\s*,\s*\d{1,2}(?!\d)))", "", text)
        if (re.fullmatch(r"[^\d]*\d{1,3}(?:,\s*\d{3})+(?!\d).*", text, re.DOTALL) and not _OPENS.match(text))
        else text
    )
    text = _SPACED_THOUSANDS.sub(lambda number: re.sub(r"\s", "", number[0]), text)
    return re.sub(r"\\?\$|(?<![%\\])\\?%(?!\\?%)", "", text).strip()


_SPACED_THOUSANDS = re.compile(r"^[-+−]?[$€£¥]?\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?![\d ])")
_OPENS = re.compile(r"\s*(?:\\\{|[(\[{])")


def _cents(text: str) -> Fraction | None:
    """An amount that says whether it is in dollars or cents, in cents."""
    plain = re.sub(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}", r"\1", text[:MAX_CHARS]).strip(" .*`")
    money = _MONEY.fullmatch(re.sub(r"^\$(.+)\$$", r"\1", plain))
    if money is None:
        return None
    value = Fraction(money["number"].replace(",", ""))
    return value if money["cents"] else 100 * value if money["sign"] or money["dollars"] else None


def _is_balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def _choice(text: str) -> str | None:
    """The letter of a multiple-choice answer: "(C)", "C.", "C) 12"."""
    plain = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text).strip().strip("*")
    plain = re.sub(r"^(?:option|choice|answer)\s+", "", plain, flags=re.IGNORECASE)
    match = _CHOICE.match(plain)
    return match[1] if match else None


def _sides(text: str) -> tuple[str, str] | None:
    signs = [match.start() for match in re.finditer(r"(?<![<>!=])=(?!=)", text)]
    outer = [at for at in signs if text.count("{", 0, at) == text.count("}", 0, at)]  # not the one in \sum_{k=1}
    sides = [text[: outer[0]], text[outer[0] + 1 :]] if len(outer) == 1 else []
    return (sides[0], sides[1]) if len(sides) == 2 and sides[0].strip() and sides[1].strip() else None


def _is_name(side: str) -> bool:
    """A name, or several that an answer gives together: "x", "f(x)", "(x, y)", "m + n"."""
    return bool(
        re.fullmatch(
            r"\s*(?:\\?[a-zA-Z]+|[a-zA-Z](?:_\{?\w\}?|'|\([a-z]\))"
            r"|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z]){1,7}\s*\)|[a-zA-Z](?:\s*\+\s*[a-zA-Z]){1,7})\s*",
            side,
        )
    )


def _value_side(text: str) -> str:
    """What "x = 5" or "2 + 3 = 5" says when the other answer is a value: the last side."""
    before, equals, last = text.rpartition("=")
    if last.count("{") != last.count("}"):
        return text
    return last if equals and (_is_name(before) or not re.search(r"(?<![\\a-z])[a-z](?![a-z])", before)) else text


def _unit(text: str) -> tuple[str, str]:
    match = _UNIT.fullmatch(text.strip())
    if not match:
        return text, ""
    return match["number"], (match["unit"] or match["words"] or match["han"] or "").strip()


def _parts(text: str) -> tuple[str, list[str]]:
    """What kind of collection a text is, and its parts: "one", "list", "set", "union", "matrix", or its brackets."""
    text = re.sub(r"^\s*[a-zA-Z]\s*\\in(?![a-z])", "", text).replace("∪", "\\cup ").strip()
    lines = re.fullmatch(r"\\begin\{(cases|aligned|gathered)\}(.*)\\end\{\1\}", text, re.DOTALL)
    if lines:
        return "list", [row.replace("&", " ").strip(" ,;") for row in lines[2].split("\\\\") if row.strip()]
    matrix = re.fullmatch(r"\\begin\{[pbv]?matrix\}(.*)\\end\{[pbv]?matrix\}", text, re.DOTALL)
    if matrix:
        rows = [row for row in matrix[1].split("\\\\") if row.strip()]
        return f"matrix {len(rows)}", [cell for row in rows for cell in row.split("&")]
    pieces = re.split(r"\\cup(?![a-z])", text)
    if len(pieces) > 1:
        return "union", pieces
    text = text.replace("\\{", "{").replace("\\}", "}")
    inner = text[1:-1]
    if len(text) > 1 and text[0] in _OPEN and text[-1] in _CLOSE and _encloses(text):
        parts = _at_commas(inner)
        if len(parts) > 1:
            return ("set" if text[0] == "{" else text[0] + text[-1]), parts
        if text[0] == "{":
            return "set", parts
    parts = _at_commas(re.sub(r",?\s(?:and|or)\s|\\text\s*\{\s*(?:and|or)\s*\}", ", ", text))
    if len(parts) > 1 and all(part.strip() for part in parts):
        return "list", parts
    return ("list", [text]) if "\\pm" in text or "±" in text else ("one", [text])


def _encloses(text: str) -> bool:
    depth = 0
    for at, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0:
            return at == len(text) - 1
    return False


def _at_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if char in ",;" and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _both_signs(part: str) -> list[str]:
    """ "1 \\pm 2" stands for two values."""
    signs = re.split(r"\\pm(?![a-z])|±", part)
    return [f"{signs[0]}+{signs[1]}", f"{signs[0]}-({signs[1]})"] if len(signs) == 2 else [part]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+|%", normalise(text)))
