"""Pass a pocket model's text through and check its answer to the founding article's equation: exit 1 if it is wrong.

    python -m qwq_mlx.generate --temp 0 --prompt "..." | python scripts/check_answer.py

The check evaluates the boxed expression itself; it does not look for a known text.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Echo stdin as it comes, then judge the last box in it."""
    from qwq_mlx.pocket.problems import ARTICLE_EQUATION, Problem, boxed, is_solved

    shown = bytearray()
    while chunk := sys.stdin.buffer.read1():  # as it comes, not line by line
        shown += chunk
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
    print()
    answer = boxed(shown.decode("utf-8", errors="replace"))
    if not is_solved(Problem("parentheses", ARTICLE_EQUATION, ""), answer):
        print(f"wrong: {answer!r} does not make {ARTICLE_EQUATION} true with one pair of parentheses", file=sys.stderr)
        return 1
    print(f"checked: {answer}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
