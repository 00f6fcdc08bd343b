"""Loops made by splicing: a few lines of a real output, again and again, with other names, numbers, words and order.

`splice` takes lines from the middle of a text and returns the text up to there followed by mutated repetitions. All
randomness comes from the seed, so thresholds can be chosen on some seeds and reported on others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

PIECE = re.compile(r"\s?[^\W\d_]+|\d|\s+|[^\w\s]|_")
"""Cuts a text into word-like pieces, which stand for tokens where there is no tokenizer; none of the text is lost."""

_NAMES = ("Alice", "Robert", "Tom", "Maria", "Kevin", "Laura", "Peter", "Nina", "Oscar", "Ruth", "Sam", "Ivan", "Grace")
_OPENINGS = (
    "Wait, ", "Hmm, ", "Wait a minute. ", "Let me check again. ", "Alternatively, ", "No, wait. ", "But ",
    "Actually, ", "So, ", "", "Let me try again. ", "Okay, ",
)  # fmt: skip
_SYNONYMS = {
    "so": "thus", "therefore": "hence", "but": "however", "think": "believe", "maybe": "perhaps", "correct": "right",
    "seems": "looks", "because": "since", "number": "value", "total": "sum",
}  # fmt: skip


@dataclass(frozen=True)
class Splice:
    """`before` is real text, `repetitions` are mutations of its last `n_words` words."""

    before: str
    repetitions: tuple[str, ...]
    n_words: int

    def text(self, n_repetitions: int) -> str:
        """The real text and the first repetitions of the loop."""
        return "\n\n".join([self.before, *self.repetitions[:n_repetitions]])


def splice(texts: Sequence[str], *, seed: int, n_repetitions: int = 15, words: tuple[int, int] = (25, 150)) -> Splice:
    """One loop from one of the texts. A block is whole lines, `words` words long, at least half of it letters."""
    rng = random.Random(seed)
    for _ in range(10_000):
        lines = [line for line in rng.choice(texts).split("\n") if line.strip()]
        n_lines = rng.randint(1, max(8, words[1] // 16))
        if len(lines) <= n_lines:
            continue
        start = rng.randrange(len(lines) - n_lines)
        block = lines[start : start + n_lines]
        joined = " ".join(block)
        n_words = len(re.findall(r"\w+|[^\w\s]", joined))
        if words[0] <= n_words <= words[1] and sum(char.isalpha() for char in joined) >= 0.5 * len(joined):
            before = "\n\n".join(lines[: start + n_lines])
            return Splice(before, tuple(_mutated(block, rng) for _ in range(n_repetitions)), n_words)
    raise ValueError(f"none of {len(texts)} texts has a block of {words[0]} to {words[1]} words")


def _mutated(block: Sequence[str], rng: random.Random) -> str:
    """One repetition: numbers, names and words replaced consistently, a line dropped or two swapped, an opening."""
    lines, given = list(block), {}
    if len(lines) > 2 and rng.random() < 0.25:
        lines.pop(rng.randrange(len(lines)))
    if len(lines) > 2 and rng.random() < 0.25:
        at = rng.randrange(len(lines) - 1)
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    has_numbers, has_names, has_words = rng.random() < 0.6, rng.random() < 0.6, rng.random() < 0.5

    def number(found: re.Match[str]) -> str:
        n_digits = min(len(found[0]), 9)
        fresh = str(rng.randrange(10 ** (n_digits - 1) if n_digits > 1 else 0, 10**n_digits))
        return given.setdefault(found[0], fresh)

    def name(found: re.Match[str]) -> str:
        return found[1] + given.setdefault(found[2], rng.choice(_NAMES))

    for at, line in enumerate(lines):
        if has_numbers:
            line = re.sub(r"\d+", number, line)
        if has_names:
            line = re.sub(r"([a-z,'] )([A-Z][a-z]{2,})", name, line)
        if has_words:
            line = " ".join(_SYNONYMS.get(word, word) if rng.random() < 0.5 else word for word in line.split(" "))
        lines[at] = line
    return rng.choice(_OPENINGS) + "\n\n".join(lines)


def doubting(texts: Sequence[str], *, seed: int, n_repetitions: int = 40) -> str:
    """A real beginning, then "Wait, no" again and again with lines that stood there before."""
    rng = random.Random(seed)
    lines = [line for line in rng.choice(texts).split("\n") if line.strip()]
    before = lines[: max(4, len(lines) // 2)]
    openings = ("Wait, no. ", "Wait, ", "Hmm, wait. ", "No, wait. ", "But wait, ")
    again = [rng.choice(openings) + rng.choice(before[-8:]) for _ in range(n_repetitions)]
    return "\n\n".join([*before, *again])


def restating(texts: Sequence[str], *, seed: int, n_repetitions: int = 15) -> str:
    """A real beginning, then lines of other texts, each time ending in the same answer."""
    rng = random.Random(seed)
    before = rng.choice(texts)[:1500]
    value = rng.randrange(1000)
    statements = (f"So the answer is {value}.", f"Therefore, the answer is {value}.", f"This gives \\boxed{{{value}}}.")
    blocks = []
    for _ in range(n_repetitions):
        lines = [line for line in rng.choice(texts).split("\n") if line.strip() and "answer" not in line.lower()]
        at = rng.randrange(max(1, len(lines) - 4))
        blocks.append("\n\n".join([*lines[at : at + 3], rng.choice(statements)]))
    return "\n\n".join([before, *blocks])


def renamed(texts: Sequence[str], *, seed: int, n_repetitions: int = 30) -> str:
    """A real beginning, then its last long line again and again with other names and numbers, nothing else changed."""
    rng = random.Random(seed)
    lines = [line for line in rng.choice(texts).split("\n") if line.strip()]
    long = [
        at for at, line in enumerate(lines) if 60 <= len(line) <= 400 and sum(map(str.isalpha, line)) > len(line) / 2
    ]
    at = rng.choice(long) if long else 0

    def other(line: str) -> str:
        line = re.sub(r"\d+", lambda _: str(rng.randrange(100)), line)
        return re.sub(r"([a-z,'] )([A-Z][a-z]{2,})", lambda found: found[1] + rng.choice(_NAMES), line)

    return "\n\n".join([*lines[: at + 1], *(other(lines[at]) for _ in range(n_repetitions))])
