"""What the system says of a file, where its words mislead: too many open files, no inodes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwq_mlx.convert.read import open_shard
from qwq_mlx.convert.write import disk_fault
from qwq_mlx.errors import DiskFullError, QwqError, system_said
from qwq_mlx.files.digest import sha256_file
from qwq_mlx.files.header import read_header
from qwq_mlx.files.json_object import read_json_object
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.files.rows import read_rows
from qwq_mlx.generate.question_file.questions import read_questions
from qwq_mlx.generate.receipt import read_receipt

SHARD = SimpleNamespace(path=Path("x"), size_bytes=1)
ENTRY: Any = SimpleNamespace(name="t", shape=(1,), start=0, end=1)


@pytest.mark.parametrize(
    "read",
    [
        lambda: read_header(Path("x")),
        lambda: sha256_file(Path("x")),
        lambda: read_json_object(Path("x"), limit_bytes=9, advice="Give another."),
        lambda: read_receipt(Path("x")),
        lambda: read_rows(SHARD, ENTRY, None),
        lambda: open_shard(SHARD),
        lambda: read_questions(Path("x")),
    ],
)
def test_too_many_open_files_are_no_fault_of_the_file(
    read: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Any, *_: Any, **__: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.chdir(tmp_path)
    Path("x").write_text("{}")
    monkeypatch.setattr(os, "open", busy)
    monkeypatch.setattr(Path, "open", busy)
    with pytest.raises(QwqError, match=r"x: .*Too many open files\)\. Raise the limit \(ulimit -n 4096\)"):
        read()


@pytest.mark.parametrize(("free", "is_told"), [(0, True), (5, False)])
def test_a_file_system_without_inodes_is_not_called_full(
    free: int, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {"f_blocks": 9, "f_bfree": 9, "f_bavail": 9, "f_frsize": 512}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**blocks, f_files=100, f_favail=free))
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "new"))
    assert ("no inodes are left" in DiskFullError.reason(error)) == is_told
    assert ("df -i" in system_said(error, "Make room.")) == is_told
    assert ("no inodes are left" in str(disk_fault(error, tmp_path / "new", 9))) == is_told
    # bytes for an open file need no inode, and a file system that counts none has no end of them
    assert DiskFullError.reason(OSError(errno.ENOSPC, "")) == "the disk is full"
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=0, f_favail=0))
    assert DiskFullError.reason(error) == "the disk is full"


def test_a_lock_that_finds_no_inode_says_so_with_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(path: Any, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=100, f_favail=0))
    monkeypatch.setattr(os, "open", none)
    with pytest.raises(DiskFullError, match="no inodes are left") as told, FolderLock(tmp_path / "out"):
        pass
    assert told.value.exit_code == 3
