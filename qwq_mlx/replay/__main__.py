"""`python -m qwq_mlx.replay RECEIPT`: run a generation again and report the first difference.

The report goes to stderr, with --json one line of JSON to stdout.

Does not: change the receipt, or write a new one (`python -m qwq_mlx.generate --receipt` does).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qwq_mlx.errors import QwqError

if TYPE_CHECKING:
    from qwq_mlx.default_model import Converter
    from qwq_mlx.replay.compare import Replay


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        found = _replay(options)
    except QwqError as error:
        return _complain(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _complain("interrupted: nothing was compared.", 130)
    if not options.quiet:
        print(_text(found), file=sys.stderr)
    if options.json:
        print(json.dumps(asdict(found), ensure_ascii=False))
    return 0 if found.difference is None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwq_mlx.replay",
        description="Run a generation again from its receipt and report the first difference.",
        epilog="Exit codes: 0 the same, 1 different, 2 it could not be compared, 130 interrupted (Ctrl-C).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("receipt", metavar="RECEIPT", help="the file that --receipt wrote")
    add("--model", metavar="DIR", help="the model (default: as for python -m qwq_mlx.generate)")
    add("--other-weights", action="store_true", help="compare though the weights are others than the receipt's")
    add("--json", action="store_true", help="print the result as one line of JSON on stdout")
    add("--quiet", action="store_true", help="on stderr only errors")
    return parser


def _replay(options: argparse.Namespace) -> Replay:
    from qwq_mlx.generate.receipt import read_receipt

    receipt = read_receipt(options.receipt)  # a damaged one is told before a model is loaded
    from qwq_mlx.default_model import ready_model
    from qwq_mlx.generate.reasoner import load

    folder = ready_model(options.model, _converter, _silent if options.quiet else _note)
    from qwq_mlx.replay.compare import check_model, replay

    reasoner = load(folder, compute_type=receipt.model["compute_type"])
    if not options.other_weights:
        check_model(reasoner, receipt)
    return replay(reasoner, receipt, progress=_progress() if sys.stderr.isatty() and not options.quiet else None)


def _converter() -> Converter:
    from qwq_mlx.convert import convert_checkpoint

    return convert_checkpoint


def _progress() -> Callable[[int, int], None]:
    def show(n_done: int, n_total: int) -> None:
        if n_done % 16 == 0 or n_done == n_total:
            text = "" if n_done >= n_total else f"{n_done:,} of {n_total:,} tokens are the same"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    return show


def _text(found: Replay) -> str:
    lines = list(found.changed)
    if found.difference is None:
        rest = "" if found.n_expected == found.n_ids else f"; the other {found.n_ids - found.n_expected:,} cannot be"
        lines.append(f"the same: {found.n_compared:,} of {found.n_ids:,} tokens were compared{rest}")
    else:
        lines.append(f"different: {found.n_compared:,} tokens are the same, then {found.difference}")
    return "\n".join(lines)


def _silent(text: str) -> None:
    """--quiet."""


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(text: str, code: int) -> int:
    _note(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
