r"""Whether an answer is right: what our reader found, compared with the reference, and math-verify's verdict beside it.

The verdict is that of `reasoning.answer`: the answer it found in the text, compared by value. math-verify (the extra
"math") reads the same text by itself and is reported beside it; where the two differ, a person is shown both. A Game of
24 is right where its expression holds exactly the numbers, each once, and comes to 24 in exact fractions; nothing of
what a model wrote is evaluated by Python.

Answers that were cut, went round in a loop or are missing are wrong, and told apart by `ending`.

Does not: read files, or ask a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from qwq_mlx.evaluate.task import Problem
from qwq_mlx.pocket.problems import evaluate
from qwq_mlx.reasoning.answer import compare, math_verify_texts
from qwq_mlx.trace.trace import Trace

__all__ = ["Ending", "ending_of", "game24_fault", "is_same_answer", "judge_answer", "math_verify_verdicts"]

Ending = Literal["answered", "cut", "looped", "unanswered", "failed"]
"""How a sample ended: with an answer; at its limit of tokens; in a loop without an answer that was asked for; by itself
without an answer; or with an error."""

_MAX_EXPRESSION = 400
_MAX_TEXT = 20_000  # characters of the end of a text that math-verify reads
_NESTED = 8
_SIGNS = {
    "×": "*",
    "·": "*",
    "∙": "*",
    "÷": "/",
    "−": "-",
    "–": "-",
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\\(": "",
    "\\)": "",
    "\\[": "",
    "\\]": "",
    "\\,": "",
    "\\;": "",
    "\\ ": "",
    "$": "",
    "[": "(",
    "]": ")",
}


def ending_of(trace: Trace) -> Ending:
    """How a trace ended. An answer that a budget or a loop's cue asked for counts as any other."""
    if trace.finish_reason in ("length", "context_full"):
        return "cut"
    if trace.finish_reason == "loop" and not trace.injections:
        return "looped"
    return "unanswered" if trace.answer is None else "answered"


def judge_answer(problem: Problem, answer: str) -> tuple[bool, str]:
    """Whether an answer solves a problem, and why.

    >>> judge_answer(Problem(id=1, question="...", answer="0.5"), "1/2")
    (True, '1/2 is 0.5')
    """
    if problem.numbers is not None:
        fault = game24_fault(problem.numbers, answer)
        return not fault, fault or f"{answer} comes to 24"
    is_right = compare(problem.expected, answer)
    return is_right, f"{answer} is {'' if is_right else 'not '}{problem.expected}"


def game24_fault(numbers: Sequence[int], answer: str) -> str:
    r"""Why an expression does not make 24 of these numbers, each used once; "" where it does.

    >>> game24_fault((4, 4, 6, 8), "(4 + 8) \\times (6 - 4) = 24")
    ''
    >>> game24_fault((4, 4, 6, 8), "4 * 6")
    'it uses 4 6, expected 4 4 6 8'
    """
    left, equals, right = _plain(answer).partition("=")
    if equals and left.strip() == "24":
        left, right = right, left
    if equals and right.strip() != "24":
        return f"it says that the result is {right.strip()[:40]!r}, expected 24"
    if len(left) > _MAX_EXPRESSION:
        return f"it has {len(left):,} characters, expected an expression"
    used = Counter(map(int, re.findall(r"\d+", left)))
    if used != Counter(numbers):
        shown = [" ".join(map(str, sorted(each))) for each in (used.elements(), numbers)]
        return f"it uses {shown[0] or 'no numbers'}, expected {shown[1]}"
    value = evaluate(left)
    if value is None:
        return "it is no expression of + - * / and brackets"
    return "" if value == 24 else f"it comes to {value}"


def _plain(answer: str) -> str:
    """An expression in LaTeX or with other signs as one of + - * / and brackets, without blanks around it."""
    text = answer[: 4 * _MAX_EXPRESSION]
    for _ in range(_NESTED):
        text, n = re.subn(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        if not n:
            break
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    return re.sub(r"(?<=[\d)\s])[xX](?=[\s\d(])", "*", text).strip(" .")


def is_same_answer(problem: Problem) -> Callable[[str, str], bool]:
    """What makes two samples of a problem vote for the same: the value; of a Game of 24 the spelling, for all claim 24.

    >>> is_same_answer(Problem(id=1, question="...", answer="0.5"))("1/2", "0.50")
    True
    """
    if problem.numbers is None:
        return compare
    return lambda one, other: _spelling(one) == _spelling(other)


def _spelling(answer: str) -> str:
    return re.sub(r"\s|=24$", "", re.sub(r"\s", "", _plain(answer)))


def math_verify_verdicts(problems: Sequence[Problem], traces: Sequence[Trace | None]) -> list[bool | None]:
    """math-verify's verdicts on texts that it reads by itself; None where it has none.

    A text with a box is given whole (its end), of another one the answer that our reader found, because math-verify's
    reader of plain text evaluates Python. Has none: a Game of 24, no answer, not installed, or not read in its limits.
    """
    asked = [
        (place, problem.answer, text)
        for place, (problem, trace) in enumerate(zip(problems, traces, strict=True))
        if problem.answer is not None and (text := _text_to_read(trace))
    ]
    verdicts: list[bool | None] = [None] * len(problems)
    answers = math_verify_texts([answer for _, answer, _ in asked], [text for _, _, text in asked])
    for (place, _, _), verdict in zip(asked, answers, strict=True):
        verdicts[place] = verdict
    return verdicts


def _text_to_read(trace: Trace | None) -> str:
    if trace is None or ending_of(trace) != "answered" or trace.answer is None:
        return ""
    end = trace.text[-_MAX_TEXT:]
    return end if "\\boxed{" in end else f"${trace.answer}$"
