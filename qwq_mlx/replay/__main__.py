"""`python -m qwq_mlx.replay RECEIPT`: run a generation again and report the first difference.

The report goes to stdout, as text or with --json as one line.

Does not: change the receipt, or write a new one (`python -m qwq_mlx.generate --receipt` does).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qwq_mlx.cli.command import Command, add_output, end_verification, make_parser, run_command
from qwq_mlx.cli.generate_flags import FOLLOW_LINKS

if TYPE_CHECKING:
    from qwq_mlx.replay.compare import Replay


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(
        _parser(),
        arguments,
        _replay,
        interrupted=lambda options: "interrupted: nothing was compared.",
        failure_code=2,  # 1 says that there is a difference
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "replay",
        description="Run a generation again from its receipt and report the first difference.",
        exit_codes="0 the same, 1 different, 2 it could not be compared, 130 interrupted (Ctrl-C)",
    )
    add = parser.add_argument
    add("receipt", metavar="RECEIPT", help="receipt written by generate --receipt")
    add("--model", metavar="DIR", help="model folder (default: as python -m qwq_mlx.generate)")
    add("--follow-links", action="store_true", help=FOLLOW_LINKS)
    add("--other-weights", action="store_true", help="compare even if the weights differ from the receipt's")
    add_output(parser, json="print the result as one line of JSON")
    return parser


def _replay(command: Command) -> int:
    from qwq_mlx.generate.receipt import read_receipt

    options = command.options
    receipt = read_receipt(options.receipt)  # a damaged one is told before a model is loaded
    from qwq_mlx.default_model import ready_model
    from qwq_mlx.generate.reasoner import load
    from qwq_mlx.progress import ProgressBar
    from qwq_mlx.replay.compare import check_model, replay

    folder = ready_model(options.model, command.note)
    reasoner = load(folder, compute_type=receipt.model["compute_type"], follow_links=options.follow_links)
    if not options.other_weights:
        check_model(reasoner, receipt)
    with ProgressBar(unit=" tokens", is_shown=command.shows_progress) as bar:
        result = replay(reasoner, receipt, progress=lambda n_same, n_total: bar.show("comparing", n_same, n_total))
    end_verification(command, reasoner)
    if options.json:
        print(json.dumps(asdict(result), ensure_ascii=False))
    else:
        print(_text(result))
    return 0 if result.difference is None else 1


def _text(replay: Replay) -> str:
    lines = list(replay.changed)
    if replay.difference is None:
        n_other = replay.n_ids - replay.n_expected
        rest = f"; the other {n_other:,} cannot be" if n_other else ""
        lines.append(f"the same: {replay.n_compared:,} of {replay.n_ids:,} tokens were compared{rest}")
    else:
        lines.append(f"different: {replay.n_compared:,} tokens are the same, then {replay.difference}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
