"""`python -m qwq_mlx.compare A B [C...]`: size, bits per weight, KL and agreement of one model's forms, error by layer.

The tables go to stdout, with --json one line of JSON; progress and errors go to stderr. Arguments are read before
anything heavy is imported.

Does not: convert, or rank.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qwq_mlx.errors import OptionError, QwqError

if TYPE_CHECKING:
    from qwq_mlx.compare.table import Comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        comparison = _compare(options)
    except OptionError as error:
        return _complain(f"error: {error}", 2)
    except QwqError as error:
        return _complain(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _complain("interrupted: nothing was changed.", 130)
    if options.json:
        print(json.dumps(_as_json(comparison), ensure_ascii=False))
    else:
        from qwq_mlx.compare.table import comparison_text

        print(comparison_text(comparison))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwq_mlx.compare",
        description="Compare conversions and checkpoints of one model on a text: what each takes and what it lost "
        "against the first. One layer of one model is in memory at a time.",
        epilog="Exit codes: 0 done, 1 a folder is missing or damaged, 2 wrong usage, 130 interrupted (Ctrl-C).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", metavar="DIR", nargs="+", help="a conversion or a checkpoint; the first is the reference")
    add("--reference", metavar="DIR", help="what all are compared with (default: the first)")
    add(
        "--text",
        metavar="FILE",
        help='plain text, or .jsonl with {"question": ..., "reply": ...} a line (default: a bundled text)',
    )
    add("--tokens", type=int, metavar="N", help="tokens of the text at most, context included (default: 2048)")
    add("--json", action="store_true", help="print one line of JSON in place of the tables")
    add("--quiet", action="store_true", help="on stderr only errors")
    return parser


def _compare(options: argparse.Namespace) -> Comparison:
    from qwq_mlx.compare.table import compare_models
    from qwq_mlx.quality.text import DEFAULT_POSITIONS

    is_shown = sys.stderr.isatty() and not options.quiet
    try:
        return compare_models(
            options.folders,
            reference=options.reference,
            text=options.text,
            n_positions=DEFAULT_POSITIONS if options.tokens is None else options.tokens,
            progress=_show if is_shown else None,
        )
    finally:
        if is_shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _show(done_bytes: int, total_bytes: int) -> None:
    print(f"\r\x1b[2Kcomparing {100 * done_bytes / total_bytes:3.0f} %", end="", file=sys.stderr, flush=True)


def _as_json(comparison: Comparison) -> dict[str, object]:
    value = asdict(comparison)
    for row in value["rows"]:
        row["folder"] = str(row["folder"])
    return value


def _complain(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
