"""Reasoning written out: for each kind of problem, the text that the pocket model learns to produce.

Every trace is a search or a computation whose steps are all shown and all true. The verdict of a trial restates the
target beside the result ("407+72=479, need 479. Yes!"), so that deciding it is a comparison of neighbours and not of
numbers two thousand tokens apart; prototypes without that stalled at 30 % solved.

Does not: tokenize, pack, or decide what is held out (qwq_mlx.pocket.problems does).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["answer_text", "arithmetic_trace", "game24_moves", "game24_trace", "letters_trace", "parentheses_trace"]

MAX_VALUE = 9_999
"""Equations whose trials pass this are not posed: digits are tokens, and every number must stay short."""
MAX_FIRST_MOVES = 5
"""First moves that a Game of 24 search may try before it gives up; bounds the trace."""


def answer_text(answer: str) -> str:
    """The closing lines under which QwQ-32B-Preview gives its answers."""
    return f"\n\n**Final Answer**\n\n\\[ \\boxed{{{answer}}} \\]"


# --- one pair of parentheses -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Steps:
    """A left-to-right evaluation: `shown` lists its steps ("4*5=20 3+20=23"), `value` is the result."""

    shown: list[str]
    value: int


def reduce(numbers: Sequence[int], operators: str) -> Steps:
    """Evaluate products first, then sums, each step a binary operation."""
    shown: list[str] = []
    terms = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            shown.append(f"{terms[-1]}*{number}={terms[-1] * number}")
            terms[-1] *= number
        else:
            terms.append(number)
    value = terms[0]
    for term in terms[1:]:
        shown.append(f"{value}+{term}={value + term}")
        value += term
    return Steps(shown, value)


def placements(operators: str) -> Iterator[tuple[int, int]]:
    """Pairs (first, last) of numbers to enclose that can change the value: a sum inside, a product beside it."""
    n = len(operators) + 1
    for first in range(n):
        for last in range(first + 1, n):
            inside = operators[first:last]
            beside = operators[first - 1 : first] + operators[last : last + 1]
            if "+" in inside and "*" in beside:
                yield first, last


def compact(numbers: Sequence[int], operators: str, first: int = -1, last: int = -1, space: str = "") -> str:
    """The expression, with parentheses around numbers first..last if first >= 0."""
    parts = []
    for index, number in enumerate(numbers):
        text = ("(" if index == first else "") + str(number) + (")" if index == last else "")
        parts.append(text)
        if index < len(operators):
            parts.append(f"{space}{operators[index]}{space}")
    return "".join(parts)


def trial(numbers: Sequence[int], operators: str, first: int, last: int) -> tuple[list[str], int]:
    """One placement tried: the inside, the expression that remains, its evaluation. Returns (shown steps, value)."""
    inside = reduce(numbers[first : last + 1], operators[first:last])
    left = [*numbers[:first], inside.value, *numbers[last + 1 :]]
    left_operators = operators[:first] + operators[last:]
    outside = reduce(left, left_operators)
    return [*inside.shown, compact(left, left_operators) + ":", *outside.shown], outside.value


def trials_fit(numbers: Sequence[int], operators: str) -> bool:
    """Whether no placement's steps pass MAX_VALUE (values only grow, so results suffice)."""
    return all(trial(numbers, operators, *place)[1] <= MAX_VALUE for place in placements(operators))


def parentheses_trace(numbers: Sequence[int], operators: str, target: int) -> tuple[str, str] | None:
    """The search for a placement that gives `target`: (reasoning, answer), or None where there is none."""
    plain = reduce(numbers, operators)
    lines = [
        f"I need one pair of parentheses so that {compact(numbers, operators)} becomes {target}.",
        f"Without: {' '.join(plain.shown)}, need {target}. No.",
    ]
    for first, last in placements(operators):
        steps, value = trial(numbers, operators, first, last)
        line = f"{compact(numbers, operators, first, last)}: {' '.join(steps)}, need {target}."
        if value == target:
            lines.append(f"{line} Yes!")
            solution = compact(numbers, operators, first, last, " ")
            return "\n".join(lines), f"{solution} = {target}"
        lines.append(f"{line} No.")
    return None


# --- letters and arithmetic --------------------------------------------------------------------------------------


def letters_trace(letter: str, word: str) -> tuple[str, str]:
    """Spell the word, one line a letter, with the running count."""
    count, lines = 0, [f"I go through {word} letter by letter and look for {letter}."]
    for character in word:
        hit = character.lower() == letter.lower()
        count += hit
        lines.append(f"{character}: {'yes' if hit else 'no'}, {count}")
    lines.append(f"So {letter} occurs {count} time{'' if count == 1 else 's'}.")
    return "\n".join(lines), str(count)


def arithmetic_trace(numbers: Sequence[int], operators: str) -> tuple[str, str]:
    """Products first (tens and units apart), then sums and differences from the left."""
    lines: list[str] = []
    terms, signs = [numbers[0]], [1]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            lines.append(_product_line(terms[-1], number))
            terms[-1] *= number
        else:
            terms.append(number)
            signs.append(-1 if operator == "-" else 1)
    value = terms[0]
    for sign, term in zip(signs[1:], terms[1:], strict=True):
        lines.append(f"{value}{'-' if sign < 0 else '+'}{term}={value + sign * term}")
        value += sign * term
    return "\n".join(["Step by step.", *lines, f"So it is {value}."]), str(value)


def _product_line(left: int, right: int) -> str:
    if left < 10 or right < 10:
        return f"{left}*{right}={left * right}"
    tens, units = right // 10 * 10, right % 10
    if not units:
        return f"{left}*{right}: {left}*{right // 10}={left * right // 10}, so {left * right}"
    by_tens, by_units = left * tens, left * units
    steps = f"{left}*{tens}={by_tens} {left}*{units}={by_units} {by_tens}+{by_units}={left * right}"
    return f"{left}*{right}: {steps}"


# --- the Game of 24 ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Move:
    """Two numbers of a state combined: `shown` is "9-7=2"; `rest` what is left, sorted, with the result in it."""

    left: int
    right: int
    operator: str
    value: int
    rest: tuple[int, ...]

    @property
    def shown(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.value}"


def game24_moves(state: Sequence[int]) -> list[Move]:
    """All moves from a state, each distinct one once: sums, differences >= 0, products, exact quotients."""
    moves: dict[tuple[int, int, str], Move] = {}
    for i in range(len(state)):
        for j in range(i):
            high, low = max(state[i], state[j]), min(state[i], state[j])
            rest = [number for index, number in enumerate(state) if index not in (i, j)]
            values = [("+", high + low), ("-", high - low), ("*", high * low)]
            if low > 1 and high % low == 0:
                values.append(("/", high // low))
            for operator, value in values:
                key = (high, low, operator)
                moves.setdefault(key, Move(high, low, operator, value, tuple(sorted([*rest, value]))))
    return list(moves.values())


def _solutions(state: tuple[int, ...]) -> list[list[Move]]:
    if len(state) == 1:
        return [[]] if state[0] == 24 else []
    return [[move, *tail] for move in game24_moves(state) for tail in _solutions(move.rest)]


def game24_trace(numbers: Sequence[int], rng: random.Random, *, intuition: float) -> tuple[str, str | None]:
    """Search aloud: pick a first move, go through everything that follows from it, go on with another.

    intuition: how many times likelier a first move that solves is picked than one that does not. The order is random,
    so the model learns which moves look promising; it gives up after MAX_FIRST_MOVES.
    Returns (reasoning, answer) with answer None where the search gave up.
    """
    state = tuple(sorted(numbers))
    lines = [f"I have {' '.join(map(str, state))} and need 24."]
    moves = game24_moves(state)
    winners = {move for move in moves if _solutions(move.rest)}
    order = sorted(moves, key=lambda move: rng.random() ** (1 / (intuition if move in winners else 1.0)), reverse=True)
    for first in order[:MAX_FIRST_MOVES]:
        lines.append(f"Try {first.shown}, left {' '.join(map(str, first.rest))}:")
        for second in game24_moves(first.rest):
            small, large = second.rest
            third = next((move for move in game24_moves(second.rest) if move.value == 24), None)
            if third is None:
                lines.append(f"{second.shown}, {small} {large} no")
                continue
            lines.append(f"{second.shown}, {small} {large}: {third.shown} yes!")
            build, expression = _expression(first, second, third)
            return "\n".join([*lines, f"So {build}."]), f"{expression} = 24"
        lines.append(f"{first.shown} does not work.")
    return "\n".join([*lines, f"I tried {MAX_FIRST_MOVES} first moves and give up."]), None


def _expression(first: Move, second: Move, third: Move) -> tuple[str, str]:
    """Put the moves into one formula, replacing results inwards: ("24 = 6*4 = (9-3)*4", "(9 - 3) * 4")."""
    unused = [second, first]  # a move's result is used exactly once, the later move's first

    def operands(move: Move) -> list[Move | int]:
        found: list[Move | int] = []
        for value in (move.left, move.right):
            source = next((earlier for earlier in unused if earlier.value == value), None)
            if source is not None:
                unused.remove(source)
            found.append(source if source is not None else value)
        return found

    tree = {third: operands(third)}
    for move in (second, first):
        tree[move] = operands(move)

    def text(node: Move | int, depth: int) -> str:
        if isinstance(node, int) or depth < 0:
            return str(node if isinstance(node, int) else node.value)
        left, right = (text(child, depth - 1) for child in tree[node])
        return f"({left}{node.operator}{right})"

    stages = list(dict.fromkeys(text(third, depth)[1:-1] for depth in range(3)))
    spaced = "".join(f" {c} " if c in "+-*/" else c for c in stages[-1])
    return f"24 = {' = '.join(stages)}", spaced


def is_solvable(numbers: Sequence[int]) -> bool:
    """Whether exact whole-number moves reach 24."""
    return bool(_solutions(tuple(sorted(numbers))))
