"""Texts that repeat their words and still get somewhere raise no alarm: tables, trials, code, columns, enumerations."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest
from splices import PIECE

from qwq_mlx.reasoning.loops import LoopDetector
from qwq_mlx.reasoning.loops.list_progress import MAX_CREDIT, RowWatcher

WORDS = "strawberryraspberry"


def alarms(text: str) -> list[str]:
    detector, ids = LoopDetector(), dict[str, int]()
    fed = (detector.feed(ids.setdefault(token, len(ids)), token) for token in PIECE.findall(text))
    return [loop.kind for loop in fed if loop is not None]


def lines(rows: Iterable[str]) -> str:
    return "\n".join(rows)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "remainders": lambda r: "\n\n".join(
        f"Case {n}: Suppose that n leaves the remainder {n} when divided by 60. Then n^2 leaves {n * n % 60}."
        for n in range(60)
    ),
    "gcd": lambda r: lines(
        f"{a} = {b} * {a // b} + {a % b}, so gcd({a}, {b}) = gcd({b}, {a % b})."
        for a, b in ((r.randint(100, 9999), r.randint(10, 99)) for _ in range(80))
    ),
    "primes": lambda r: lines(
        f"Is {n} a prime? It is not divisible by 2, 3, 5 or 7, so {n} is one." for n in range(101, 140, 2)
    ),
    "code without fences": lambda r: lines(f"    if x == {n}:\n        return values[{n}]" for n in range(80)),
    "SQL": lambda r: lines(
        ["```sql", *(f"INSERT INTO p (id, age) VALUES ({n}, {r.randint(1, 99)});" for n in range(120)), "```"]
    ),
    "LaTeX": lambda r: lines(f"\\[ a_{{{n}}} = a_{{{n - 1}}} + {r.randint(1, 9)} \\]" for n in range(1, 90)),
    "truth table": lambda r: lines("| " + " | ".join("TF"[n >> k & 1] for k in range(5)) + " |" for n in range(32)),
    "truth in words": lambda r: lines(
        "If " + ", ".join(f"{v} is {'true' if n >> k & 1 else 'false'}" for k, v in enumerate("ABCD")) + ", it holds."
        for n in range(16)
    ),
    "permutations": lambda r: lines(" ".join(each) for each in itertools.permutations("ABCDE")),
    "seatings": lambda r: lines(
        f"{a} sits first, {b} sits second, {c} sits third, and {d} sits last."
        for a, b, c, d in itertools.permutations(["Ann", "Bob", "Cal", "Dee"])
    ),
    "letters": lambda r: lines(
        f"Letter {at + 1} is '{char}'. The count of r is now {WORDS[: at + 1].count('r')}."
        for at, char in enumerate(WORDS)
    ),
    "halving": lambda r: lines(
        f"{n} divided by 2 is {n // 2} with a remainder of {n % 2}." for n in (r.randint(9, 99_999) for _ in range(14))
    ),
    "multiplication": lambda r: lines(
        f"{a} times {b} is {a * b}, write down {a * b % 10} and carry {a * b // 10}."
        for a, b in ((r.randint(1, 9), r.randint(1, 9)) for _ in range(40))
    ),
    "dates": lambda r: lines(
        f"January {d} is a {['Mon', 'Tues', 'Wednes', 'Thurs', 'Fri'][d % 5]}day." for d in range(1, 32)
    ),
    "game of 24": lambda r: lines(
        f"{r.randint(1, 13)} {r.choice('+-*')} {r.randint(1, 13)} = {r.randint(1, 169)}, and that is not 24."
        for _ in range(150)
    ),
    "JSON": lambda r: lines(f'  {{"id": {n}, "name": "item {n}", "price": {r.random():.2f}}},' for n in range(100)),
    "digits": lambda r: lines(str(r.randint(0, 9)) for _ in range(600)),
    "hex dump": lambda r: lines(
        f"{n * 16:08x}  " + " ".join(f"{r.randint(0, 255):02x}" for _ in range(16)) for n in range(60)
    ),
    "Chinese trials": lambda r: lines(f"当 n = {n} 时,n^2 + 1 = {n * n + 1},不是 7 的倍数。" for n in range(1, 80)),
    "powers": lambda r: lines(f"3^{n} mod 1009 = {pow(3, n, 1009)}" for n in range(1, 200)),
    "coin flips": lambda r: lines(
        f"The probability of getting exactly {k} heads in 20 flips is {math.comb(20, k)}/1048576." for k in range(21)
    ),
    "assembly": lambda r: lines(f"MOV R{r.randint(0, 7)}, #{r.randint(0, 255)}" for _ in range(160)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_progress_of_any_kind_raises_no_alarm(kind: str, seed: int) -> None:
    text = KINDS[kind](random.Random(seed))
    assert alarms(text) == []


NAMES = ("Anna", "Boris", "Clara", "David")
STEPS = (
    "Wait, maybe {} has {} apples, and then the others have none of them left.",
    "So {} takes {} coins from the pile, and the rest of them go to the others again.",
    "Let me check again if {} can be {} years old, given what they said before.",
)


@pytest.mark.parametrize("between", ["\n", "\n\n"])
@pytest.mark.parametrize("step", STEPS)
def test_the_same_step_with_other_names_and_numbers_is_a_loop_however_its_lines_are_set(
    step: str, between: str
) -> None:
    rng = random.Random(3)
    repeated = between.join(step.format(rng.choice(NAMES), rng.randint(2, 90)) for _ in range(12))
    assert alarms(f"I start with an idea.\n\n{repeated}\n") == ["variants"]


def rows(texts: Iterable[str]) -> list[bool]:
    watcher, found = RowWatcher(), []
    for text in texts:
        for word in text.split():
            watcher.word(word, word.lower())
        found.append(watcher.end_line())
    return found


def test_rows_are_new_alike_and_next_to_each_other() -> None:
    assert rows(["a b c", "a b d", "a b d", "a c", "x y"]) == [False, True, False, False, False]
    assert rows(["a b c", "", "a b d"]) == [False, False, False]
    assert rows(["1 a x b", "2 a x c", "3 a x c"]) == [False, True, False]
    assert rows(["b b c", "so b d"]) == [False, False]


def test_items_with_bullets_are_rows_across_a_blank_line_at_twice_the_cost() -> None:
    lines = ["- a b c", "", "- a b d", "", "", "- a b e", "x", "", "x"]
    assert [line for line, is_row in zip(lines, rows(lines), strict=True) if is_row] == ["- a b d", "- a b e"]
    found = rows(line for n in range(MAX_CREDIT) for line in (f"- a b{n}", ""))
    assert found.count(True) == MAX_CREDIT // 6


def test_rows_are_progress_for_a_while_only() -> None:
    found = rows(f"a b c{n}" for n in range(MAX_CREDIT))
    assert found.count(True) == MAX_CREDIT // 3
