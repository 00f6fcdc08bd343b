"""Formulas that `expression` cannot read, compared by math-verify where it is installed (the extra "math").

math-verify compares by computer algebra (sympy). That reads sums, integrals, limits and more, takes seconds to load,
and on a hostile formula takes any time and memory. So it runs in a child process with 10 s of CPU, 30 s of wall time
and 1 GiB of memory, and is asked only where the quick comparison by value has no answer.

Does not: install math-verify, or overrule `expression` where that reads both sides.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwq_mlx.files.limited_child import run_limited

__all__ = ["has_math_verify", "is_mathematical", "is_same_by_algebra", "math_verify_texts"]

CHILD_CPU_S = 10
CHILD_WALL_S = 30.0
CHILD_MEMORY_BYTES = 1 << 30
_TEXTS = 64

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
    return _asked({"pairs": [pair]}, 1) == [True]


def math_verify_texts(answers: Sequence[str], texts: Sequence[str]) -> list[bool | None]:
    """Whether math-verify finds each reference answer in its text, which it reads by itself (LaTeX, boxes first).

    Up to 64 texts share a child process, whose start takes longer than they do; a text that ends it costs the others no
    verdict, for the next child goes on behind it. None where math-verify finds no answer, does not finish within the
    limits of one text, or is not installed.
    """
    if not has_math_verify():
        return [None] * len(answers)
    verdicts: list[bool | None] = []
    while (start := len(verdicts)) < len(answers):
        part = slice(start, start + _TEXTS)
        n = len(answers[part])
        verdicts += _asked({"answers": list(answers[part]), "texts": list(texts[part])}, n)
        if len(verdicts) < start + n:
            verdicts.append(None)  # of the text that ended the child
    return verdicts


def _asked(request: dict[str, Any], n: int) -> list[bool | None]:
    """The child's verdicts: n of them, or as many as it came to."""
    done = run_limited(
        Path(__file__).with_name("math_verify_child.py"),
        {**request, "cpu_s": CHILD_CPU_S},
        cpu_s=CHILD_CPU_S * n,
        memory_bytes=CHILD_MEMORY_BYTES,
        wall_s=CHILD_WALL_S * n,
    )
    return (
        []
        if done is None
        else [json.loads(line) for line in done.stdout.splitlines(keepends=True) if line[-1:] == b"\n"]
    )
