"""Recorded outputs, as the scripts that judge the readers on them take them: JSON lines.

Each line is an object with "id", "prompt", "response", and optionally "expected" (the right answer, if it is a text)
and "finish" ("length..." where the output was cut).

Does not: judge them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["is_finished", "read_rows"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All outputs of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def is_finished(row: dict[str, Any]) -> bool:
    """Whether the model itself ended the output, so that it has an answer or will never have one."""
    return not str(row.get("finish", "")).startswith("length")
