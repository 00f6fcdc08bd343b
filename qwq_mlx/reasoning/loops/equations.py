"""Equations between numbers, read word by word: "3^2 + 5*3 = 24", "7 times 8 is 56".

Whether one holds tells a calculation that was made from one that was only written again with other numbers.

Does not: know variables, functions or rounding; an equation with any of them is none here.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_mlx.reasoning.answer import Formula, NotAFormula, is_same_value

__all__ = ["SumReader"]

_SIGNS = {
    "+": "+", "-": "-", "−": "-", "–": "-", "*": "*", "×": "*", "·": "*", "/": "/", "÷": "/", "^": "^", "(": "(",
    ")": ")", "times": "*", "cdot": "*", "plus": "+", "minus": "-",
}  # fmt: skip
_EQUALS = frozenset(("=", "is", "equals", "gives", "makes"))
_IGNORED = frozenset(("\\", "$"))
_MAX_PARTS = 40


class SumReader:
    """Feed words; `word` yields each equation that is complete with it, as (left, right)."""

    def __init__(self) -> None:
        self._side: list[str] = []
        self._left = ""

    def word(self, text: str) -> Iterator[tuple[str, str]]:
        """Take the next word or mark."""
        if text[0].isdecimal() or text in _SIGNS:
            if len(self._side) <= _MAX_PARTS:
                self._side.append(_SIGNS.get(text, text))
            return
        if text in _IGNORED:
            return
        right = "" if len(self._side) > _MAX_PARTS else "".join(self._side).rstrip("(")
        if self._left and right:
            yield self._left, right
        has_value = len(self._side) > 1 or self._left
        self._left = right if text in _EQUALS and right and has_value else ""
        self._side.clear()

    @staticmethod
    def holds(equation: tuple[str, str]) -> bool:
        """Whether both sides have the same value, and at least one is more than a number."""
        left, right = equation
        if left.isdecimal() and right.isdecimal():
            return False
        try:
            return is_same_value(Formula(left), Formula(right))
        except (NotAFormula, ArithmeticError):
            return False
