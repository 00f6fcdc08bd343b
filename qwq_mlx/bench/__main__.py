"""`python -m qwq_mlx.bench`: speed beside mlx-lm's on the same weights, as a table and one JSON line.

Both go to stdout, the JSON as its last line; what runs now goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwq_mlx.cli.command import Command, add_output, make_parser, run_command
from qwq_mlx.errors import OptionError

SUBJECTS = {
    "decode": "decode:bench_decode",
    "prefill": "prefill:bench_prefill",
    "rows": "rows:bench_rows",
    "samples": "samples:bench_samples",
    "stall": "stall:bench_stall",
    "load": "folders:bench_load",
    "first-token": "folders:bench_first_token",
    "convert": "folders:bench_convert",
}
"""Name -> file and function of this folder; imported when it is measured."""

_DEFAULT_SUBJECTS = ("decode",)
_RESULTS = "benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _bench)


def _parser() -> argparse.ArgumentParser:
    from qwq_mlx.bench.options import BenchOptions

    parser = make_parser(
        "bench",
        description="Speed of qwq_mlx and mlx-lm on the same weights, taking turns in one run: medians of rounds "
        "behind a warm-up, half their spread, and how many times as fast qwq_mlx is.",
        exit_codes="0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C)",
    )
    add, default = parser.add_argument, BenchOptions()
    add(
        "subjects",
        nargs="*",
        metavar="SUBJECT",
        help=f"what to measure: {', '.join(SUBJECTS)} (default: {' '.join(_DEFAULT_SUBJECTS)})",
    )
    add("--model", metavar="FOLDER", help="model folder (default: as python -m qwq_mlx.generate)")
    add("--source", metavar="FOLDER", help="checkpoint that convert packs (default: the bundled one)")
    for flag, dest, text in (
        ("--layers", "n_layers", "layers of the QwQ-shaped random model; 0 leaves it out"),
        ("--tokens", "n_tokens", "tokens per decode run"),
        ("--prompt-tokens", "n_prompt", "tokens per prefill run"),
        ("--repeats", "repeats", "runs of each"),
    ):
        value = getattr(default, dest)
        add(flag, type=int, metavar="N", dest=dest, default=value, help=f"{text} (default: %(default)s)")
    for flag, dest, text in (
        ("--contexts", "contexts", "positions in the cache before a decode run"),
        ("--rows", "rows", "rows per pass"),
        ("--chunks", "chunks", "ids of a newcomer's prompt between two passes of others"),
    ):
        values = getattr(default, dest)
        shown = " ".join(str(value) for value in values)
        add(flag, type=int, nargs="+", metavar="N", dest=dest, default=values, help=f"{text} (default: {shown})")
    add("--shaped-only", action="store_true", help="measure the QwQ-shaped model alone, without a model folder")
    add(
        "--output",
        nargs="?",
        const=_RESULTS,
        metavar="FOLDER",
        help=f"append the JSON line to FOLDER/DATE.jsonl (without FOLDER: {_RESULTS})",
    )
    add_output(parser)
    return parser


def _bench(command: Command) -> int:
    from qwq_mlx.bench.options import BenchOptions

    parsed = command.options
    subjects = _subjects(parsed.subjects)
    options = BenchOptions(
        n_tokens=parsed.n_tokens,
        repeats=parsed.repeats,
        n_layers=parsed.n_layers,
        is_shaped_only=parsed.shaped_only,
        contexts=tuple(parsed.contexts),
        n_prompt=parsed.n_prompt,
        rows=tuple(parsed.rows),
        chunks=tuple(parsed.chunks),
    )
    if options.is_shaped_only and (left := [each for each in subjects if SUBJECTS[each].startswith("folders:")]):
        raise OptionError(f"{left[0]} measures a model folder, which --shaped-only leaves out. Leave away one of them.")
    if options.is_shaped_only and parsed.model is not None:
        raise OptionError(f"--model {parsed.model} is left out by --shaped-only. Leave away one of them.")
    from qwq_mlx.model.upstream import import_mlx

    import_mlx()  # its error says what to install
    from qwq_mlx.bench.report import append_result, result_of, results_file, table
    from qwq_mlx.bench.subject import Bench
    from qwq_mlx.default_model import pocket_checkpoint, ready_model

    output = None if parsed.output is None else results_file(Path(parsed.output))
    source = pocket_checkpoint() if parsed.source is None else Path(parsed.source)
    folder = source if options.is_shaped_only else ready_model(parsed.model, command.note)
    bench = Bench(folder, options, command.note, source)
    rows, load_before = [], os.getloadavg()[0]
    for subject in subjects:
        module, _, function = SUBJECTS[subject].partition(":")
        rows += getattr(importlib.import_module(f"qwq_mlx.bench.{module}"), function)(bench)
    result = result_of(rows, options, load_before=load_before)
    print(table(rows))
    print(json.dumps(result))
    if output is not None:
        append_result(output, result)
        command.note(f"appended to {output}")
    return 0


def _subjects(names: Sequence[str]) -> list[str]:
    """The subjects to measure, each once. Raises OptionError for one that there is not."""
    for name in names:
        if name not in SUBJECTS:
            raise OptionError(f"there is no subject {name!r}, expected some of {', '.join(SUBJECTS)}.")
    return list(dict.fromkeys(names or _DEFAULT_SUBJECTS))


if __name__ == "__main__":
    sys.exit(main())
