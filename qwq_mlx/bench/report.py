"""Rows as a table for people and as a line of JSON for a file of results, FOLDER/YYYY-MM-DD.jsonl.

Does not: draw, or compare the results of different days.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qwq_mlx.bench.machine import describe_machine
from qwq_mlx.bench.options import BenchOptions
from qwq_mlx.bench.subject import OURS, Row
from qwq_mlx.errors import SavingError, system_said
from qwq_mlx.files.output_file import check_output_file

__all__ = ["SCHEMA", "append_result", "result_of", "results_file", "table"]

SCHEMA = 2
"""Of a line of results; raised with every change of a key or its meaning."""


def result_of(rows: Sequence[Row], options: BenchOptions, *, load_before: float) -> dict[str, Any]:
    """Everything that was measured, where and when (UTC), as JSON types.

    load_before: the system's load average of the minute before; more than a little says that others used it as well.
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "load_before": round(load_before, 2),
        "repeats": options.repeats,
        "rows": [row.as_json() for row in rows],
    }


def results_file(folder: Path) -> Path:
    """Today's file of a folder, which is made where it is missing. Raises OptionError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SavingError(f"{folder}: cannot be made {system_said(error, 'Choose another folder.')}", error) from error
    path = folder / f"{datetime.now(timezone.utc).date().isoformat()}.jsonl"
    check_output_file(path, name="output")
    return path


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Append one line. Raises SavingError."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        raise SavingError(f"{path}: cannot be written {system_said(error, 'Choose another folder.')}", error) from error


def table(rows: Sequence[Row]) -> str:
    """A table for each subject: medians and spreads, and in brackets how many times as fast qwq_mlx is."""
    blocks = []
    for subject in dict.fromkeys(row.subject for row in rows):
        of_subject = [row for row in rows if row.subject == subject]
        names = list(dict.fromkeys(name for row in of_subject for name in row.runs))
        has_limit = any(row.byte_limit is not None for row in of_subject)
        heads = [f"{subject}, {of_subject[0].unit}", "", *names, *(["byte limit"] if has_limit else [])]
        blocks.append(_aligned([heads, *(_cells(row, names, has_limit) for row in of_subject)]))
    return "\n\n".join(blocks)


def _cells(row: Row, names: Sequence[str], has_limit: bool) -> list[str]:
    cells = []
    for name in names:
        runs = row.runs.get(name)
        if runs is None:
            cells.append("-")
            continue
        ratio = "" if name == OURS else f" ({row.times_as_fast(name):.2f}x)"
        cells.append(f"{_number(runs.median)} ±{runs.spread / 2:.0%}{ratio}")
    if has_limit:
        fraction = row.fraction_of_limit
        cells.append("-" if row.byte_limit is None else f"{_number(row.byte_limit)} ({fraction:.0%} reached)")
    return [row.model, row.setting, *cells]


def _number(value: float) -> str:
    """Three digits at least, none invented: 0.0123, 1.23, 12.3, 1234.5."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
