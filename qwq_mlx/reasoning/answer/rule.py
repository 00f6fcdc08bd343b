"""One row of a table of rules, and the walk down a table: the first row that reads something decides.

Does not: hold a table; `rules` holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["NO_ANSWER", "SURE", "Reading", "Rule", "first", "within"]

Seen = TypeVar("Seen")
Value = TypeVar("Value")

NO_ANSWER = 0.2
"""Factor on the confidence where a text is known to give no answer."""


SURE = 0.85
"""Confidence from which on a reading is sure: of such answers at most one in fifty may be wrong."""


@dataclass(frozen=True, slots=True)
class Reading(Generic[Value]):
    """What a table read: the value, the product of its rows' confidences, and their names from the outside in."""

    value: Value
    confidence: float
    rule: str


@dataclass(frozen=True, slots=True)
class Rule(Generic[Seen, Value]):
    """One way in which an answer is written.

    name: short, unique in its table.
    confidence: 0 to 1. An answer's confidence is the product over the rows that it was read by.
    matcher: returns the value, a reading of a further table, or None where the row does not apply.
    matches: what it matches, in one sentence.
    example: a text, and the answer that this row gives ("" for none).
    prompt: what was asked in the example.
    """

    name: str
    confidence: float
    matcher: Callable[[Seen], Value | Reading[Value] | None]
    matches: str
    example: tuple[str, str]
    prompt: str = ""

    def read(self, seen: Seen) -> Reading[Value] | None:
        """What this row alone reads."""
        value = self.matcher(seen)
        if value is None:
            return None
        if isinstance(value, Reading):
            return within(self, value)
        return Reading(value, self.confidence if value != "" else self.confidence * NO_ANSWER, self.name)


def first(rules: Sequence[Rule[Seen, Value]], seen: Seen) -> Reading[Value] | None:
    """What the first row that applies reads, None where no row does.

    >>> bold = Rule("bold", 0.9, lambda text: text.strip("*") if text.startswith("**") else None, "", ("**5**", "5"))
    >>> first((bold,), "**5**")
    Reading(value='5', confidence=0.9, rule='bold')
    """
    return next((reading for rule in rules if (reading := rule.read(seen)) is not None), None)


def within(rule: Rule[Seen, Value], reading: Reading[Value]) -> Reading[Value]:
    """A reading of a further table as one of the row that led to it."""
    return Reading(reading.value, rule.confidence * reading.confidence, f"{rule.name} / {reading.rule}")
