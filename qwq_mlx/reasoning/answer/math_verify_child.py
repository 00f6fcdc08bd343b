"""Runs as a child process of its own: compare one pair of formulas with math-verify under limits of CPU and memory.

Reads one JSON object on stdin, writes "same" or "different" on stdout. Started by `reasoning.symbolic`, isolated (-I);
imports nothing of this package. Only LaTeX is parsed, by a grammar: math-verify's reader of plain expressions evaluates
Python. Its own time-outs are off, because they need signals; the limits here end whatever takes too long.

Does not: see files, or say why it could not compare. On macOS the memory limit is advisory (not measured there).
"""

from __future__ import annotations

import json
import logging
import resource
import sys


def _limit(cpu_s: int, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        try:
            resource.setrlimit(kind, (memory_bytes, memory_bytes))
        except (OSError, ValueError):  # macOS refuses limits below what is mapped already
            continue


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
    _limit(request["cpu_s"], request["memory_bytes"])
    logging.disable(logging.CRITICAL)
    sys.stdout.write("same" if _is_same(*request["pair"]) else "different")


if __name__ == "__main__":
    _main()
