"""Runs as a child process of its own (`files.limited_child`): compare one pair of formulas with math-verify.

Reads one JSON object on stdin, writes "same" or "different" on stdout; imports nothing of this package. Only LaTeX is
parsed, by a grammar: math-verify's reader of plain expressions evaluates Python. Its own time-outs are off, because
they need signals; the limits of the process end whatever takes too long.

Does not: see files, or say why it could not compare.
"""

from __future__ import annotations

import json
import logging
import sys


def _is_same(left: str, right: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    sides = [
        parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None) for text in (left, right)
    ]
    if not all(sides):
        return False
    orders = (sides, sides[::-1])
    return any(verify(gold, other, timeout_seconds=None) for gold, other in orders)


def _main() -> None:
    request = json.load(sys.stdin)
    logging.disable(logging.CRITICAL)
    sys.stdout.write("same" if _is_same(*request["pair"]) else "different")


if __name__ == "__main__":
    _main()
