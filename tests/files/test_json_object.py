"""The faults of small JSON files that only the operating system can make; test_hostile_folders.py has the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwq_mlx.errors import SourceError
from qwq_mlx.files.json_object import read_json_object


def test_it_reads_what_fits_and_says_what_to_do_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": {"b": [1, 2.5, null, "é"]}}', encoding="utf-8")
    size = path.stat().st_size
    assert read_json_object(path, limit_bytes=size, advice="Do this.") == {"a": {"b": [1, 2.5, None, "é"]}}
    with pytest.raises(SourceError, match=r"f\.json: has 34 bytes, expected at most 33\. Do this\.$"):
        read_json_object(path, limit_bytes=size - 1, advice="Do this.")


def test_faults_of_the_system_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    path.symlink_to("f.json")
    with pytest.raises(
        SourceError, match=r"f\.json: cannot be opened \(Too many levels of symbolic links\)\. Do this\."
    ):
        read_json_object(path, limit_bytes=100, advice="Do this.")
    path.unlink()
    path.write_text("{}")

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(SourceError, match=r"f\.json: cannot be read \(Input/output error\)\. Do this\."):
        read_json_object(path, limit_bytes=100, advice="Do this.")
