"""Verdicts: values and expressions are judged by what they say, and what did not end with an answer is told apart."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from qwq_mlx.evaluate.judge import ending_of, game24_fault, is_same_answer, judge_answer, math_verify_verdicts
from qwq_mlx.evaluate.task import Problem
from qwq_mlx.reasoning.answer import math_verify as module
from qwq_mlx.reasoning.answer import math_verify_texts

SUM = Problem(id=1, question="...", answer="\\frac{1}{2}")
PUZZLE = Problem(id=2, question="...", answer=None, numbers=(1, 3, 4, 6))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("6 / (1 - 3 / 4)", ""),
        ("24 = 6 / (1 - 3/4)", ""),
        ("\\frac{6}{1 - \\frac{3}{4}} = 24", ""),
        ("6 ÷ (1 − 3 ÷ 4)", ""),
        ("$6 \\div \\left(1 - 3 \\div 4\\right)$.", ""),
        ("6 / [1 - 3/4]", ""),
        ("6 * 4 * 1", "it uses 1 4 6, expected 1 3 4 6"),
        ("6 * 4 * 1 + 3 - 3", "it uses 1 3 3 4 6, expected 1 3 4 6"),
        ("6 + 3 + 4 + 1", "it comes to 14"),
        ("6 * 4 * (3 - 1) = 48", "it says that the result is '48', expected 24"),
        ("6 ** 4 ** 3 ** 1", "it is no expression of + - * / and brackets"),
        ("6 / (4 - 3 - 1)", "it is no expression of + - * / and brackets"),
        ("__import__('os').system('1346')", "it uses 1346, expected 1 3 4 6"),
        ("no", "it uses no numbers, expected 1 3 4 6"),
        ("(" * 300 + "1 3 4 6" + ")" * 300, "it has 607 characters, expected an expression"),
    ],
)
def test_an_expression_makes_24_of_exactly_its_numbers(answer: str, fault: str) -> None:
    assert game24_fault((1, 3, 4, 6), answer) == fault
    assert judge_answer(PUZZLE, answer)[0] is not fault


def test_expressions_are_judged_as_fractions_say() -> None:
    """Against values worked out beside the text, over random trees of four numbers."""
    rng = random.Random(24)
    verdicts = set()
    for _ in range(3000):
        numbers = [rng.randint(1, 9) for _ in range(4)]
        terms = [(str(n), Fraction(n)) for n in numbers]
        while len(terms) > 1:
            left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
            signs = [sign for sign in "+-*/" if sign != "/" or right[1]]
            terms.append(_joined(left, rng.choice(signs), right))
        [(text, value)] = terms
        is_right = not game24_fault(numbers, text)
        assert is_right is (value == 24)
        verdicts.add(is_right)
    assert verdicts == {True, False}


def _joined(left: tuple[str, Fraction], sign: str, right: tuple[str, Fraction]) -> tuple[str, Fraction]:
    value = {"+": left[1].__add__, "-": left[1].__sub__, "*": left[1].__mul__, "/": left[1].__truediv__}[sign](right[1])
    return f"({left[0]} {sign} {right[0]})", value


def test_samples_vote_by_value_and_for_24_by_spelling() -> None:
    assert is_same_answer(SUM)("1/2", "0.50")
    same = is_same_answer(PUZZLE)
    assert same("6/(1-3/4)", "6 / (1 - 3/4) = 24") and same("6 \\times 4", "6*4")
    assert not same("6 * 4 * (3 - 1) / 2", "6 / (1 - 3/4)"), "both claim 24, so their values do not tell them apart"


def trace(finish_reason: str, answer: str | None = "0.5", text: str = "", injections: Any = ()) -> Any:
    return SimpleNamespace(finish_reason=finish_reason, answer=answer, text=text, injections=injections)


def test_what_did_not_end_with_an_answer_is_told_apart() -> None:
    assert [ending_of(trace(each)) for each in ("stop", "budget", "length", "context_full", "loop")] == [
        *("answered", "answered", "cut", "cut", "looped"),
    ]
    assert ending_of(trace("stop", None)) == ending_of(trace("budget", None)) == "unanswered"
    assert ending_of(trace("loop", injections=("cue",))) == "answered", "it was asked for its answer"


def test_math_verify_reads_the_texts_by_itself() -> None:
    pytest.importorskip("math_verify")
    texts = [
        trace("stop", "0.5", "So it is \\boxed{0.5}."),
        trace("stop", "0.5", "First \\boxed{7}. No: \\boxed{\\frac{2}{3}}"),  # our reader is said to have read 0.5
        trace("stop", "0.5", "So it is a half, 0.5."),
        trace("length", None, "\\boxed{0.5}"),
        trace("stop", "0.5", "\\boxed{\\frac{1}{2}}"),
        None,
    ]
    assert math_verify_verdicts([SUM] * 6, texts) == [True, False, True, None, True, None]
    assert math_verify_verdicts([PUZZLE], texts[:1]) == [None]


def test_without_math_verify_there_are_no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_math_verify", lambda: False)
    assert math_verify_texts(["1", "2"], ["$1$", "$2$"]) == [None, None]


def test_texts_are_asked_again_behind_one_that_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever texts end it, every other text has its own verdict."""
    monkeypatch.setattr(module, "has_math_verify", lambda: True)
    monkeypatch.setattr(module, "_TEXTS", 4)

    def child(script: Any, request: Any, **limits: Any) -> Any:
        lines = [
            b"true\n" if text == answer else b""
            for text, answer in zip(request["texts"], request["answers"], strict=True)
        ]
        n = lines.index(b"") if b"" in lines else len(lines)
        return SimpleNamespace(stdout=b"".join(lines[:n]) + b"tr"[: n % 3])

    monkeypatch.setattr(module, "run_limited", child)
    for bad in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(4)):
        expected = [None if place in bad else True for place in range(6)]
        assert math_verify_texts(["1"] * 6, ["x" if place in bad else "1" for place in range(6)]) == expected
