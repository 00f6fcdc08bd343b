"""Searches whose steps repeat every word and differ in their numbers raise no alarm, however their lines are set; the
same numbers again, or other numbers in no order and computing nothing, do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from splices import PIECE

from qwq_mlx.reasoning.loops import LoopDetector
from qwq_mlx.reasoning.loops.equations import SumReader

PRIMES = [n for n in range(2, 300) if all(n % d for d in range(2, n))][:60]


def alarms(text: str) -> list[str]:
    detector, ids = LoopDetector(), dict[str, int]()
    fed = (detector.feed(ids.setdefault(token, len(ids)), token) for token in PIECE.findall(text + "\n"))
    return [loop.kind for loop in fed if loop is not None]


def searches(rng: random.Random, end: str) -> Iterator[tuple[str, list[str]]]:
    """Kinds of searches by name. end: what stands between the lines of one step."""
    a, c = rng.randint(2, 9), rng.randint(2, 30)
    yield (
        "substitute",
        [
            f"Substitute x = {n}: {n}^2 + {a}*{n} - {c} = {n * n + a * n - c}. That is not zero, so {n} is no root."
            for n in range(1, 60)
        ],
    )
    yield (
        "substitute in three lines",
        [
            f"Substitute x = {n} into the equation:{end}{n}^2 + {a}*{n} - {c} = {n * n + a * n - c}{end}"
            f"This is not equal to 0, so x = {n} does not work."
            for n in range(1, 60)
        ],
    )
    yield "primes", [f"For p = {p}, {p} mod {a + 2} = {p % (a + 2)}, which is not what we want." for p in PRIMES]
    yield (
        "divisors",
        [f"Is {c}07 divisible by {p}? The remainder is {(c * 100 + 7) % p}, so no, it is not." for p in PRIMES],
    )
    yield (
        "pairs",
        [
            f"If a = {x} and b = {y}, then a^2 + b^2 = {x * x + y * y}, which is not equal to {c * c}."
            for x, y in itertools.product(range(1, 9), repeat=2)
        ],
    )
    yield (
        "triples",
        [
            f"Take ({x}, {y}, {z}). The sum is {x + y + z} and the product is {x * y * z}, which does not satisfy both."
            for x, y, z in itertools.combinations(range(1, 9), 3)
        ],
    )
    yield (
        "powers",
        [
            f"The last digit of 7^{n} is {pow(7, n, 10)}, so the last two digits of 7^{n} are {pow(7, n, 100):02d}."
            for n in range(1, 60)
        ],
    )
    yield (
        "countdown",
        [
            f"Suppose there are {n} cows. Then there are {60 - n} chickens, and the legs are {4 * n + 2 * (60 - n)}."
            for n in range(60, 0, -1)
        ],
    )
    yield (
        "samples in order",
        [
            f"The digit sum of {n} is {sum(map(int, str(n)))}, and that is not what we are looking for here."
            for n in sorted(rng.sample(range(100, 999), 60))
        ],
    )
    yield (
        "running sum",
        [
            f"Adding {p} to the running sum gives {total}."
            for p, total in zip(PRIMES, itertools.accumulate(PRIMES), strict=True)
        ],
    )
    draws = [tuple(rng.randint(1, 13) for _ in range(3)) for _ in range(60)]
    yield (
        "game of 24",
        [
            f"Let me try {x} + {y} = {x + y}. Then {x + y} * {z} = {(x + y) * z}, which is not 24 either."
            for x, y, z in draws
        ],
    )
    yield (
        "Chinese",
        [
            f"当 x = {n} 时，代入方程得 {n}^2 + {a}*{n} - {c} = {n * n + a * n - c}，不等于 0，所以 x = {n} 不是根。"
            for n in range(1, 60)
        ],
    )


NAMES = [name for name, _ in searches(random.Random(0), "\n")]


@pytest.mark.parametrize("end", ["\n", "\n\n"])
@pytest.mark.parametrize("name", NAMES)
def test_a_search_with_news_in_its_numbers_is_no_loop(name: str, end: str) -> None:
    for seed in range(2):
        steps = dict(searches(random.Random(seed), end))[name]
        assert alarms("Let me search systematically.\n\n" + end.join(steps)) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_few_steps_of_a_search_again_and_again_are_a_loop(name: str) -> None:
    steps = dict(searches(random.Random(0), "\n\n"))[name][:6]
    rounds = [random.Random(seed).sample(steps, 6) for seed in range(12)]  # never the same order, so no exact cycle
    assert alarms("I start.\n\n" + "\n\n".join(itertools.chain.from_iterable(rounds))) != []


@pytest.mark.parametrize("end", ["\n", "\n\n"])
def test_other_numbers_in_no_order_that_compute_nothing_are_no_progress(end: str) -> None:
    rng = random.Random(1)
    steps = [
        f"Wait, maybe it is {rng.randrange(100)} of them, and then {rng.randrange(100)} remain." for _ in range(30)
    ]
    assert alarms("I start.\n\n" + end.join(steps)) != []


@pytest.mark.parametrize(
    ("words", "equations"),
    [
        ("so 3 ^ 2 + 5 * 3 = 24 .", [("3^2+5*3", "24", True)]),
        ("7 times 8 is 56 , and", [("7*8", "56", True)]),
        ("7 \\ times 8 = 57 .", [("7*8", "57", False)]),
        ("2 + 2 = 4 = 3 + 1 .", [("2+2", "4", True), ("4", "3+1", True)]),
        ("x = 5 .", []),
        ("5 is 5 .", []),
        ("2 + 3 = x .", []),
        ("1 / 0 = 4 .", [("1/0", "4", False)]),
        (" ".join(["9 ^"] * 30) + " 9 = 1 .", []),
    ],
)
def test_equations_between_numbers_are_read_and_judged(words: str, equations: list[tuple[str, str, bool]]) -> None:
    reader = SumReader()
    found = [equation for word in words.split() for equation in reader.word(word)]
    assert [(*each, reader.holds(each)) for each in found] == equations
