"""`python -m qwq_mlx.doctor`: whether this machine computes what it should, and how fast, as a report for an issue.

No network, about a minute. The table or the JSON goes to stdout; what runs now, to stderr.

Does not: repair anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwq_mlx.cli.command import Command, add_output, make_parser, run_command

if TYPE_CHECKING:
    from qwq_mlx.doctor.check import Check, Result

SCHEMA = 1
"""Of the JSON report; raised with every change of a key or its meaning."""

_WIDTH = 110
_OUTCOME_WIDTH = 15


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_parser(), arguments, _examine)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "doctor",
        description="Check this machine: backend, versions, memory, the bundled model's recorded ids, attention beside "
        "numpy, the memory plan beside the measured peak, speeds. Takes about a minute and no network.",
        exit_codes="0 nothing failed, 1 a check failed, 2 wrong usage, 130 interrupted (Ctrl-C)",
    )
    parser.add_argument("--model", metavar="DIR", help="also check that this model folder can be read, and fits")
    add_output(parser, json="print one JSON object instead of the table, to attach to an issue")
    return parser


def _checks() -> list[Check]:
    from qwq_mlx.doctor import attention, environment, few_rows, group_fit, memory, recorded, rows, speed
    from qwq_mlx.doctor.check import Check

    return [
        Check("backend", environment.check_backend),
        Check("versions", environment.check_versions),
        Check("cores", environment.check_cores),
        Check("memory", environment.check_memory),
        Check("working set", environment.check_working_set),
        Check("wired limit", environment.check_wired_limit),
        Check("model folder", environment.check_model_folder),
        Check("recorded ids", recorded.check_recorded_ids),
        Check("attention", attention.check_attention),
        Check("rows together", rows.check_rows),
        Check("few-row kernels", few_rows.check_few_rows),
        Check("fit kernels", group_fit.check_group_fit),
        Check("memory plan", memory.check_memory_plan),
        Check("bandwidth", speed.check_bandwidth),
        Check("products", speed.check_products),
        Check("row costs", speed.check_row_costs),
    ]


def _examine(command: Command) -> int:
    from qwq_mlx.model.upstream import import_mlx

    import_mlx()  # first, because without MLX nothing can be checked, and its error says what to install
    from qwq_mlx.default_model import choose_model, pocket_model, ready_model
    from qwq_mlx.doctor.check import Subject, run_checks
    from qwq_mlx.doctor.claims import judge_claims
    from qwq_mlx.model.device import backend_name

    model = command.options.model
    folder = None if model is None else choose_model(model).folder
    pocket = pocket_model()
    if pocket.source is not None:
        command.note(f"converting the bundled model to 4 bits, once: {pocket.folder}")
    subject = Subject(backend_name(), ready_model(pocket), folder)
    if subject.backend != "cpu":
        command.note("On a GPU the first pass compiles kernels, which can take a minute.")
    results = run_checks(_checks(), subject, lambda name: command.note(f"checking: {name}"))
    claims = judge_claims(subject.backend, results)
    failed = [result for result in results if result.outcome == "failed"]
    if command.options.json:
        report = {
            "schema": SCHEMA,
            "failed": [result.name for result in failed],
            "checks": [result.as_json() for result in results],
            "claims": [result.as_json() for result in claims],
        }
        print(json.dumps(report))
    else:
        print("\n".join([*_table(results), "", "Not measured on Metal so far:", *_table(claims)]))
        print(
            f"\n{len(failed)} failed: {', '.join(result.name for result in failed)}" if failed else "\nnothing failed"
        )
    for result in failed:
        command.warn(f"failed: {result.name}: found {result.found}; expected {result.expected or 'otherwise'}")
    return 1 if failed else 0


def _table(results: Sequence[Result]) -> list[str]:
    """Outcome, name and what was found, wrapped; what was expected where the check failed."""
    lines = []
    for result in results:
        text = f"{result.name}: {result.found}"
        if result.outcome == "failed" and result.expected:
            text += f" (expected: {result.expected})"
        indent = " " * _OUTCOME_WIDTH
        wrapped = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
        lines += [result.outcome.ljust(_OUTCOME_WIDTH) + wrapped[0][_OUTCOME_WIDTH:], *wrapped[1:]]
    return lines


if __name__ == "__main__":
    sys.exit(main())
