"""`python -m qwq_mlx.verify DIR`: check that a conversion is what its manifest says.

The result goes to stdout, as text or with --json as one line. Arguments are read before anything heavy is imported.

Does not: repair anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qwq_mlx.cli.command import Command, add_output, make_parser, run_command
from qwq_mlx.cli.generate_flags import FOLLOW_LINKS
from qwq_mlx.errors import OptionError

if TYPE_CHECKING:
    from qwq_mlx.verify.check import Verification


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _verify)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "verify",
        description="Check a conversion against its manifest: sizes and headers at once, every byte with --full, "
        "a part of them with --sample, and the packed bits against the source with --source.",
        exit_codes="0 everything is right, 1 it is not, 2 wrong usage, 130 interrupted (Ctrl-C)",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="conversion folder")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_true", help="read and hash every byte")
    depth.add_argument(
        "--sample",
        type=float,
        metavar="PERCENT",
        help="read and hash randomly chosen tensors, this percentage of the bytes",
    )
    add(
        "--source",
        metavar="DIR",
        help="checkpoint folder or GGUF: quantize some of its tensors again and compare the bits",
    )
    add("--follow-links", action="store_true", help=FOLLOW_LINKS + " (of the source)")
    add("--tensors", type=int, metavar="N", dest="n_tensors", help="number of tensors to quantize again (default: 8)")
    add("--seed", type=int, metavar="N", help="random seed of the choice of tensors (default: random)")
    add_output(parser, json="print the result as one line of JSON")
    return parser


def _verify(command: Command) -> int:
    options = command.options
    if options.source is None and options.n_tensors is not None:
        raise OptionError("n_tensors says how many to pack again, which needs `source`.")
    if options.source is None and options.sample is None and options.seed is not None:
        raise OptionError("seed says which tensors are drawn, which needs `source` or `sample`.")
    from qwq_mlx.progress import ProgressBar
    from qwq_mlx.verify.check import DEFAULT_TENSORS, verify_conversion

    is_long = options.full or options.sample is not None
    with ProgressBar(unit="B", is_shown=is_long and command.shows_progress) as bar:
        verification = verify_conversion(
            options.folder,
            full=options.full,
            sample=options.sample,
            source=options.source,
            follow_links=options.follow_links,
            n_tensors=DEFAULT_TENSORS if options.n_tensors is None else options.n_tensors,
            seed=options.seed,
            progress=lambda n_bytes: bar.add("reading", n_bytes),
        )
    if verification.unlisted:
        command.warn(
            f"warning: {verification.folder}: {', '.join(map(repr, verification.unlisted))}: not in its manifest, and "
            "not read by a load. Nobody vouches for them; --full refuses them."
        )
    if options.json:
        print(json.dumps({**asdict(verification), "folder": str(verification.folder)}))
    else:
        print(_text(verification))
    return 0


def _text(verification: Verification) -> str:
    size = f"{verification.n_files:,} files, {verification.n_bytes / 1e9:.2f} GB"
    depth = "every byte is" if verification.is_full else "sizes, small files and headers are (--full reads every byte)"
    lines = [f"ok: {verification.folder}: {size}: {depth} as the manifest says."]
    if verification.sampled:
        lines.append(f"drawn by lot and read, as the manifest says: {len(verification.sampled):,} tensors")
    if verification.repository:
        lines.append(f"source: {verification.repository} at {verification.commit}")
    if verification.packed_again:
        lines.append(f"packed again from the source with the same bits: {', '.join(verification.packed_again)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
