"""The checkers accept every right answer and nothing else, and no problem is both trained on and scored."""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from pocket import data, traces

from qwq_mlx.errors import OptionError
from qwq_mlx.pocket import problems
from qwq_mlx.pocket.held_out import GAME24_SHA256_PREFIXES

KINDS = ("parentheses", "letters", "arithmetic", "game24")


def _python_value(expression: str) -> float | None:
    """An independent evaluator: Python's own, over characters that were checked first."""
    assert set(expression) <= set("0123456789+-*/() ")
    try:
        return float(eval(expression))  # noqa: S307 - the text was made here
    except (SyntaxError, ZeroDivisionError, TypeError):
        return None


def test_the_evaluator_agrees_with_pythons_own() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        expression = "".join(rng.choice("123 4+-*/()") for _ in range(rng.randint(1, 12)))
        tokens = "".join(expression.split())
        plain = (
            not any(pair in tokens for pair in ("**", "//", "()", "(+", "++", "-+", "*+", "/+")) and tokens[:1] != "+"
        )
        digits_apart = "  ".join(expression.split()) == expression or " " not in expression
        if not plain or not digits_apart:
            continue
        expected, found = _python_value(expression), problems.evaluate(expression)
        assert (found is None) == (expected is None), expression
        assert found is None or abs(float(found) - (expected or 0.0)) < 1e-9, expression


@pytest.mark.parametrize("text", ["", "1 +", "(1", "1)", "2 ** 3", "1 2", "a", "1/0", "__import__('os')", "²", "1;2"])
def test_nonsense_has_no_value(text: str) -> None:
    assert problems.evaluate(text) is None


def test_a_formula_longer_than_any_answer_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"expression of 801 characters, expected at most 400\. Pass one formula only"
    ):
        problems.evaluate("1" + "+1" * 400)


def test_any_placement_that_evaluates_right_solves_an_equation() -> None:
    problem = problems.parentheses([1, 2, 3, 4], "+*+", 13)
    right = ["(1 + 2) * 3 + 4 = 13", "(1 + 2) * 3 + 4", "(1+2)*3+4=13"]
    wrong = [
        None,
        "",
        "13",
        "1 + 2 * 3 + 4 = 13",
        "((1 + 2)) * 3 + 4",
        "(1 + 2) * 3 + 4 = 12",
        "(3 + 2) * 1 + 4",
        "(1 + 2) * 3 + 4 + 0",
        "(" + "1" * 500,
    ]
    assert all(problems.is_solved(problem, answer) for answer in right)
    assert not any(problems.is_solved(problem, answer) for answer in wrong)


@pytest.mark.parametrize(
    ("problem", "right", "wrong"),
    [
        (problems.letters("r", "Strawberry"), "3", ["2", "three", "3.0", None]),
        (problems.arithmetic("12 - 7 * 3"), "-9", ["15", "-9.0", None]),
        (problems.game24([4, 9, 10, 13]), "(10 - 4) * (13 - 9) = 24", ["4 * 6 = 24", "(10 - 4) * (13 - 9) = 25", "24"]),
        (problems.game24([3, 3, 8, 8]), "8 / (3 - 8 / 3)", ["8 / (3 - 8 / 3) * 1", "8 * 3", None]),
    ],
)
def test_the_other_kinds_are_judged_by_value(problem: problems.Problem, right: str, wrong: list[str | None]) -> None:
    assert problems.is_solved(problem, right)
    assert not any(problems.is_solved(problem, answer) for answer in wrong)


def test_the_box_is_the_last_whole_one() -> None:
    assert problems.boxed("\\boxed{1} then \\boxed{2} and \\boxed{3") == "2"
    assert problems.boxed("no box") is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_scored_is_never_drawn_for_training(kind: str) -> None:
    """Held out is a property of the canonical form, so no other wording, target or order brings a problem back."""
    scored = data.held_out_problems(kind, 40, seed=3, n=9 if kind == "parentheses" else None)
    assert all(problems.is_held_out(problem) for problem in scored)
    rng = random.Random(5)
    for problem in scored:
        given = problem.given
        if kind == "parentheses":
            expression = given.split("=")[0]
            twin = problems.Problem(kind, f"{expression.strip()} = {rng.randint(1, 999)}", "another question")
        elif kind == "game24":
            numbers = given.split()
            rng.shuffle(numbers)
            twin = problems.Problem(kind, " ".join(numbers), "another question")
        else:
            twin = problems.Problem(kind, given, "another question")
        assert problems.is_held_out(twin), given
    trained = (messages for messages in data.conversations(seed=11))
    questions = {message["content"] for messages in itertools.islice(trained, 400) for message in messages}
    assert not questions.intersection(problem.question for problem in scored)


def test_training_data_holds_nothing_that_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem that becomes a conversation was asked about and was free."""
    drawn: list[problems.Problem] = []
    solve = data.solve
    monkeypatch.setattr(data, "solve", lambda problem, rng: (drawn.append(problem), solve(problem, rng))[1])
    for _ in itertools.islice(data.conversations(seed=12), 500):
        pass
    assert len(drawn) > 400
    assert not any(problems.is_held_out(problem) for problem in drawn)


def test_the_articles_equation_is_held_out_with_any_target() -> None:
    expression = problems.ARTICLE_EQUATION.split("=")[0]
    for target in (479, 141, 693):
        assert problems.is_held_out(problems.Problem("parentheses", f"{expression.strip()} = {target}", ""))


def test_tree_of_thoughts_rows_are_held_out_in_any_order(shared: Path) -> None:
    lines = (shared / "problems" / "game24.csv").read_text(encoding="utf-8").splitlines()[901:1001]
    rows = [[int(number) for number in line.split(",")[1].split()] for line in lines]
    assert len(rows) == 100
    assert all(problems.is_held_out(problems.game24(sorted(row, reverse=True))) for row in rows)
    digests = {hashlib.sha256(f"game24:{' '.join(map(str, sorted(row)))}".encode()).hexdigest()[:12] for row in rows}
    assert digests == GAME24_SHA256_PREFIXES


def test_the_same_seed_gives_the_same_data() -> None:
    first, again, other = (list(itertools.islice(data.conversations(seed), 30)) for seed in (4, 4, 5))
    assert first == again != other


@pytest.mark.parametrize("kind", KINDS)
def test_every_trace_answers_its_own_problem(kind: str) -> None:
    rng = random.Random(6)
    answered = 0
    for _ in range(60):
        problem = data.draw(kind, rng)
        answer = problems.boxed(data.solve(problem, rng))
        answered += answer is not None
        assert answer is None or problems.is_solved(problem, answer), problem.given
    assert answered == 60 or (kind == "game24" and answered >= 20)  # a search of 5 first moves may give up


def test_every_line_of_a_trial_is_true() -> None:
    """The steps that the model learns are checked by an evaluator that did not write them."""
    rng = random.Random(7)
    for _ in range(20):
        text = data.solve(data.draw("parentheses", rng, n=9), rng)
        steps = [word.rstrip(",") for line in text.splitlines()[1:] for word in line.split() if word[:1] != "="]
        shown = [step for step in steps if "=" in step and set(step) <= set("0123456789+*=")]
        assert len(shown) > 5
        for step in shown:
            left, right = step.split("=")
            assert problems.evaluate(left) == int(right), step


def test_a_placement_is_listed_if_and_only_if_it_can_change_the_value() -> None:
    """Against brute force: over all placements, values that differ from the plain one come only from those listed."""
    rng = random.Random(8)
    for _ in range(30):
        numbers = [rng.randint(2, 9) for _ in range(5)]
        operators = "".join(rng.choice("+*") for _ in range(4))
        plain = problems.evaluate(traces.compact(numbers, operators))
        listed = set(traces.placements(operators))
        for place in itertools.combinations(range(5), 2):
            changes = problems.evaluate(traces.compact(numbers, operators, *place)) != plain
            assert not changes or place in listed


def test_a_problem_without_a_solution_cannot_be_solved_aloud() -> None:
    with pytest.raises(OptionError, match=r"1 \+ 2 = 9: no placement gives the target\. Pose problems with draw\(\)"):
        data.solve(problems.parentheses([1, 2], "+", 9), random.Random(1))
