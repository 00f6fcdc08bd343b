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

from qwq_mlx.cli.command import Command, add_output, make_parser, run_command

if TYPE_CHECKING:
    from qwq_mlx.compare.table import Comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _compare)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "compare",
        description="Compare conversions and checkpoints of one model on a text: what each takes and what it lost "
        "against the first. One layer of one model is in memory at a time.",
        exit_codes="0 done, 1 a folder is missing or damaged, 2 wrong usage, 130 interrupted (Ctrl-C)",
    )
    add = parser.add_argument
    add(
        "folders",
        metavar="DIR",
        nargs="+",
        help="conversion, checkpoint or GGUF (FILE.gguf, ollama:NAME[:TAG], "
        "lmstudio:PUBLISHER/REPO); the first is the reference",
    )
    add("--reference", metavar="DIR", help="reference model (default: the first)")
    add(
        "--text",
        metavar="FILE",
        help='plain text, or .jsonl with {"question": ..., "reply": ...} a line (default: a bundled text)',
    )
    add(
        "--tokens",
        type=int,
        metavar="N",
        dest="n_positions",
        help="maximum number of tokens of the text, context included (default: 2048)",
    )
    add_output(parser, json="print one line of JSON instead of the tables")
    return parser


def _compare(command: Command) -> int:
    from qwq_mlx.compare.table import compare_models, comparison_text
    from qwq_mlx.progress import ProgressBar
    from qwq_mlx.quality.text import DEFAULT_POSITIONS

    options = command.options
    with ProgressBar(unit="B", is_shown=command.shows_progress) as bar:
        comparison = compare_models(
            options.folders,
            reference=options.reference,
            text=options.text,
            n_positions=DEFAULT_POSITIONS if options.n_positions is None else options.n_positions,
            progress=lambda done_bytes, total_bytes: bar.show("comparing", done_bytes, total_bytes),
        )
    if options.json:
        print(json.dumps(_as_json(comparison), ensure_ascii=False))
    else:
        print(comparison_text(comparison))
    return 0


def _as_json(comparison: Comparison) -> dict[str, object]:
    value = asdict(comparison)
    for row in value["rows"]:
        row["folder"] = str(row["folder"])
    return value


if __name__ == "__main__":
    sys.exit(main())
