"""Problems drawn at random and written as conversations, an endless stream that a seed determines.

`conversations(seed)` yields lists of messages that end with the assistant's trace. A problem that
`qwq_mlx.pocket.problems.is_held_out` claims is drawn again, so training and evaluation cannot share one.

Does not: tokenize or pack (scripts/pocket/train.py does).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from pocket import traces
from qwq_mlx.errors import OptionError
from qwq_mlx.pocket import problems
from qwq_mlx.pocket.problems import Problem

__all__ = ["ABOUT", "KINDS", "conversations", "draw", "held_out_problems", "solve"]

ABOUT = (
    "I am only a pocket model with a few million parameters, so I can't help with that. What I can do: add one pair "
    "of parentheses to make an equation true, count a letter in a word, do plain arithmetic with two or three "
    "numbers, and play the Game of 24."
)
INTUITION = 1.5
KINDS = {"parentheses": 0.44, "game24": 0.26, "letters": 0.10, "arithmetic": 0.12, "other": 0.08}

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful mathematician. Think step by step.",
    "Answer briefly.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
)
_HERE = Path(__file__).parent
_WORDS = (_HERE / "words.txt").read_text(encoding="utf-8").splitlines()
_OTHER = (_HERE / "questions.txt").read_text(encoding="utf-8").splitlines()
_SYLLABLES = (_HERE / "syllables.txt").read_text(encoding="utf-8").splitlines()


def _word(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.25:
        return rng.choice(_WORDS)
    if roll < 0.75:
        return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 5)))[:16]
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 14)))


def _letters(rng: random.Random) -> Problem:
    word = _word(rng)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    if rng.random() < 0.1:
        word = word.capitalize()
    return letters(letter, word, rng)


def letters(letter: str, word: str, rng: random.Random) -> Problem:
    """Counting `letter` in `word`, in a random wording."""
    return problems.letters(letter, word, wording=rng.randrange(5))


def _arithmetic(rng: random.Random) -> Problem:
    operators = "".join(rng.choice("+-*") for _ in range(rng.choice((1, 1, 2))))
    near_product = [("*" in operators[max(0, i - 1) : i + 1]) for i in range(len(operators) + 1)]
    chain = operators == "**"
    numbers = [rng.randint(0, (20 if chain else 99) if product else 999) for product in near_product]
    return problems.arithmetic(problems.joined(numbers, operators), wording=rng.randrange(5))


def _parentheses(rng: random.Random, n: int) -> Problem:
    """Numbers 1 to 9 and a target that one placement gives and the plain expression does not."""
    while True:
        numbers = [rng.randint(1, 9) for _ in range(n)]
        operators = "".join(rng.choice("+*") for _ in range(n - 1))
        if rng.random() < 0.3:
            operators = ("+*" * n)[: n - 1]
        places = list(traces.placements(operators))
        if not places or not traces.trials_fit(numbers, operators):
            continue
        target = traces.trial(numbers, operators, *rng.choice(places))[1]
        if target != traces.reduce(numbers, operators).value:
            return problems.parentheses(numbers, operators, target, wording=rng.randrange(5))


def _game24(rng: random.Random) -> Problem:
    while True:
        numbers = [rng.randint(1, 13) for _ in range(4)]
        if traces.is_solvable(numbers):
            return problems.game24(numbers, wording=rng.randrange(5))


def draw(kind: str, rng: random.Random, *, n: int | None = None) -> Problem:
    """A random problem of a kind, held out or not. n: how many numbers an equation has (3 to 9, mostly 9)."""
    if kind == "parentheses":
        return _parentheses(rng, n or rng.choice((3, 4, 5, 6, 7, 7, 8, 8, 9, 9, 9)))
    return {"letters": _letters, "arithmetic": _arithmetic, "game24": _game24}[kind](rng)


def solve(problem: Problem, rng: random.Random) -> str:
    """The full text that the model should produce for a problem."""
    if problem.kind == "letters":
        reasoning, answer = traces.letters_trace(*problem.given.split(" ", 1))
    elif problem.kind == "game24":
        numbers = [int(number) for number in problem.given.split()]
        reasoning, found = traces.game24_trace(numbers, rng, intuition=INTUITION)
        if found is None:
            return reasoning
        answer = found
    else:
        expression, _, target = problem.given.partition("=")
        parts = expression.split()
        numbers, operators = [int(part) for part in parts[::2]], "".join(parts[1::2])
        if problem.kind == "parentheses":
            solved = traces.parentheses_trace(numbers, operators, int(target))
            if solved is None:
                raise OptionError(f"{problem.given}: no placement gives the target. Pose problems with draw().")
            reasoning, answer = solved
        else:
            reasoning, answer = traces.arithmetic_trace(numbers, operators)
    return reasoning + traces.answer_text(answer)


def held_out_problems(kind: str, count: int, *, seed: int, n: int | None = None) -> list[Problem]:
    """`count` distinct held-out problems of a kind, in an order that the seed determines."""
    rng = random.Random(f"held out {kind} {n} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw(kind, rng, n=n)
        if problems.is_held_out(problem):
            found.setdefault(problem.given, problem)
    return list(found.values())


def _other(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.6:
        return rng.choice(_OTHER).strip()
    if roll < 0.8:
        return " ".join(_word(rng) for _ in range(rng.randint(1, 12))) + rng.choice(("?", ".", "", "!"))
    length = rng.randint(1, 30)
    return "".join(
        chr(rng.choice((rng.randint(32, 126), rng.randint(161, 0x2FFF), rng.randint(0x4E00, 0x9FFF))))
        for _ in range(length)
    )


def _exchange(rng: random.Random) -> tuple[str, str]:
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    if kind == "other":
        return _other(rng), ABOUT
    while True:
        problem = draw(kind, rng)
        if not problems.is_held_out(problem):
            return problem.question, solve(problem, rng)


def conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """An endless stream of conversations; most have one exchange, some a system prompt or an earlier exchange."""
    rng = random.Random(f"conversations {seed}")
    while True:
        messages = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        exchanges = [_exchange(rng)]
        while rng.random() < 0.06:
            question, reply = _exchange(rng)
            if len(reply) < 500:
                exchanges.insert(0, (question, reply))
        for question, reply in exchanges:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        yield messages
