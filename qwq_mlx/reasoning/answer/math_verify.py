"""Formulas that `expression` cannot read, compared by math-verify where it is installed (the extra "math").

math-verify compares by computer algebra (sympy). That reads sums, integrals, limits and more, takes seconds to load,
and on a hostile formula takes any time and memory. So it runs in a child process with 10 s of CPU, 30 s of wall time
and 1 GiB of memory, and is asked only where the quick comparison by value has no answer.

Does not: install math-verify, or overrule `expression` where that reads both sides.
"""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from qwq_mlx.files.limited_child import run_limited

__all__ = ["has_math_verify", "is_mathematical", "is_same_by_algebra"]

CHILD_CPU_S = 10
CHILD_WALL_S = 30.0
CHILD_MEMORY_BYTES = 1 << 30

_MATHEMATICAL = re.compile(r"\\[a-zA-Z]|[+^=<>]|\d\s*-|-\s*\d")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf)\s*\{[^{}]*\}")


@lru_cache(maxsize=1)
def has_math_verify() -> bool:
    """Whether math-verify can be asked."""
    return importlib.util.find_spec("math_verify") is not None


def is_mathematical(text: str) -> bool:
    """Whether a text is a formula rather than words: it has a command, an operator or a relation."""
    return _MATHEMATICAL.search(_TEXT.sub(" ", text)) is not None


@lru_cache(maxsize=1024)
def is_same_by_algebra(left: str, right: str) -> bool:
    """Whether math-verify takes two LaTeX formulas for equal, in either order.

    False also where it is not installed, cannot read one of them, or did not finish within its limits: nothing is known
    then, and answers that are not known to be equal count as different.
    """
    pair = (left, right)
    is_worth_it = any("\\" in each for each in pair) and all(is_mathematical(each) or each.isdecimal() for each in pair)
    if not has_math_verify() or not is_worth_it or any(each.count("{") != each.count("}") for each in pair):
        return False
    done = run_limited(
        Path(__file__).with_name("math_verify_child.py"),
        {"pair": pair},
        cpu_s=CHILD_CPU_S,
        memory_bytes=CHILD_MEMORY_BYTES,
        wall_s=CHILD_WALL_S,
    )
    return done is not None and done.returncode == 0 and done.stdout == b"same"
