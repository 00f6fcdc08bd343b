"""Files that somebody else wrote: a changed file of each kind is read, or refused by an error of ours."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest


@pytest.mark.pocket
def test_no_mutation_of_a_file_ends_in_another_error_than_ours(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 of each kind here; scripts/fuzz_files.py makes 10,000."""
    monkeypatch.setattr(sys, "path", [str(repository / "scripts"), *sys.path])
    import fuzz_files

    assert fuzz_files.run(40, 1, None, tmp_path) == 0
    counts = re.findall(r"(?m)^\S+: (\d+) read, (\d+) refused, 0 OTHER ERRORS$", capsys.readouterr().out)
    assert len(counts) == 10 and all(int(refused) > 10 for _, refused in counts)
