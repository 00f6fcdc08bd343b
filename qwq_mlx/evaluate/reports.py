"""report.json and report.html in the folder of an evaluation, each of which appears whole or not at all.

Does not: work anything out, or write HTML (`page` does).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from qwq_mlx.errors import SavingError, system_said
from qwq_mlx.evaluate.page import page
from qwq_mlx.evaluate.summary import Summary
from qwq_mlx.files.atomic import write_file

__all__ = ["write_reports"]


def write_reports(folder: Path, summary: Summary) -> None:
    """Write both. Raises SavingError where the disk does not take them."""
    text = json.dumps({"format": "qwq_mlx evaluation report", "schema": 1, **asdict(summary)}, ensure_ascii=False)
    try:
        write_file(folder / "report.json", (text + "\n").encode())
        write_file(folder / "report.html", page(summary).encode())
    except OSError as error:
        raise SavingError(f"{folder}: no report can be written {system_said(error, 'Make room.')}", error) from error
