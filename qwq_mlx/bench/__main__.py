"""`python -m qwq_mlx.bench`: decode tokens per second, ours beside mlx-lm's, as a table and one JSON line.

Both go to stdout, the JSON as its last line; what runs now goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwq_mlx.bench.timing import BenchOptions
from qwq_mlx.cli.command import Command, add_output, make_parser, run_command

if TYPE_CHECKING:
    from qwq_mlx.bench.decode import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _bench)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "bench",
        description="Decode tokens per second of qwq_mlx and mlx-lm on the same weights, taking turns in one run.",
        exit_codes="0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C)",
    )
    add, default = parser.add_argument, BenchOptions()
    add("--model", metavar="FOLDER", help="model folder (default: as python -m qwq_mlx.generate)")
    add(
        "--layers",
        type=int,
        metavar="N",
        dest="n_layers",
        default=default.n_layers,
        help="layers of the QwQ-shaped random model; 0 leaves it out (default: %(default)s)",
    )
    add(
        "--tokens",
        type=int,
        metavar="N",
        dest="n_tokens",
        default=default.n_tokens,
        help="tokens per run (default: %(default)s)",
    )
    add(
        "--repeats",
        type=int,
        metavar="N",
        default=default.repeats,
        help="runs of each (default: %(default)s)",
    )
    add_output(parser)
    return parser


def _bench(command: Command) -> int:
    parsed = command.options
    options = BenchOptions(n_tokens=parsed.n_tokens, repeats=parsed.repeats, n_layers=parsed.n_layers)
    from qwq_mlx.bench.decode import bench_folder, bench_qwq_shaped, describe_machine
    from qwq_mlx.default_model import ready_model

    rows = bench_folder(ready_model(parsed.model, command.note), options, command.note)
    if options.n_layers > 0:
        rows.append(bench_qwq_shaped(options, command.note))
    print(_table(rows))
    result = {"rows": [row.as_json() for row in rows], "repeats": options.repeats, "machine": describe_machine()}
    print(json.dumps(result))
    return 0


def _table(rows: Sequence[Row]) -> str:
    """Median tokens per second, and in brackets how many times faster than it qwq_mlx is."""
    names = list(dict.fromkeys(name for row in rows for name in row.rates))
    lines = [["decode, tokens per second", "level", *names]]
    for row in rows:
        our_rate = row.rates[names[0]].median
        cells = [f"{our_rate:.1f}"]
        for name in names[1:]:
            rates = row.rates.get(name)
            cells.append("-" if rates is None else f"{rates.median:.1f} ({our_rate / rates.median:.2f}x)")
        lines.append([row.model, row.level, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


if __name__ == "__main__":
    sys.exit(main())
