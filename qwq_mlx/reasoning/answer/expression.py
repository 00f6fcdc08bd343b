"""Values of formulas as models write them, to tell whether two of them say the same.

The idea: two formulas are equal if they agree at a few fixed, irregular points for their variables. So a formula is
only evaluated, never transformed: a recursive descent over LaTeX or plain text into exact fractions where that works
and complex floats where it does not. `Formula(...)` is cheap and safe on hostile text: length, depth and the size of
exponents are bounded, and nothing is executed.

Does not: simplify, solve, or prove; formulas that differ by less than 1e-9 relatively at every point count as equal.
Limits, integrals, sums with \\sum and assumptions on variables are not understood.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from qwq_mlx.reasoning.answer.latex import MAX_CHARS, NotAFormula, tokens_of

__all__ = ["MAX_CHARS", "Formula", "NotAFormula", "is_same_value"]

_MAX_BITS = 65_536  # of an exact number; 2006! has 19,000, and answers of olympiads are of that size
_MAX_FACTORIAL = 2_500
_MAX_DEPTH = 40
_POINTS = (0.7310585786, -1.3132616875, 2.1269280110)

Number = Fraction | complex
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "ln": cmath.log,
    "exp": cmath.exp,
}
_CONSTANTS: dict[str, complex] = {"pi": cmath.pi, "e": cmath.e, "i": 1j, "infty": complex(math.inf)}


class Formula:
    """A formula, checked by evaluating it once. Raises NotAFormula for anything else."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARS:
            raise NotAFormula(f"{len(text)} characters, at most {MAX_CHARS}")
        self._tokens = tokens_of(text)
        self.names = sorted({token for kind, token in self._tokens if kind == "letter" and token not in ("e", "i")})
        self.value(_POINTS[0])

    def value(self, point: float) -> Number:
        """The value where each variable has a value of its own derived from `point`."""
        values = {name: complex(point + 0.1732050807 * at) for at, name in enumerate(self.names)}
        try:
            return _Reader(self._tokens, values).whole()
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, NotAFormula):
                raise
            raise NotAFormula(f"it has no value: {error}") from error


def is_same_value(left: Formula, right: Formula, *, up_to_factor: bool = False) -> bool:
    """Whether two formulas agree at every point; up_to_factor: or differ by one factor, as equations "... = 0" may."""
    if left.names != right.names:
        return False
    if not left.names and not up_to_factor:
        return _is_close(left.value(0), right.value(0))
    pairs = [(left.value(point), right.value(point)) for point in _POINTS]
    if up_to_factor and all(abs(complex(b)) > 1e-12 for _, b in pairs):
        first = complex(pairs[0][0]) / complex(pairs[0][1])
        return abs(first) > 1e-12 and all(_is_close(complex(a), first * complex(b)) for a, b in pairs)
    return all(_is_close(a, b) for a, b in pairs)


def _is_close(a: Number, b: Number) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return a == b or cmath.isclose(complex(a), complex(b), rel_tol=1e-9, abs_tol=1e-12)


class _Reader:
    """One evaluation: recursive descent over the tokens."""

    def __init__(self, tokens: list[tuple[str, str]], values: Mapping[str, complex]) -> None:
        self._tokens = tokens
        self._values = values
        self._at = 0
        self._depth = 0
        self._bars = 0

    def whole(self) -> Number:
        value = self._sum()
        if self._at < len(self._tokens):
            raise NotAFormula(f"{self._tokens[self._at][1]!r} after the end of the formula")
        return value

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _take(self, *expected: str) -> bool:
        if self._peek() in expected and self._at < len(self._tokens):
            self._at += 1
            return True
        return False

    def _need(self, token: str) -> None:
        if not self._take(token):
            raise NotAFormula(f"{self._peek()!r} where {token!r} belongs")

    def _sum(self) -> Number:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NotAFormula("nested too deeply")
        value = self._product()
        while self._peek() in ("+", "-") and self._peek():
            sign = 1 if self._tokens[self._at][1] == "+" else -1
            self._at += 1
            term = self._product()
            value = _both(value, term, lambda a, b, sign=sign: a + sign * b)  # type: ignore[misc]
        self._depth -= 1
        return value

    def _product(self) -> Number:
        if self._take("-"):
            return -self._product()
        if self._take("+"):
            return self._product()
        value = self._power()
        while True:
            if self._take("*", "\\cdot", "\\times"):
                value = _both(value, self._signed(), lambda a, b: a * b)
            elif self._take("/", "\\div", ":"):
                value = _both(value, self._signed(), lambda a, b: a / b)
            elif self._begins_atom():
                before = self._tokens[self._at - 1][0]
                is_mixed = before == "number" and self._peek() == "\\frac" and isinstance(value, Fraction)
                factor = self._power()
                whole = is_mixed and isinstance(factor, Fraction) and value.denominator == 1  # type: ignore[union-attr]
                value = _both(value, factor, (lambda a, b: a + b) if whole else (lambda a, b: a * b))
            else:
                return value

    def _signed(self) -> Number:
        return -self._signed() if self._take("-") else self._power()

    def _begins_atom(self) -> bool:
        if self._at >= len(self._tokens):
            return False
        kind, token = self._tokens[self._at]
        if token == "|":
            return not self._bars
        return (
            kind in ("based", "letter")
            or token in ("(", "{", "[")
            or (kind == "command" and token not in ("\\cdot", "\\times", "\\div"))
        )

    def _power(self) -> Number:
        value = self._atom()
        while True:
            if self._take("^"):
                value = _raised(value, self._argument())
            elif self._take("!"):
                value = _factorial(value)
            else:
                return value

    def _argument(self) -> Number:
        """What a command or ^ applies to: a group, or one token (one digit of a number: \\frac12)."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NotAFormula("nested too deeply")
        try:
            if self._take("-"):
                return -self._argument()
            kind, token = self._tokens[self._at] if self._at < len(self._tokens) else ("", "")
            if kind == "number" and len(token) > 1 and self._at and self._tokens[self._at - 1][1] in ("\\frac", "}"):
                split = [("number", token[0]), ("number", token[1:])]
                self._tokens = [*self._tokens[: self._at], *split, *self._tokens[self._at + 1 :]]
            return self._atom()
        finally:
            self._depth -= 1

    def _atom(self) -> Number:
        if self._at >= len(self._tokens):
            raise NotAFormula("it ends too early")
        kind, token = self._tokens[self._at]
        self._at += 1
        if kind == "number":
            return Fraction(token)
        if kind == "based":
            digits, base = token.replace("{", "").replace("}", "").split("_")
            return Fraction(int(digits, int(base)))
        if kind == "letter":
            return _CONSTANTS[token] if token in _CONSTANTS else self._values[token]
        if token in ("(", "{", "["):
            value = self._sum()
            self._need({"(": ")", "{": "}", "[": "]"}[token])
            return value
        if token == "|":
            self._bars += 1
            value = self._sum()
            self._bars -= 1
            self._need("|")
            return abs(value) if isinstance(value, Fraction) else complex(abs(value))
        return self._command(token[1:])

    def _command(self, name: str) -> Number:
        if name == "frac":
            return _both(self._argument(), self._argument(), lambda a, b: a / b)
        if name == "sqrt":
            index: Number = Fraction(2)
            if self._take("["):
                index = self._sum()
                self._need("]")
            return _raised(self._argument(), _both(Fraction(1), index, lambda a, b: a / b))
        if name in ("binom", "dbinom"):
            n, k = self._argument(), self._argument()
            if not all(isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= 1000 for x in (n, k)):
                raise NotAFormula("a binomial of other than small whole numbers")
            return Fraction(math.comb(int(n.real), int(k.real)))
        if name == "log":
            base = complex(self._argument()) if self._take("_") else complex(10)
            return cmath.log(complex(self._applied())) / cmath.log(base)
        if name in _FUNCTIONS:
            power = self._argument() if self._take("^") else Fraction(1)
            if power == -1:
                raise NotAFormula("an inverse function")
            return _raised(_FUNCTIONS[name](complex(self._applied())), power)
        if name in _CONSTANTS and name != "e":
            return _CONSTANTS[name]
        raise NotAFormula(f"\\{name}")

    def _applied(self) -> Number:
        """A function's argument: a group, or the powers that follow: \\sin 2x."""
        value = self._power()
        while self._at < len(self._tokens) and self._tokens[self._at][0] == "letter":
            value = _both(value, self._power(), lambda a, b: a * b)
        return value


def _both(a: Number, b: Number, operation: Callable[[complex, complex], complex]) -> Number:
    """Exact where both are, else in floats."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        result: Number = operation(a, b)  # type: ignore[arg-type]
    else:
        result = operation(complex(a), complex(b))
    if isinstance(result, Fraction) and result.numerator.bit_length() + result.denominator.bit_length() > _MAX_BITS:
        raise NotAFormula(f"a number of more than {_MAX_BITS:,} bits")
    return result


def _raised(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits <= _MAX_BITS:
            return base**exponent.numerator
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and base >= 0 and exponent == Fraction(1, 2):
        roots = math.isqrt(base.numerator), math.isqrt(base.denominator)
        if roots[0] ** 2 == base.numerator and roots[1] ** 2 == base.denominator:
            return Fraction(*roots)
    return complex(base) ** complex(exponent)


def _factorial(value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
        raise NotAFormula("a factorial of other than a small whole number")
    return Fraction(math.factorial(value.numerator))
