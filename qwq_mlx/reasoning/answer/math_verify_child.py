"""Runs as a child process of its own (`files.limited_child`): compare formulas, or answers in texts, with math-verify.

Reads one JSON object on stdin: "pairs" of formulas, or "answers" and the "texts" to find them in, and "cpu_s". Writes a
line for each when it is known: true, false, or null where a text holds no answer that it can read. Imports nothing of
this package. Only LaTeX is parsed, by a grammar: math-verify's reader of plain expressions evaluates Python. Its own
time-outs are off, because a handler waits for sympy's long operations; one that takes more than cpu_s ends the process.

Does not: see files, or say why it could not compare.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from typing import Any


def _is_same(left: str, right: str) -> bool:
    sides = [_read(f"${text}$") for text in (left, right)]
    return all(sides) and any(_verified(gold, other) for gold, other in (sides, sides[::-1]))


def _holds(text: str, answer: str) -> bool | None:
    candidates = _read(text)
    return _verified(_read(f"${answer}$"), candidates) if candidates else None


def _read(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed: list[Any] = parse(text, extraction_config=config, parsing_timeout=None)
    return parsed


def _verified(gold: list[Any], other: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(gold, other, timeout_seconds=None))


def _main() -> None:
    request = json.load(sys.stdin)
    logging.disable(logging.CRITICAL)
    items = request["pairs"] if "pairs" in request else zip(request["texts"], request["answers"], strict=True)
    verdict = _is_same if "pairs" in request else _holds
    for item in items:
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])  # SIGPROF has no handler, so it ends the process
        sys.stdout.write(json.dumps(verdict(*item)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
