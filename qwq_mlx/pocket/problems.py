"""The pocket model's problems: their wording, their canonical form, and checkers that do not trust the model.

Four kinds: add one pair of parentheses to an equation, count a letter in a word, plain arithmetic, the Game of 24.
A checker parses the answer with the small evaluator below (exact fractions, recursive descent) and looks only at what
the answer says, so any right answer counts. `is_held_out` splits problems by a hash of their canonical form: the
training data and the evaluation can therefore not share one.

Does not: generate reasoning (scripts/pocket/traces.py does) or run a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from qwq_mlx.errors import OptionError
from qwq_mlx.pocket.held_out import GAME24_SHA256_PREFIXES

__all__ = [
    "ARTICLE_EQUATION",
    "Problem",
    "arithmetic",
    "boxed",
    "evaluate",
    "game24",
    "is_held_out",
    "is_solved",
    "letters",
    "parentheses",
]

ARTICLE_EQUATION = "1 + 2 * 3 + 4 * 5 + 6 * 7 + 8 * 9 = 479"
"""The equation of the article that this project started from; never in the training data, with any target."""

_HELD_OUT_PER_256 = 13  # about 5 % of all problems
_MAX_EXPRESSION = 400  # characters; far above any answer, low enough that recursion stays shallow

# {} is replaced; the first wording of each kind is the article's own.
WORDINGS: dict[str, tuple[str, ...]] = {
    "parentheses": (
        "Please add a pair of parentheses to the incorrect equation: {}, to make the equation true.",
        "Add one pair of parentheses to make this equation true: {}",
        "The equation {} is wrong. Where must one pair of parentheses go to make it right?",
        "Insert one pair of parentheses so that {} becomes true.",
        "Fix the equation {} with a single pair of parentheses.",
    ),
    "letters": (
        "How many {} in {}.",
        "How many {} are in {}?",
        "How many times does the letter {} occur in the word {}?",
        "Count the letter {} in {}.",
        'How many "{}" are there in "{}"?',
    ),
    "arithmetic": (
        "What is {}?",
        "Calculate {}.",
        "Compute {}",
        "How much is {}?",
        "{} = ?",
    ),
    "game24": (
        "Use the numbers {} and basic arithmetic (+ - * /) to make 24.",
        "Play the Game of 24 with {}.",
        "Make 24 from {}, using each number once.",
        "Game of 24: {}",
        "Combine {} with +, -, * and / to get 24.",
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: `kind` is a key of WORDINGS, `given` its canonical form, `question` the text for the model."""

    kind: str
    given: str
    question: str


def parentheses(numbers: Sequence[int], operators: str, target: int, *, wording: int = 0) -> Problem:
    """An equation of `numbers` joined by `operators` ("+" or "*" each) that should equal `target`."""
    equation = f"{joined(numbers, operators)} = {target}"
    return Problem("parentheses", equation, _worded("parentheses", wording, equation))


def letters(letter: str, word: str, *, wording: int = 0) -> Problem:
    """How often `letter` occurs in `word`."""
    return Problem("letters", f"{letter} {word}", _worded("letters", wording, letter, word))


def arithmetic(expression: str, *, wording: int = 0) -> Problem:
    """The value of an expression of two or three whole numbers."""
    return Problem("arithmetic", expression, _worded("arithmetic", wording, expression))


def game24(numbers: Sequence[int], *, wording: int = 0) -> Problem:
    """Make 24 from four numbers, each used once."""
    given = " ".join(map(str, numbers))
    return Problem("game24", given, _worded("game24", wording, given))


def _worded(kind: str, wording: int, *parts: str) -> str:
    return WORDINGS[kind][wording % len(WORDINGS[kind])].format(*parts)


def joined(numbers: Sequence[int], operators: str) -> str:
    """`numbers` with `operators` between them, spaced: "1 + 2 * 3"."""
    return str(numbers[0]) + "".join(
        f" {operator} {number}" for operator, number in zip(operators, numbers[1:], strict=True)
    )


def is_held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the evaluation and must never be trained on.

    The canonical form ignores the wording, an equation's target, and the order of the Game of 24's numbers, so a
    held-out problem has no twin in training. The article's own expression is always held out.
    """
    form = _canonical(problem)
    if form == _canonical(Problem("parentheses", ARTICLE_EQUATION, "")):
        return True
    share = 64 if problem.kind == "game24" else _HELD_OUT_PER_256  # few multisets exist: hold out a quarter
    digest = hashlib.sha256(form.encode())
    return digest.digest()[0] < share or digest.hexdigest()[:12] in GAME24_SHA256_PREFIXES


def _canonical(problem: Problem) -> str:
    given = problem.given
    if problem.kind == "parentheses":
        given = given.split("=")[0].replace(" ", "")
    elif problem.kind == "game24":
        given = " ".join(sorted(given.split(), key=int))
    return f"{problem.kind}:{given}"


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...} in `text`, or None."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return boxes[-1].strip() if boxes else None


def is_solved(problem: Problem, answer: str | None) -> bool:
    """Whether `answer` (the content of the box) solves the problem; None and nonsense do not."""
    if answer is None or len(answer) > _MAX_EXPRESSION:
        return False
    check = {
        "parentheses": _solves_parentheses,
        "letters": _solves_letters,
        "arithmetic": _solves_arithmetic,
        "game24": _solves_game24,
    }[problem.kind]
    return check(problem.given, answer)


def _solves_parentheses(given: str, answer: str) -> bool:
    expression, target = given.split("=")
    left, equals, right = answer.partition("=")
    if left.count("(") != 1 or left.count(")") != 1 or (equals and right.strip() != target.strip()):
        return False
    if re.sub(r"[()\s]", "", left) != re.sub(r"\s", "", expression):
        return False
    return evaluate(left) == int(target)


def _solves_letters(given: str, answer: str) -> bool:
    letter, word = given.split(" ", 1)
    return answer == str(word.lower().count(letter.lower()))


def _solves_arithmetic(given: str, answer: str) -> bool:
    value = evaluate(given)
    return value is not None and answer == str(value)


def _solves_game24(given: str, answer: str) -> bool:
    left, equals, right = answer.partition("=")
    if equals and right.strip() != "24":
        return False
    if sorted(re.findall(r"\d+", left)) != sorted(given.split()):
        return False
    return evaluate(left) == 24


def evaluate(expression: str) -> Fraction | None:
    """The exact value of +, -, *, / and parentheses over whole numbers; None where it is not such an expression.

    Written as a recursive descent over the text: an answer comes from a model and is never given to eval.
    Raises OptionError for a text longer than any answer.
    """
    if len(expression) > _MAX_EXPRESSION:
        raise OptionError(
            f"expression of {len(expression):,} characters, expected at most {_MAX_EXPRESSION}. Pass one formula only."
        )
    tokens = re.findall(r"\d+|[-+*/()]|\S", expression)
    value, rest = _sum(tokens, 0)
    return value if rest == len(tokens) else None


def _sum(tokens: list[str], at: int) -> tuple[Fraction | None, int]:
    value, at = _product(tokens, at)
    while value is not None and at < len(tokens) and tokens[at] in "+-":
        sign = 1 if tokens[at] == "+" else -1
        term, at = _product(tokens, at + 1)
        value = None if term is None else value + sign * term
    return value, at


def _product(tokens: list[str], at: int) -> tuple[Fraction | None, int]:
    value, at = _atom(tokens, at)
    while value is not None and at < len(tokens) and tokens[at] in "*/":
        divide = tokens[at] == "/"
        factor, at = _atom(tokens, at + 1)
        if factor is None or (divide and factor == 0):
            return None, at
        value = value / factor if divide else value * factor
    return value, at


def _atom(tokens: list[str], at: int) -> tuple[Fraction | None, int]:
    if at >= len(tokens):
        return None, at
    if tokens[at].isascii() and tokens[at].isdigit():
        return Fraction(int(tokens[at])), at + 1
    if tokens[at] == "-":
        value, at = _atom(tokens, at + 1)
        return (None if value is None else -value), at
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1)
        if at < len(tokens) and tokens[at] == ")":
            return value, at + 1
    return None, at
