"""Forms that were measured by several runs of measure_real.py, in one table: of runs on the same traces.

    python scripts/join_sums.py RUN.sums... [--first FORM] [--without TEXT.jsonl] [--source NAME] [--calibration TEXT]

RUN.sums: what --sums wrote; where RUN.json, what that run printed, lies beside it the forms' bytes come from there.
All runs must have measured the same tokens of the same traces. Prints what one run with all forms would have printed:
every form is paired with --first (the first form of the first file, where nobody says). A form that several runs
measured is taken from the first of them, and said on stderr with how far the others are from it. --without leaves out
the traces that are lines of a calibration text (by "id"): what calibrated a form must not judge it.

Does not: measure anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from measure_real import MEASURES, Sums, rows_of  # noqa: E402


def main() -> int:
    """Read, join, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.sums")
    parser.add_argument("--first", metavar="FORM", help="what the others are compared with")
    parser.add_argument("--without", type=Path, metavar="TEXT.jsonl", help="leave out traces with these ids")
    parser.add_argument("--source", default="", help="said in the result")
    parser.add_argument("--calibration", default="", help="said in the result")
    options = parser.parse_args()
    tallies = joined(options.runs, without=ids_of(options.without) if options.without else frozenset())
    first = options.first or next(iter(tallies))
    if first not in tallies:
        parser.error(f"--first {first} was not measured; there are {', '.join(tallies)}")
    names = [first, *(name for name in tallies if name != first)]
    n_bytes = bytes_of(options.runs)
    rows = [
        {"form": name, **row, **({"bytes": n_bytes[name]} if name in n_bytes else {})}
        for name, row in zip(names, rows_of([tallies[name] for name in names]), strict=True)
    ]
    print(json.dumps({"source": options.source, "calibration": options.calibration, "rows": rows}))
    return 0


def ids_of(text: Path) -> frozenset[str]:
    """The ids of a text's lines."""
    return frozenset(json.loads(line)["id"] for line in text.read_text(encoding="utf-8").splitlines())


def joined(runs: Sequence[Path], *, without: Set[str] = frozenset()) -> dict[str, Sums]:
    """Sums of every form over the traces, by its name. without: ids of traces that are left out."""
    tallies: dict[str, Sums] = {}
    traces: list[tuple[str, int]] = []
    for run in runs:
        lines = [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line["id"] not in without]
        if not lines:
            raise SystemExit(
                f"{run}: no trace is left, expected one that --without does not name. Leave --without away."
            )
        measured = [(line["id"], line["n_tokens"]) for line in lines]
        traces = traces or measured
        if measured != traces:
            raise SystemExit(
                f"{run}: {len(measured)} traces with {sum(n for _, n in measured):,} tokens, expected the "
                f"{len(traces)} with {sum(n for _, n in traces):,} of {runs[0]}. Join runs of the same options."
            )
        for form in lines[0]["sums"]:
            sums = [tuple(line["sums"][form]) for line in lines]
            if form in tallies:
                report_repeated(form, run, sums, tallies[form])
            else:
                tallies[form] = Sums(n_tokens=[n for _, n in traces], sums=sums)
    return tallies


def report_repeated(form: str, run: Path, sums: Sequence[tuple[float, ...]], taken: Sums) -> None:
    """Say how far a form's means are from those that were taken."""
    apart = (np.array(sums).sum(0) - np.array(taken.sums).sum(0)) / sum(taken.n_tokens)
    differences = "  ".join(f"{name} {value:+.6f}" for name, value in zip(MEASURES, apart, strict=True))
    print(f"{run}: {form} again: {differences}", file=sys.stderr)


def bytes_of(runs: Sequence[Path]) -> dict[str, int]:
    """Bytes of each form's tensors, where the run's own result is beside its sums."""
    found: dict[str, int] = {}
    for run in runs:
        result = run.with_suffix(".json")
        if result.is_file():
            rows: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["rows"]
            found = {row["form"]: row["bytes"] for row in rows} | found
    return found


if __name__ == "__main__":
    sys.exit(main())
