"""Answers as values: which ones say the same, which do not, and that no text breaks the comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwq_mlx.reasoning.answer import Formula, NotAFormula, compare, extract, is_same_value, normalise
from qwq_mlx.reasoning.answer import math_verify as symbolic
from qwq_mlx.reasoning.profile import find_profile

SAME = [
    ("1.0e6", "1000000"),
    ("2.5E-3", "0.0025"),
    ("½", "1/2"),
    ("2½", "5/2"),
    ("¾", "0.75"),
    ("1 234", "1234"),
    ("$1 234 567", "1234567"),
    ("1\u202f234", "1,234"),
    ("$5", "500 cents"),
    ("\\$0.05", "5 cents"),
    ("5 dollars", "$5"),
    ("$5$", "5"),
    ("10%", "10"),
    (r"\frac{1}{2}", "1/2"),
    ("0.5", r"\frac12"),
    ("1,000", "1000"),
    (r"x=5", "5"),
    (r"\text{No}", "no"),
    ("(C)", "C"),
    (r"\text{(C)}", "C"),
    ("1,-2", "-2, 1"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("52_8", "52_{8}"),
    (r"15\mbox{ cm}^2", "15"),
    (r"\$32,\!348", "32348"),
    (r"x \in [-2,7]", "[-2, 7]"),
    ("y = 2x+3", "y=3+2x"),
    ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0"),
    (r"\frac{11+9a}{20}", "(9a+11)/20"),
    (r"90^\circ", "90"),
    (r"1\frac{4}{5}", "9/5"),
    (r"(a+5)(b+2)", "ab+2a+5b+10"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
    ("12 cm", "12"),
    ("12,000 dollars", "12000"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"\frac{20000}{\pi}", r"20000/\pi"),
    ("3 hours", "3 hour"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
    ("18.90", "\\$18.90"),
    (r"\frac 59", "5/9"),
    (r"10,\!080", "10,080"),
    ("$p - q$", "p-q"),
    ("2k+2", "2(k+1)"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(3,\\infty)\\cup(-\\infty,2)"),
    ("The man and the sheep", "man and sheep."),
    ("50\\%", "50"),
    ("C: blue", "C"),
    ("**B**", "B"),
    ("5", "5.0"),
    ("2 k", "2k"),
    ("3 - 13 x", "-13x+3"),
    ("y = - 2 x", "y=-2x"),
]
DIFFERENT = [
    ("$5", "5 cents"),
    ("5 dollars", "5 cents"),
    ("10%%", "10"),
    ("10\\%\\%", "10"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", "\\frac{1}{3 \\cdot 2^{2006}}"),
    ("10%%", "10%"),
    ("1.0e6", "100000"),
    ("2½", "1"),
    ("1 23", "123"),
    ("1 2345", "12345"),
    ("1/2", "1/3"),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("C", "D"),
    ("2", "20"),
    ("1,000", "1,001"),
    ("x", "y"),
    ("east", "west"),
    ("1,2", "1,2,3"),
    ("90", "91"),
    ("5 apples", "5 oranges"),
    ("x^2", "|x|^3"),
    ("\\sqrt{2}", "1.41"),
    ("2^{100}", "2^{100}+1"),
    ("y=2x", "y=3x"),
    ("A", "apple"),
    ("52_8", "52_6"),
    ("", "0"),
    ("1", "-1"),
    (r"\sum x - 1", r"\sum x + 1"),
    ("204_5", "204_1"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_answers_that_say_the_same_are_equal_both_ways(left: str, right: str) -> None:
    assert compare(left, right)
    assert compare(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_answers_that_differ_are_not_equal_either_way(left: str, right: str) -> None:
    assert not compare(left, right)
    assert not compare(right, left)


def test_extract_finds_the_last_box_and_nothing_where_nothing_is_said() -> None:
    preview = find_profile("qwq-preview")
    assert (
        extract("Maybe \\boxed{1}.\n\nWait.\n\n**Final Answer**\n\n\\[ \\boxed{\\frac{1}{2}} \\]", preview)
        == "\\frac{1}{2}"
    )
    assert extract("Let me think about wolves", preview) is None


def test_one_spelling_is_a_fixed_point() -> None:
    for left, right in SAME:
        for text in (left, right):
            assert normalise(normalise(text)) == normalise(text), text


@settings(deadline=None)
@given(st.fractions(), st.fractions())
def test_fractions_compare_exactly_as_fractions_do(a: Fraction, b: Fraction) -> None:
    latex = rf"\frac{{{a.numerator}}}{{{a.denominator}}}"
    assert compare(latex, f"{b.numerator}/{b.denominator}") == (a == b)
    assert compare(latex, f"{a.numerator} / {a.denominator}")


OPERATORS = st.sampled_from(["+", "-", "*"])
EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str) | st.sampled_from("xy"),
    lambda inner: st.tuples(inner, OPERATORS, inner).map(lambda parts: "(" + "".join(parts) + ")"),
    max_leaves=8,
)


@settings(deadline=None)
@given(EXPRESSIONS, EXPRESSIONS, st.integers(-50, 50), st.integers(-50, 50))
def test_formulas_that_count_as_equal_have_equal_values_everywhere(left: str, right: str, x: int, y: int) -> None:
    formulas = Formula(left), Formula(right)
    if is_same_value(*formulas):
        slow = [eval(text, {"__builtins__": {}}, {"x": x, "y": y}) for text in (left, right)]  # noqa: S307 - own text
        assert slow[0] == slow[1]
    assert is_same_value(formulas[0], Formula(f"1*({left})+0"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "words"),
        ("east", "words"),
        ("1" * 601, "601 characters, at most 600"),
        ("(" * 50 + "1", "nested too deeply"),
        ("2^" * 50 + "2", "it has no value|nested too deeply|Result too large"),
        ("1/0", "it has no value"),
        ("(1", r"'' where '\)' belongs"),
        ("1)", r"'\)' after the end"),
        ("1+", "ends too early"),
        ("\\frac{1}", "too early"),
        ("\\sum x", r"\\sum"),
        ("\\sin^{-1} x", "an inverse function"),
        ("\\binom{x}{2}", "a binomial of other than small whole numbers"),
        ("2501!", "a factorial of other than a small whole number"),
        ("(10^{9000})(10^{9000})(10^{9000})", "more than 65,536 bits"),
        ("@", "'@' at character 0"),
    ],
)
def test_what_is_no_formula_says_why(text: str, reason: str) -> None:
    with pytest.raises(NotAFormula, match=reason):
        Formula(text)


ANY = st.text(alphabet="0123456789xyABab(){}[]\\^_,.=+-*/|!$% \n:;±∪π\ud800é", max_size=40) | st.text(max_size=40)


@pytest.fixture
def without_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing by value alone, as where math-verify is not installed: no child process for every random text."""
    symbolic.is_same_by_algebra.cache_clear()
    monkeypatch.setattr(symbolic, "has_math_verify", lambda: False)


@pytest.mark.usefixtures("without_algebra")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY, ANY)
def test_no_text_breaks_the_comparison_and_its_order_does_not_matter(left: str, right: str) -> None:
    assert compare(left, right) == compare(right, left)
    assert compare(left, left)


ALGEBRA = [
    (r"\int_0^1 x\,dx", r"\frac{1}{2}", True),
    (r"\sum_{k=1}^{3} k", "6", True),
    (r"\lim_{x \to 0} x + 3", "3", True),
    (r"\int_0^1 x\,dx", r"\frac{1}{3}", False),
    (r"\sum_{k=1}^{3} k", r"\sum_{k=1}^{4} k", False),
]


@pytest.mark.parametrize(("left", "right", "is_same"), ALGEBRA)
def test_formulas_that_need_algebra_are_left_to_math_verify(left: str, right: str, is_same: bool) -> None:
    pytest.importorskip("math_verify")
    assert compare(left, right) is is_same


@pytest.mark.usefixtures("without_algebra")
@pytest.mark.parametrize(("left", "right", "is_same"), ALGEBRA)
def test_without_math_verify_they_count_as_different(left: str, right: str, is_same: bool) -> None:
    assert not compare(left, right)
    symbolic.is_same_by_algebra.cache_clear()


def test_a_formula_that_takes_for_ever_is_ended_by_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(symbolic, "CHILD_CPU_S", 2)
    assert not compare(r"\sum_{k=1}^{9} 9^{9^{9^{9^{9^{9}}}}}", "1")


def test_math_verify_is_loaded_by_no_part_of_this_process() -> None:
    module = "qwq_mlx.reasoning.answer.equivalence"
    code = f"import sys, {module} as a; a.compare('1/2', '0.5'); assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.usefixtures("without_algebra")
def test_different_reference_answers_are_told_apart(shared: Path) -> None:
    rows = (shared / "problems" / "math500_test.jsonl").read_text().splitlines()
    answers = sorted({json.loads(row)["answer"] for row in rows})
    for left, right in zip(answers, answers[7:] + answers[:7], strict=True):
        assert compare(left, f"${right}$") == compare(left, right)
        assert compare(left, rf"\[ {left} \]"), left


@pytest.mark.parametrize(
    ("left", "right", "is_same"),
    [
        ("\\approx 3.14", "3.14", True),
        ("about 12", "12", True),
        ("1\\,234\\,567", "1234567", True),
        ("1\\,23", "123", False),
        ("0.\\overline{3}", "\\frac{1}{3}", True),
        ("0.1\\overline{6}", "1/6", True),
        ("0.\\overline{3}", "0.3", False),
        ("\\varnothing", "\\{\\}", True),
        ("\\emptyset", "∅", True),
        ("\\emptyset", "0", False),
        ("(x, y) = (2, 3)", "(2, 3)", True),
        ("(x, y) = (2, 3)", "(3, 2)", False),
        ("m + n = 11", "11", True),
        ("m + n = 11", "12", False),
        ("m + 2n = 11", "11", False),
        ("36个", "36", True),
        ("\\text{The answer is } 42", "42", True),
        ("\\text{Answer: } 42", "41", False),
        ("\\begin{cases} x = 2 \\\\ y = 5 \\end{cases}", "x = 2, y = 5", True),
        ("\\begin{cases} x = 2 \\\\ y = 5 \\end{cases}", "x = 5, y = 2", False),
        ("12平方厘米", "12", True),
        ("36个", "36只", False),
        ("50\\%", "50", True),
        ("\\{3, 1\\}", "\\{1, 3\\}", True),
        ("x = 3", "3", True),
        ("1,000", "1000", True),
        ("[1, 2)", "[1, 2]", False),
    ],
)
def test_answers_are_compared_as_a_reader_does(left: str, right: str, is_same: bool) -> None:
    assert compare(left, right) is is_same
    assert compare(right, left) is is_same
