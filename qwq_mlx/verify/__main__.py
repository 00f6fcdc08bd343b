"""`python -m qwq_mlx.verify DIR`: check that a conversion is what its manifest says.

The result goes to stderr, with --json one line of JSON to stdout. Arguments are read before anything heavy is imported.

Does not: repair anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qwq_mlx.errors import OptionError, QwqError

if TYPE_CHECKING:
    from qwq_mlx.verify.check import Verification


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        found = _verify(options)
    except OptionError as error:
        return _complain(f"error: {error}", 2)
    except QwqError as error:
        return _complain(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _complain("interrupted: nothing was changed.", 130)
    if not options.quiet:
        print(_text(found), file=sys.stderr)
    if options.json:
        print(json.dumps({**asdict(found), "folder": str(found.folder)}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwq_mlx.verify",
        description="Check a conversion against its manifest: sizes and headers at once, every byte with --full, "
        "a part of them with --sample, and the packed bits against the source with --source.",
        epilog="Exit codes: 0 everything is right, 1 it is not, 2 wrong usage, 130 interrupted (Ctrl-C).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="the conversion's folder")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_true", help="read and hash every byte")
    depth.add_argument(
        "--sample", type=float, metavar="PERCENT", help="read and hash tensors drawn by lot, this part of the bytes"
    )
    add("--source", metavar="DIR", help="the checkpoint's folder: pack some of its tensors again and compare the bits")
    add("--tensors", type=int, metavar="N", help="tensors to pack again (default: 8)")
    add("--seed", type=int, metavar="N", help="which tensors are drawn (default: others each time)")
    add("--json", action="store_true", help="print the result as one line of JSON on stdout")
    add("--quiet", action="store_true", help="on stderr only errors")
    return parser


def _verify(options: argparse.Namespace) -> Verification:
    if options.source is None and options.tensors is not None:
        raise OptionError("--tensors says how many to pack again, which needs --source DIR.")
    if options.source is None and options.sample is None and options.seed is not None:
        raise OptionError("--seed says which tensors are drawn, which needs --source DIR or --sample PERCENT.")
    from qwq_mlx.verify.check import DEFAULT_TENSORS, verify_conversion

    is_long = options.full or options.sample is not None
    return verify_conversion(
        options.folder,
        full=options.full,
        sample=options.sample,
        source=options.source,
        n_tensors=DEFAULT_TENSORS if options.tensors is None else options.tensors,
        seed=options.seed,
        progress=_Counter().advance if is_long and sys.stderr.isatty() and not options.quiet else None,
    )


class _Counter:
    """Bytes read so far, on one line of the terminal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_bytes = self._shown = 0

    def advance(self, n_bytes: int) -> None:
        with self._lock:
            self._n_bytes += n_bytes
            if self._n_bytes - self._shown >= 100_000_000:
                self._shown = self._n_bytes
                print(f"\r\x1b[2K{self._n_bytes / 1e9:.1f} GB read\r", end="", file=sys.stderr, flush=True)


def _text(found: Verification) -> str:
    size = f"{found.n_files:,} files, {found.n_bytes / 1e9:.2f} GB"
    depth = "every byte is" if found.is_full else "sizes, small files and headers are (--full reads every byte)"
    lines = [f"ok: {found.folder}: {size}: {depth} as the manifest says."]
    if found.sampled:
        lines.append(f"drawn by lot and read, as the manifest says: {len(found.sampled):,} tensors")
    if found.repository:
        lines.append(f"source: {found.repository} at {found.commit}")
    if found.packed_again:
        lines.append(f"packed again from the source with the same bits: {', '.join(found.packed_again)}")
    return "\n".join(lines)


def _complain(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
